"""Runs `generate.py` as users do: as a process of its own, with a local Ray, and sometimes with a SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commit import OutputDirectory, read_journal
from pipelines.storage import children, exists, read, resolve
from tests.faults import named

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE = REPOSITORY / "pipelines" / "generate.py"
COUNTED = REPOSITORY / "tests" / "counting.py"  # the same, counting what it computes
T = TypeVar("T")
# A job slow enough to be caught half-way: few sequences at a time, several small shards, frequent flushes.
SLOW = [
    "engine.max_num_seqs=4",
    "engine.kvcache_block_size=16",
    "engine.num_kvcache_blocks=64",
    "sampling.max_tokens=24",
    "sampling.ignore_eos=true",
    "run.shard_rows=60",
    "run.shards_in_flight=2",
    "run.journal_flush_s=0.3",
    "run.progress_s=1",
]


def environment() -> dict[str, str]:
    """The tests' own, with a Ray that starts afresh, tells nobody, and starts no workers before they are asked for."""
    idle = {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
    return {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", **idle}


def start(
    arguments: list[str],
    cwd: Path,
    before: Sequence[str] = (),
    script: Path = GENERATE,
    env: Mapping[str, str] | None = None,
    **more: str,
) -> subprocess.Popen[str]:
    """Start a job in a process group of its own. `cwd` is not the repository: nothing may depend on it.

    `before` is put before the command; `script` is what runs; `env` is its environment, `more` is added to that.
    """
    return subprocess.Popen(
        [*before, sys.executable, str(script), *arguments],
        cwd=cwd,
        env={**(env or environment()), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    arguments: list[str], cwd: Path, timeout: float = 200, before: Sequence[str] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end, and show what it said where a test fails."""
    return end(start(arguments, cwd, before, **more), timeout)


def end(process: subprocess.Popen[str], timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Wait for a job's end, and show what it said where a test fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{out}\n{err}") from None
    print(out, err, sep="\n")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_everything(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and all below it at once (a driver, its Ray and its actors), as a power cut does."""
    family = psutil.Process(process.pid).children(recursive=True)
    for member in [*reversed(family), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=60)


def wait_for(what: Callable[[], T], process: subprocess.Popen[str], timeout: float = 120, every: float = 0.05) -> T:
    """Wait for a state of a running job: until `what`, asked `every` so many seconds, returns something true, which is returned."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert process.poll() is None, f"the job ended first: {process.communicate()}"
        assert time.monotonic() < deadline, "the job never came so far"
        time.sleep(every)
    return found


def suspend_when(
    what: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 120
) -> list[psutil.Process]:
    """Suspend a job's workers at a moment when `what` holds, and return them. They stand still while it is asked."""
    deadline = time.monotonic() + timeout
    while True:
        workers = members(process, "ShardWorker")
        for worker in workers:
            worker.suspend()
        if workers and what():
            return workers
        for worker in workers:
            worker.resume()
        assert process.poll() is None, f"the job ended first: {process.communicate()}"
        assert time.monotonic() < deadline, "the job never came so far"
        time.sleep(0.1)


def report(output: Path | str) -> dict[str, Any]:
    """`_run/report.json`."""
    loaded: dict[str, Any] = json.loads(read(OutputDirectory(str(output)).run.child("report.json")))
    return loaded


def parts(output: Path | str) -> dict[str, bytes]:
    """Content of the committed files by name, wherever they are."""
    place = resolve(str(output))
    names = [entry.base_name for entry in children(place) if entry.base_name.startswith("part-")]
    return {name: read(place.child(name)) for name in names}


def journalled_rows(output: Path | str) -> int:
    """Rows in the journals of shards that are not committed."""
    place = OutputDirectory(str(output))
    if not exists(place.run.child("plan.parquet")):
        return 0
    committed = place.committed()
    journals = (read_journal(place.journal(s.index), s.rows) for s in place.shards() if s.index not in committed)
    return sum(len(rows) for rows in journals)


def leases(output: Path) -> list[Path]:
    """Claims on the output."""
    return list((output / "_run").glob("lease-*"))


def members(process: subprocess.Popen[Any], what: str) -> list[psutil.Process]:
    """Processes of this name below a job."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return named(what, psutil.Process(process.pid).children(recursive=True))
    return []


def table_of(output: Path) -> pa.Table:
    """The output as users read it."""
    return pq.read_table(output)


def write_prompts(directory: Path, files: Mapping[str, int], **writer: Any) -> int:
    """Files of so many rows with columns id, prompt, and extra columns of awkward types. Returns the number of rows."""
    directory.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, rows in files.items():
        numbers = list(range(first, first + rows))
        table = pa.table(
            {
                "id": numbers,
                "prompt": [f"the quick brown fox {number}" for number in numbers],
                "tags": pa.array([["a"] * (number % 3) for number in numbers], pa.list_(pa.string())),
                "kind": pa.array([f"k{number % 4}" for number in numbers]).dictionary_encode(),
                "where": pa.array([{"x": number, "y": None} for number in numbers]),
            }
        )
        pq.write_table(table, directory / name, **writer)
        first += rows
    return first
