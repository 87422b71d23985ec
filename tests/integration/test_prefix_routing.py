"""Routing on a real local Ray: rows that share a document run together, and neither files nor kills show that they were moved."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.jobs import (
    SLOW,
    kill_everything,
    parts,
    report,
    run,
    start,
    suspend_when,
    table_of,
    wait_for,
)

DOCUMENTS, QUESTIONS = 30, 8


def stop_when(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Kill a job and all below it at a moment when `what` holds."""
    wait_for(what, process, every=0.002)
    process.send_signal(signal.SIGSTOP)  # the driver starts nothing more
    kill_everything(process)


@pytest.fixture(scope="module")
def documents(workplace: Path) -> Path:
    """Questions about documents, in random order."""
    source = workplace / "documents"
    source.mkdir()
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghij ", k=150)) for _ in range(DOCUMENTS)]
    asked = [(document, question) for document in range(DOCUMENTS) for question in range(QUESTIONS)]
    rng.shuffle(asked)
    prompts = [f"{texts[document]} question {question}" for document, question in asked]
    table = pa.table({"id": range(len(asked)), "prompt": prompts, "doc": [document for document, _ in asked]})
    pq.write_table(table.slice(0, 130), source / "a.parquet", row_group_size=50)
    pq.write_table(table.slice(130), source / "b.parquet")
    return source


def arguments(model: Path, source: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model", str(model), "--input", str(source), "--output", str(output)]
    return [*paths, *SLOW, "run.shard_rows=30", "sampling.max_tokens=4", "sampling.temperature=0.8", *more]


def test_prefixes_are_computed_once_and_files_stay_the_same(
    workplace: Path, documents: Path, chat_model_dir: Path
) -> None:
    plain, routed = workplace / "unrouted", workplace / "routed"
    assert run(arguments(chat_model_dir, documents, plain, "run.replicas=2"), workplace).returncode == 0
    done = run(arguments(chat_model_dir, documents, routed, "run.replicas=2", "run.prefix_sort=on"), workplace)
    assert done.returncode == 0
    assert parts(routed) == parts(plain)
    assert "routing  240 rows brought together in" in done.stdout
    summary, before = report(routed), report(plain)
    assert before["routing"] is None
    assert summary["routing"]["routed"]
    for figure in ("rows", "input_tokens", "generated_tokens", "finish_reasons", "input_lengths"):
        assert summary[figure] == before[figure]
    hits = [one["cost"]["engine_cached_tokens"] / one["cost"]["engine_input_tokens"] for one in (before, summary)]
    assert hits[0] < 0.5 < 0.7 < hits[1]


def test_killed_while_rows_are_brought_together(
    undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path
) -> None:
    output = workplace / "killed-routing"
    work = output / "_run" / "routed"
    paths = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output)]
    process = start([*paths, *SLOW, "run.group_by=kind"], workplace)
    stop_when(lambda: list((work / "runs").glob("*.arrow")), process)
    assert not (work / "plan.parquet").exists()
    done = run([*paths, *SLOW, "run.group_by=kind"], workplace)
    assert done.returncode == 0
    assert parts(output) == parts(undisturbed)
    assert [(e["file"], e["row"]) for e in report(output)["error_samples"]] == [("a.parquet", 7), ("a.parquet", 8)]
    assert not work.exists()

    done = run([*paths, *SLOW, "run.group_by=tags"], workplace)
    assert done.returncode == 2
    assert "belongs to another job: run.group_by was 'kind', is 'tags'" in done.stderr


@pytest.mark.long
def test_killed_half_way_and_while_rows_go_back(
    undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path
) -> None:
    output = workplace / "killed-merging"
    paths = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output)]
    begun = [*paths, *SLOW, "run.group_by=kind"]
    results = output / "_run" / "routed" / "results"

    process = start(begun, workplace)
    suspend_when(lambda: len(list(results.glob("*"))) >= 2, process)
    kill_everything(process)
    assert not parts(output)

    process = start(begun, workplace)
    stop_when(lambda: list((results.parent / "merge").glob("*.arrow")), process)

    process = start(begun, workplace)
    stop_when(lambda: parts(output), process)
    assert not (output / "_SUCCESS").exists()
    assert parts(output).items() <= parts(undisturbed).items()

    done = run(begun, workplace)
    assert done.returncode == 0
    assert "resuming: 240 of 240 rows" in done.stdout
    assert parts(output) == parts(undisturbed)
    whole, summary = report(undisturbed), report(output)
    for figure in ("rows", "error_rows", "generated_tokens", "errors", "input_lengths"):
        assert summary[figure] == whole[figure]


@pytest.mark.long
def test_any_order_killed_half_way(workplace: Path, documents: Path, chat_model_dir: Path) -> None:
    output = workplace / "any-order"
    begun = arguments(chat_model_dir, documents, output, "run.prefix_sort=on", "output.order=any")
    process = start(begun, workplace)
    suspend_when(lambda: len(parts(output)) >= 2, process)
    before = parts(output)
    kill_everything(process)
    assert run(begun, workplace).returncode == 0
    assert parts(output).items() >= before.items()
    result = table_of(output)
    assert sorted(result["id"].to_pylist()) == list(range(DOCUMENTS * QUESTIONS))
    assert result.schema.names[:4] == ["id", "prompt", "doc", "generated_text"]
    assert run(begun, workplace).stdout.startswith("already finished: 240 rows")
