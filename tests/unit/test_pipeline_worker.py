"""A worker without Ray: what it does with a shard that is new, half journalled, committed, changed, or deadly."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.worker
from nanovllm import EngineDeadError, RequestOutput, SamplingParams
from nanovllm.engine.stats import EngineStats
from pipelines.attempts import AttemptLog
from pipelines.commit import Journal, OutputDirectory, output_schema, read_journal
from pipelines.inputs import list_dataset, measure
from pipelines.job import JobConfig, build
from pipelines.plan import SHARD_SCHEMA, Shard, Stage, cut
from pipelines.requests import row_seed
from pipelines.results import RowResult, Sample
from pipelines.worker import ENGINE_DIED, ShardWorker, Task
from tests.unit.test_heap import forget_others

ROWS = 12


class FakeEngine:
    """Says back the prompt and the seed; dies of the prompt "row 5" when told to."""

    tokenizer = None

    def __init__(self, model: str, **options: Any) -> None:
        self.max_prompt_len = 100
        self.prompts: list[str] = []
        self.deadly = False

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def shutdown(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 1, 0, 0, 0, 0, 0.0)

    def submit(self, prompt: str, params: SamplingParams) -> Future[RequestOutput]:
        self.prompts.append(prompt)
        future: Future[RequestOutput] = Future()
        if self.deadly and prompt in ("row 5", "row 6"):  # the one it dies of, and one that waits
            future.set_exception(EngineDeadError("poisoned", in_step=prompt == "row 5"))
            return future
        text = f"{prompt} {params.seed}"
        future.set_result(
            RequestOutput(
                text=text,
                token_ids=[1, 2],
                finish_reason="stop",
                num_input_tokens=3,
                num_generated_tokens=2,
                num_cached_tokens=0,
                logprobs=None,
                error=None,
            )
        )
        return future


class Exited(BaseException):
    """Stands for the end of the process."""


class Bench:
    """A job of one file in two shards, begun by a driver."""

    def __init__(
        self, root: Path, prompts: list[str] | None = None, kind: pa.DataType | None = None, **settings: Any
    ) -> None:
        self.source = root / "in.parquet"
        prompts = prompts or [f"row {number}" for number in range(ROWS)]
        table = pa.table({"id": list(range(ROWS)), "prompt": pa.array(prompts, kind)})
        pq.write_table(table, self.source, row_group_size=7)
        values = {"model": "m", "input": str(self.source), "output": str(root / "out"), **settings}
        self.config: JobConfig = build(values)
        dataset = list_dataset(self.config.input)
        schema, facts = measure(dataset)
        self.shards = list(cut(dataset.files, facts, 6, 6))
        self.output = OutputDirectory(self.config.output)
        owner = self.output.create({}, dataset.format, schema, self.shards)
        settings = self.config.as_dict()
        stage = Stage(
            dataset.root, dataset.format, schema, tuple(output_schema(schema, self.config.columns.keep).names)
        )
        self.task = Task(settings, owner.token, "first", False, stage, None, FakeEngine)

    def worker(self, **changes: Any) -> tuple[ShardWorker, FakeEngine]:
        worker = ShardWorker(self.task._replace(**changes), None)  # type: ignore[arg-type]
        return worker, worker._engine  # type: ignore[return-value]

    def work(self, worker: ShardWorker, shard: Shard) -> dict[str, Any]:
        """Call the worker as Ray Data does: with a batch of one row of numpy columns."""
        batch = {name: np.array([getattr(shard, name)]) for name in SHARD_SCHEMA.names}
        (result,) = asyncio.run(worker(batch))["result"]
        return json.loads(result)  # type: ignore[no-any-return]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(pipelines.worker, "_report_regularly", lambda worker, board: None)
    monkeypatch.setattr(pipelines.worker.os, "_exit", leave)
    return Bench(tmp_path, run={"write_retries": 0, "max_engine_deaths": 2})


def expected_texts(shard: Shard) -> list[str]:
    numbers = range(shard.first_row, shard.first_row + shard.rows)
    return [f"row {number} {row_seed(0, 'in.parquet', number, 0)}" for number in numbers]


def test_shards_are_committed_with_their_counts(bench: Bench) -> None:
    worker, _ = bench.worker()
    for shard in bench.shards:
        result = bench.work(worker, shard)
        assert (result["status"], result["reused_rows"], result["counts"]["rows"]) == ("done", 0, shard.rows)
        assert result["counts"]["generated_tokens"] == 2 * shard.rows
        table = bench.output.read_part(shard.index, ["id", "generated_text"])
        assert table["generated_text"].to_pylist() == expected_texts(shard)
    bench.output.finish(bench.shards)


def test_the_collector_looks_away_as_long_as_there_is_a_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_others(monkeypatch)
    before = gc.get_threshold(), gc.get_freeze_count()
    worker, _ = bench.worker()
    assert gc.get_freeze_count() > before[1] + 10_000
    worker.__del__()
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_journalled_rows_are_not_generated_again(bench: Bench) -> None:
    shard = bench.shards[1]
    journal = Journal(bench.output.journal(shard.index))
    for position in (0, 3):
        journal.add(position, RowResult((Sample(f"kept {position}", "length", 2),), 3, 0, None))
    journal.flush()
    worker, engine = bench.worker()
    result = bench.work(worker, shard)
    assert (result["status"], result["reused_rows"]) == ("done", 2)
    assert len(engine.prompts) == shard.rows - 2
    texts = bench.output.read_part(shard.index, ["generated_text"])["generated_text"].to_pylist()
    wanted = expected_texts(shard)
    wanted[0], wanted[3] = "kept 0", "kept 3"
    assert texts == wanted
    assert read_journal(bench.output.journal(shard.index), shard.rows) == {}


def test_a_committed_shard_is_not_done_again(bench: Bench) -> None:
    worker, engine = bench.worker()
    first = bench.work(worker, bench.shards[0])
    done = len(engine.prompts)
    again = bench.work(worker, bench.shards[0])
    assert len(engine.prompts) == done
    assert (again["status"], again["reused_rows"], again["counts"]) == ("done", bench.shards[0].rows, first["counts"])


def test_a_changed_or_missing_file_fails_its_shards(bench: Bench) -> None:
    worker, _ = bench.worker()
    data = bench.source.read_bytes()
    bench.source.write_bytes(data + b"x")
    result = bench.work(worker, bench.shards[0])
    assert result["status"] == "failed"
    assert f"had {len(data)} bytes when it was planned and has {len(data) + 1} bytes" in result["reason"]
    bench.source.write_bytes(data)
    os.utime(bench.source, ns=(0, bench.shards[0].mtime_ns + 1))
    assert "in.parquet was written again since it was planned" in bench.work(worker, bench.shards[0])["reason"]
    bench.source.unlink()
    assert "is gone" in bench.work(worker, bench.shards[0])["reason"]


def test_a_store_that_refuses_is_fatal_and_harms_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = bench.worker()
    bench.work(worker, bench.shards[0])

    def full(index: int, table: pa.Table) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(worker._output, "commit", full)
    result = bench.work(worker, bench.shards[1])
    assert (result["status"], result["counts"]) == ("fatal", None)
    assert "no space left" in result["reason"]
    assert bench.output.committed() == {0}


def test_a_failing_engine_ends_the_process_and_costs_one_row(bench: Bench) -> None:
    """Two deaths in company, one alone, and then the row is poison; the rest is kept, or done in company."""
    shard = bench.shards[0]
    for death in (1, 2):
        worker, engine = bench.worker()
        engine.deadly = True
        with pytest.raises(Exited) as left:
            bench.work(worker, shard)
        assert left.value.args == (ENGINE_DIED,)
        assert set(read_journal(bench.output.journal(shard.index), shard.rows)) == {0, 1, 2, 3, 4}
        assert engine.prompts == [f"row {number}" for number in range(0 if death == 1 else 5, shard.rows)]
    worker, engine = bench.worker()
    assert bench.work(worker, shard)["status"] == "apart"
    assert engine.prompts == ["row 6"]
    worker, engine = bench.worker(apart=True)
    engine.deadly = True
    with pytest.raises(Exited):
        bench.work(worker, shard)
    assert engine.prompts == ["row 5"]
    worker, engine = bench.worker(apart=True)
    result = bench.work(worker, shard)
    assert (result["status"], result["counts"]["error_rows"], engine.prompts) == ("done", 1, [])
    table = bench.output.read_part(shard.index, ["generated_text", "error"])
    assert table["error"].to_pylist() == [None] * 5 + ["the engine died of this row: poisoned"] + [None] * (
        shard.rows - 6
    )
    assert table["generated_text"].to_pylist()[:5] == expected_texts(shard)[:5]


def test_another_start_forgives(bench: Bench) -> None:
    shard = bench.shards[0]
    for _ in range(2):
        worker, engine = bench.worker()
        engine.deadly = True
        with pytest.raises(Exited):
            bench.work(worker, shard)
    worker, engine = bench.worker(start="another")
    assert bench.work(worker, shard)["status"] == "done"
    assert engine.prompts == ["row 5", "row 6"]


def test_a_shard_on_which_processes_vanish_without_end_is_given_up(bench: Bench) -> None:
    shard = bench.shards[0]
    for _ in range(2):
        log = AttemptLog(bench.output.attempts(shard.index), bench.task.start)
        log.read()
        log.begin(0, None)
        log.close()
    worker, engine = bench.worker()
    result = bench.work(worker, shard)
    assert (result["status"], result["gave_up"], engine.prompts) == ("failed", True, [])
    assert (
        "the engine died 2 times on it and finished no row in between, last: its process vanished" in result["reason"]
    )
    worker, engine = bench.worker(start="another")
    assert bench.work(worker, shard)["status"] == "done"


def test_a_directory_of_the_same_name_elsewhere_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="is not the directory that the driver wrote"):
        ShardWorker(bench.task._replace(token="another"), None)  # type: ignore[arg-type]


def test_columns_to_keep_need_not_hold_the_prompt(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "second").mkdir()
    other = Bench(tmp_path / "second", columns={"keep": ["id"], "prefix": "p_"})
    worker, _ = other.worker()
    other.work(worker, other.shards[0])
    schema = pq.read_schema(other.output.part(0).path)
    assert schema.names[:2] == ["id", "p_generated_text"]
    assert "prompt" not in schema.names


def test_prompts_may_be_string_views(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "second").mkdir()
    other = Bench(tmp_path / "second", kind=pa.string_view())
    assert other.task.stage.schema.field("prompt").type == pa.string_view()
    worker, engine = other.worker()
    assert other.work(worker, other.shards[0])["status"] == "done"
    assert engine.prompts == [f"row {number}" for number in range(other.shards[0].rows)]


def test_equal_rows_are_generated_once_and_die_once(tmp_path: Path, bench: Bench) -> None:
    """Two deaths in company and one alone, as without copies; the copies of the row that does it are no more deaths."""
    (tmp_path / "second").mkdir()
    prompts = ["row 1", "row 5", "row 1", "row 2", "row 5", "row 5"] * 2
    settings: dict[str, Any] = {"sampling": {"temperature": 0}, "run": {"dedupe": True, "write_retries": 0}}
    other = Bench(tmp_path / "second", prompts, **settings)
    shard = other.shards[0]
    for _ in range(2):
        worker, engine = other.worker()
        engine.deadly = True
        with pytest.raises(Exited):
            other.work(worker, shard)
    worker, engine = other.worker()
    engine.deadly = True
    result = other.work(worker, shard)
    assert (result["status"], engine.prompts) == ("apart", [])
    worker, engine = other.worker(apart=True)
    engine.deadly = True
    with pytest.raises(Exited):
        other.work(worker, shard)
    worker, engine = other.worker(apart=True)
    engine.deadly = True
    result = other.work(worker, shard)
    assert (result["status"], result["counts"]["error_rows"], result["copied_rows"]) == ("done", 3, 0)
    assert engine.prompts == []
    table = other.output.read_part(shard.index, ["prompt", "error"])
    for row in table.to_pylist():
        assert (row["error"] == "the engine died of this row: poisoned") == (row["prompt"] == "row 5")

    worker, engine = other.worker()  # of a shard that nothing disturbs, copies are counted
    result = other.work(worker, other.shards[1])
    assert (result["status"], result["copied_rows"], engine.prompts) == ("done", 2, ["row 5", "row 1", "row 2"])
    texts = other.output.read_part(1, ["generated_text"])["generated_text"].to_pylist()
    assert [text.rsplit(" ", 1)[0] for text in texts] == prompts[7:]
