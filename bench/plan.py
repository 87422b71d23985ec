"""Seconds and driver memory of planning: many small files, one long file, and a billion rows. Starts no Ray and no engine.

`python bench/plan.py --save plan_cpu`. Every case runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import save

from pipelines.columns import output_columns
from pipelines.commit import OutputDirectory
from pipelines.generate import Job, check
from pipelines.inputs import FileFacts, InputFile, RowRange, list_dataset, measure, read_rows
from pipelines.job import JobConfig, build
from pipelines.plan import identity, make_shards
from pipelines.routing import Work

SCHEMA = pa.schema([("id", pa.int64()), ("prompt", pa.string())])


class Clock:
    """Seconds of each step, and the process's memory before the first."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {"rss_mib_before": peak_mib()}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` and note its seconds as `NAME_s`."""
        start = time.perf_counter()
        value = work()
        self.result[f"{name}_s"] = round(time.perf_counter() - start, 3)
        return value


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def job_config(source: Path | str, output: Path) -> JobConfig:
    return build({"model": "no-model", "input": str(source), "output": str(output)})


def begin_and_resume(clock: Clock, config: JobConfig, job: Job, with_parts: bool) -> None:
    """Store the plan, then what a second start does up to the point where the pool would start."""
    output = OutputDirectory(config.output)
    clock.step(
        "store", lambda: output.create(job.identity, job.dataset.format, job.schema, job.shards, job.dataset.files)
    )
    for name in ("plan.parquet", "input.parquet", "job.json"):
        clock.result[f"{name}_kib"] = os.path.getsize(Path(config.output) / "_run" / name) >> 10
    clock.step("load", output.shards)
    if not with_parts:
        return
    for shard in job.shards[
        : len(job.shards) // 2
    ]:  # half of the job is done; what is in the files does not count here
        Path(output.part(shard.index).path).touch()
    again = clock.step("resume_check", lambda: check(config, OutputDirectory(config.output)))
    left = clock.step("resume_pending", Work(again.stage, again.shards, output).left)
    assert len(left) == len(job.shards) - len(job.shards) // 2
    clock.result["resume_s"] = round(clock.result["resume_check_s"] + clock.result["resume_pending_s"], 3)


def small_files(root: Path, count: int) -> dict[str, Any]:
    """`count` Parquet files of 10 rows, 1,000 a directory."""
    source = root / "in"
    table = pa.table({"id": range(10), "prompt": ["the quick brown fox"] * 10}, schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    for number in range(count):
        directory = source / f"{number // 1000:04d}"
        if number % 1000 == 0:
            directory.mkdir(parents=True)
        (directory / f"{number:07d}.parquet").write_bytes(data)
    config = job_config(source, root / "out")
    clock = Clock()
    dataset = clock.step("list", lambda: list_dataset(config.input))
    schema, facts = clock.step("footers", lambda: measure(dataset))
    shards = clock.step("plan", lambda: make_shards(config, dataset.files, facts))
    now = clock.step("identity", lambda: identity(config, dataset))
    job = Job(config, dataset, now, schema, output_columns(config), shards, None)
    begin_and_resume(clock, config, job, with_parts=True)
    return {"files": count, "rows": count * 10, "shards": len(shards), **clock.result}


def one_file(root: Path, rows: int) -> dict[str, Any]:
    """One file of `rows` rows in row groups of a million."""
    path = root / "in.parquet"
    prompts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000_000, np.int32)), ["the quick brown fox"])
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, rows, 1_000_000):
            ids = pa.array(np.arange(start, start + 1_000_000))
            writer.write_table(pa.table([ids, prompts.cast(pa.string())], schema=SCHEMA), row_group_size=1_000_000)
    config = job_config(path, root / "out")
    clock = Clock()
    job = clock.step("check", lambda: check(config, OutputDirectory(config.output)))
    begin_and_resume(clock, config, job, with_parts=False)
    last = job.shards[-1]
    middle = RowRange(last.file, rows // 2 + 499_000, 1000, 0, 0)
    for name, wanted in {
        "read_first": job.shards[0].row_range,
        "read_middle": middle,
        "read_last": last.row_range,
    }.items():
        table = clock.step(name, lambda wanted=wanted: read_rows(job.dataset.root, "parquet", wanted, job.schema))
        assert table["id"].to_pylist() == list(range(wanted.first_row, wanted.first_row + wanted.rows))
    sizes = {"rows": rows, "file_kib": path.stat().st_size >> 10, "shards": len(job.shards)}
    return {**sizes, **clock.result}


def billion(root: Path, files: int) -> dict[str, Any]:
    """`files` files of 100,000 rows in ten row groups each, made in memory: nothing is listed or read."""
    listed = [
        InputFile(f"part={n % 100}/{n:06d}.parquet", 50_000_000 + n, 1_700_000_000_000_000_000 + n)
        for n in range(files)
    ]
    ends = np.arange(10_000, 100_001, 10_000)
    facts = [FileFacts(SCHEMA, ends.copy(), None, 100_000_000) for _ in range(files)]
    config = job_config("in", root / "out")
    clock = Clock()
    shards = clock.step("plan", lambda: make_shards(config, listed, facts))
    dataset = list_dataset(str(_any_file(root)))._replace(files=listed)
    now = clock.step("identity", lambda: identity(config, dataset))
    begin_and_resume(clock, config, Job(config, dataset, now, SCHEMA, shards, None), with_parts=False)
    sizes = {"files": files, "rows": files * 100_000, "shards": len(shards), "most_rows": max(s.rows for s in shards)}
    return {**sizes, **clock.result}


def _any_file(root: Path) -> Path:
    pq.write_table(SCHEMA.empty_table(), root / "x.parquet")
    return root / "x.parquet"


CASES: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
    "small_files": (small_files, 100_000),
    "one_file": (one_file, 10_000_000),
    "billion": (billion, 10_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="run this one in this process and print its result as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the size of every case")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    if args.case:
        run, size = CASES[args.case]
        with tempfile.TemporaryDirectory() as directory:
            result = run(Path(directory), max(1, int(size * args.scale)))
        print(json.dumps({"case": args.case, **result, "peak_rss_mib": peak_mib()}))
        return
    cases = []
    for name in CASES:
        command = [sys.executable, __file__, "--case", name, "--scale", str(args.scale)]
        line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        print(line, flush=True)
        cases.append(json.loads(line))
    if args.save:
        print(save(args.save, {"benchmark": "plan", "cases": cases}))


if __name__ == "__main__":
    main()
