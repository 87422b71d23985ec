"""Jobs whose rows get more than a text: samples as lists and as rows, equal rows generated once, killed or not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nanovllm.engine.poison import VARIABLE
from tests.counting import computed
from tests.integration.jobs import (
    COUNTED,
    REPOSITORY,
    SLOW,
    end,
    environment,
    journalled_rows,
    kill_everything,
    parts,
    report,
    run,
    start,
    suspend_when,
    table_of,
)

SAMPLES = [
    "sampling.n=3",
    "sampling.max_tokens=12",
    "sampling.logprobs=1",
    "sampling.prompt_logprobs=0",
    "run.shard_rows=10",
]
WORDS = [*(f"fox {number}" for number in range(8)), ""]


@pytest.fixture(scope="module")
def repeated(workplace: Path) -> Path:
    """120 rows of which 9 prompts are different; one of these is empty."""
    source = workplace / "repeated"
    source.mkdir()
    numbers = np.random.default_rng(0).integers(len(WORDS), size=120).tolist()
    table = pa.table({"id": range(120), "prompt": [WORDS[number] for number in numbers]})
    pq.write_table(table, source / "a.parquet", row_group_size=30)
    return source


@pytest.mark.long
def test_samples_as_rows_survive_a_kill_and_say_what_lists_say(
    workplace: Path, repeated: Path, chat_model_dir: Path
) -> None:
    base = ["--model", str(chat_model_dir), "--input", str(repeated), *SLOW, *SAMPLES]
    lists, rows = workplace / "lists", workplace / "rows"
    done = run([*base, "--output", str(lists)], workplace)
    assert done.returncode == 0
    errors = pc.sum(pc.equal(pq.read_table(repeated)["prompt"], "")).as_py()
    assert f"finished: 120 rows ({errors} with an error)" in done.stdout

    arguments = [*base, "--output", str(rows), "columns.samples=rows"]
    process = start(arguments, workplace)
    suspend_when(lambda: len(parts(rows)) >= 2 and journalled_rows(rows) >= 2, process)
    kill_everything(process)
    journalled = journalled_rows(rows)
    assert 0 < len(parts(rows)) < 12
    done = run(arguments, workplace)
    assert done.returncode == 0
    summary, of_lists = report(rows), report(lists)
    assert summary["this_start"]["reused_rows"] == journalled > 0

    wide, long = table_of(lists), table_of(rows)
    assert long.num_rows == 360
    assert long["id"].to_pylist() == np.repeat(np.arange(120), 3).tolist()
    assert long["sample_index"].to_pylist() == [0, 1, 2] * 120
    for name in ("generated_text", "finish_reason", "num_generated_tokens"):
        assert long[name].to_pylist() == [value for of_row in wide[name].to_pylist() for value in of_row], name
    for name in ("prompt", "num_input_tokens", "error"):
        assert long[name].to_pylist() == [value for value in wide[name].to_pylist() for _ in range(3)], name
    # Log-probabilities feel the batch in their last bits.
    same(long["logprobs"].to_pylist(), [value for of_row in wide["logprobs"].to_pylist() for value in of_row])
    same(
        long["prompt_logprobs"].to_pylist(), [value for value in wide["prompt_logprobs"].to_pylist() for _ in range(3)]
    )
    for row in long.to_pylist():
        assert (row["logprobs"] is None) == (row["error"] is not None) == (row["prompt_logprobs"] is None)
        if row["error"] is None:
            assert len(row["logprobs"]) == row["num_generated_tokens"] == 12
            assert len(row["prompt_logprobs"]) == row["num_input_tokens"]
            assert row["prompt_logprobs"][0] is None
    texts = [
        tuple(of_row)
        for of_row, error in zip(wide["generated_text"].to_pylist(), wide["error"].to_pylist(), strict=True)
        if not error
    ]
    assert all(len(set(of_row)) == 3 for of_row in texts)
    assert len(set(texts)) == len(texts)  # equal prompts in different rows are sampled differently

    for figure in (
        "rows",
        "planned_rows",
        "samples",
        "error_rows",
        "errors",
        "finish_reasons",
        "input_tokens",
        "generated_tokens",
        "generated_lengths",
    ):
        assert summary[figure] == of_lists[figure], figure
    assert (summary["rows"], summary["samples"], summary["error_rows"]) == (120, 360, errors)
    assert summary["generated_tokens"] == sum(long["num_generated_tokens"].to_pylist()) == 36 * (120 - errors)
    assert summary["finish_reasons"] == {"length": 3 * (120 - errors), "error": 3 * errors}
    assert json.loads((rows / "_SUCCESS").read_text()) == {"rows": 360, "files": len(parts(rows))}
    assert json.loads((lists / "_SUCCESS").read_text()) == {"rows": 120, "files": len(parts(lists))}
    assert len({pq.read_schema(path) for path in rows.glob("part-*.parquet")}) == 1


def same(left: list[Any], right: list[Any]) -> None:
    """Whether log-probabilities of texts are of the same tokens, and nearly the same."""
    flat = [[entry for text in side for token in text or () for entry in token or ()] for side in (left, right)]
    assert len(flat[0]) == len(flat[1]) > 0
    assert [entry["token_id"] for entry in flat[0]] == [entry["token_id"] for entry in flat[1]]
    np.testing.assert_allclose(*([entry["logprob"] for entry in side] for side in flat), atol=1e-4)


@pytest.mark.long
def test_equal_rows_are_generated_once(workplace: Path, repeated: Path, chat_model_dir: Path, tmp_path: Path) -> None:
    base = [
        "--model",
        str(chat_model_dir),
        "--input",
        str(repeated),
        *SLOW,
        "sampling.temperature=0",
        "run.shard_rows=10",
    ]
    plain, shared = workplace / "plain", workplace / "shared"
    assert run([*base, "--output", str(plain)], workplace).returncode == 0
    arguments = [str(tmp_path / "counted"), *base, "--output", str(shared), "run.dedupe=true"]
    process = start(arguments, workplace, script=COUNTED)
    suspend_when(lambda: len(parts(shared)) >= 2, process)
    kill_everything(process)
    before = sum(computed(tmp_path / "counted").rows.values())
    failed = table_of(shared).num_rows - table_of(shared)["error"].null_count
    assert before <= len(WORDS)
    done = end(start(arguments, workplace, script=COUNTED))
    assert done.returncode == 0
    assert parts(shared) == parts(plain)
    generated = sum(computed(tmp_path / "counted").rows.values()) - before
    assert generated <= len(WORDS)
    now = report(shared)["this_start"]
    left = 120 - now["resumed_rows"] - now["reused_rows"]
    failed = report(shared)["error_rows"] - failed  # of those left; they are no copies
    assert now["resumed_rows"] > 0
    assert left - generated - failed <= now["copied_rows"] <= left - generated
    assert f", {now['copied_rows']} copies)" in done.stdout
    assert report(shared)["generated_tokens"] == report(plain)["generated_tokens"] > now["generated_tokens"]


PROGRAM = """
import sys
import ray
from pipelines import NanoVLLMPredictor

source, model, out = sys.argv[1:]
ray.init(address="local", include_dashboard=False, logging_level="ERROR")

def predict(name, sampling, **options):
    arguments = {"model": model, "sampling_params": sampling, "kvcache_block_size": 16, **options}
    ds = ray.data.read_parquet(source).map_batches(
        NanoVLLMPredictor, fn_constructor_kwargs=arguments, batch_size=32, concurrency=1, num_cpus=0
    )
    ds.write_parquet(f"{out}/{name}")

predict("labels", {"labels": ["quick", "brown", "quick fox"]}, dedupe=True)
predict("rows", {"n": 2, "max_tokens": 6, "structured_outputs": {"regex": "[a-c]{2,4}"}}, samples="rows", output_prefix="x_")
"""


@pytest.mark.long
def test_the_predictor_gives_the_same_columns(repeated: Path, chat_model_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(repeated), str(chat_model_dir), str(tmp_path)],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    labels = table_of(tmp_path / "labels").sort_by("id")
    assert labels.schema.field("label_probs").type == pa.struct(
        [(name, pa.float64()) for name in ("quick", "brown", "quick fox")]
    )
    assert labels.num_rows == 120
    of_prompt: dict[str, Any] = {}
    for row in labels.to_pylist():
        assert (row["label"] is None) == (row["error"] is not None) == (row["prompt"] == "")
        if row["label"] is not None:
            assert max(row["label_probs"], key=row["label_probs"].__getitem__) == row["label"] == row["generated_text"]
            assert abs(sum(row["label_probs"].values()) - 1) < 1e-9
            assert of_prompt.setdefault(row["prompt"], row["label_probs"]) == row["label_probs"]  # computed once
    assert len(of_prompt) == len(WORDS) - 1

    rows = table_of(tmp_path / "rows").sort_by([("id", "ascending"), ("x_sample_index", "ascending")])
    assert rows["id"].to_pylist() == np.repeat(np.arange(120), 2).tolist()
    assert rows["x_sample_index"].to_pylist() == [0, 1] * 120
    for row in rows.to_pylist():
        if row["x_error"] is None:
            assert row["x_finish_reason"] in ("stop", "length")
            if row["x_finish_reason"] == "stop":
                assert re.fullmatch("[a-c]{2,4}", row["x_parsed"])
                assert row["x_parsed"] == row["x_generated_text"]
    assert rows["x_parsed"].null_count < 120


@pytest.mark.long
def test_copies_of_a_poison_row_are_no_further_deaths(
    workplace: Path, repeated: Path, chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--model", str(chat_model_dir), "--input", str(repeated), *SLOW, "sampling.temperature=0"]
    plain, poisoned = workplace / "healthy", workplace / "poisoned"
    # One shard: others that hold the prompt come to their own verdict.
    settings = [*base, "run.dedupe=true", "run.shard_rows=120", "run.shards_in_flight=1", "engine.max_num_seqs=16"]
    assert run([*settings, "--output", str(plain)], workplace).returncode == 0
    assert len(parts(plain)) == 1
    monkeypatch.setenv(VARIABLE, "raise:fox 3")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    done = run([*settings, "--output", str(poisoned)], workplace)
    assert done.returncode == 0
    rows, expected = table_of(poisoned).to_pylist(), table_of(plain).to_pylist()
    bad = [row for row in rows if row["prompt"] == "fox 3"]
    assert len(bad) > 5
    assert {row["error"] for row in bad} == {"the engine died of this row: RuntimeError: poisoned"}
    others = [row for row in rows if row["prompt"] != "fox 3"]
    assert others == [row for row in expected if row["prompt"] != "fox 3"]
    deaths = len(re.findall("the engine died: RuntimeError: poisoned", done.stdout + done.stderr))
    assert 1 <= deaths <= 4
