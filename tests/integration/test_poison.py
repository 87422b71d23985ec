"""Prompts that kill their engine, and actors that hang: what a job with them ends with, and what it costs."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import psutil
import pytest

from nanovllm.engine.poison import VARIABLE
from tests.integration.jobs import SLOW, end, members, parts, report, run, start, table_of, wait_for

POISONED = 123  # of the undisturbed dataset's rows, the one whose prompt holds "fox 123"


@pytest.mark.parametrize(
    ("how", "reason", "deaths"),
    [
        pytest.param("raise", "RuntimeError: poisoned", 4, marks=pytest.mark.long),
        ("kill", "its process vanished each time", 8),
    ],
)
def test_a_prompt_that_kills_the_engine_is_one_error_row(
    undisturbed: Path,
    workplace: Path,
    dataset: Path,
    chat_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    reason: str,
    deaths: int,
) -> None:
    output = workplace / f"poison-{how}"
    monkeypatch.setenv(VARIABLE, f"{how}:fox {POISONED}")
    done = run(["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW], workplace)
    assert done.returncode == 0
    assert "finished: 240 rows (3 with an error)" in done.stdout
    rows, expected = table_of(output), table_of(undisturbed)
    assert rows.schema == expected.schema
    assert rows.slice(POISONED, 1).to_pylist()[0] == {
        **expected.slice(POISONED, 1).to_pylist()[0],
        "generated_text": None,
        "finish_reason": "error",
        "num_input_tokens": 0,
        "num_generated_tokens": 0,
        "error": f"the engine died of this row: {reason}",
    }
    others = [row for row in range(240) if row != POISONED]
    assert rows.take(others).to_pylist() == expected.take(others).to_pylist()
    engines = len(set(re.findall(r"MapWorker.* pid=(\d+).* KV blocks of", done.stdout + done.stderr)))
    events = report(output)["events"]
    kinds = {event["kind"] for event in events}
    assert {"actor", "restart", "retry", "apart"} <= kinds
    assert any(event["kind"] == "death" and "poisoned" in event["text"] for event in events) is (how == "raise")
    # An engine for every death, one each to end the job's two passes, and one of each that Ray may have started again when it was over.
    assert 2 <= engines - 1 <= deaths + 3


@pytest.mark.long
def test_engines_that_die_whatever_they_run_end_the_job(
    workplace: Path, dataset: Path, chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = workplace / "deadly"
    monkeypatch.setenv(VARIABLE, "raise:the quick")
    settings = [*SLOW, "run.max_engine_deaths=1"]
    done = run(["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *settings], workplace)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: engines die whatever they run: the engine died 1 times on it")
    assert "last: RuntimeError: poisoned" in last
    assert parts(output) == {}


def test_an_actor_that_hangs_is_replaced(
    undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path
) -> None:
    output = workplace / "hung"
    settings = [*SLOW, "run.hang_s=2"]
    job = start(
        ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *settings], workplace
    )
    try:
        wait_for(lambda: len(parts(output)) >= 1, job)
        (actor,) = members(job, "ShardWorker")
        actor.suspend()
        began = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            actor.wait(timeout=60)  # 2 s of silence, a look every second, and a process that kills
        print(f"ended after {time.monotonic() - began:.1f} s")
    finally:
        done = end(job)
    assert done.returncode == 0
    assert f"killed pid {actor.pid} on node" in done.stderr
    assert parts(output) == parts(undisturbed)
