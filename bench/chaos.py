"""Random kills of actors, drivers, nodes and everything over a job with the demo model: rows lost, duplicated and computed again.

    python bench/chaos.py --kills 200 --rows 20000 --save chaos_cpu
    python bench/chaos.py --kills 200 --rows 20000 --peer ray --limit-minutes 30 --save chaos_peer_ray_cpu
    python bench/chaos.py --minutes 60 --kills 50 --rows 5000 --seed 7

The cluster is a head and two nodes on this machine. A kill strikes 0.5 to 1.5 intervals after the one before it, and not before
the job has made at least one row durable since then (ours: committed or journalled; Ray Data: in its checkpoints); the same
rule, seed and weights for both. `--limit-minutes` caps each play. `--minutes` repeats the play with the next seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, end_on_sigterm, run_process, save

from cluster.local_nodes import LocalNodes
from tests.chaos import WEIGHTS, GenerateJob, Job, Schedule, play

DEMO = ROOT / "pipelines" / "demo"
SHARD_ROWS = 100
FLUSH_S = 0.5
ENGINE = {"max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 256, "dtype": "float32"}
SAMPLING = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}  # longer than the answers, so that the job lasts
PEER_CPUS = 4  # read and write tasks want a CPU each beside the actors'
KINDS = ("actor", "node", "driver", "everything")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=float, default=3.0, help="mean seconds between kills")
    parser.add_argument("--max-num-seqs", type=int, default=2, help="few, so that the job lasts for all kills")
    parser.add_argument("--kinds", nargs="+", choices=sorted([*WEIGHTS, "suspend"]), default=list(KINDS))
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="more settings of our job")
    parser.add_argument("--minutes", type=float, default=0.0, help="repeat with the next seeds for so long")
    parser.add_argument("--limit-minutes", type=float, default=60.0, help="end a play that is not done by then")
    parser.add_argument("--peer", choices=["ray"], help="kill plain Ray Data with its checkpoints instead")
    parser.add_argument("--log", type=Path, default=Path("chaos.log"), help="progress, a line for each kill")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def write_rows(path: Path, rows: int) -> list[int]:
    """The demo's prompts over and over, with ids from 0. Returns the ids."""
    demo = pq.read_table(DEMO / "prompts.parquet")
    table = demo.take([number % demo.num_rows for number in range(rows)])
    ids = list(range(rows))
    table = table.set_column(table.column_names.index("id"), "id", pa.array(ids, pa.int64()))
    pq.write_table(table, path, row_group_size=SHARD_ROWS)
    return ids


def arguments(source: Path, max_num_seqs: int, more: list[str]) -> list[str]:
    """Of our job, but for the output."""
    settings = {f"engine.{name}": value for name, value in ENGINE.items()}
    settings |= {f"sampling.{name}": json.dumps(value) for name, value in SAMPLING.items()}
    settings |= {"engine.max_num_seqs": max_num_seqs, "run.replicas": 2, "run.num_cpus": 1}
    settings |= {"run.shard_rows": SHARD_ROWS, "run.journal_flush_s": FLUSH_S, "run.progress_s": 10}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    return ["--model", str(DEMO / "model"), "--input", str(source), *overrides, *more]


def undisturbed(place: Path, source: Path, more: list[str]) -> pa.Table:
    """The output of a job that nothing is done to."""
    output = place / "undisturbed"
    command = [sys.executable, str(ROOT / "pipelines" / "generate.py"), *arguments(source, 32, more)]
    with LocalNodes() as nodes:
        nodes.add_node(num_cpus=2)
        status = run_process([*command, "--output", str(output)], None, nodes.environment())
    if status:
        raise SystemExit("the undisturbed job failed")
    return pq.read_table(output)


class RayDataJob(Job):
    """Plain Ray Data, started again by the same driver program."""

    def __init__(self, place: Path, source: Path, rows: int, max_num_seqs: int) -> None:
        self.output, self.counts, self._checkpoints = place / "output", place / "counts", place / "checkpoints"
        settings: dict[str, Any] = {"model": str(DEMO / "model"), "sampling_params": SAMPLING, **ENGINE}
        settings["max_num_seqs"] = max_num_seqs
        paths = map(str, (source, self.output, self._checkpoints, self.counts))
        script = str(ROOT / "bench" / "ray_data_job.py")
        self._command = [sys.executable, script, *paths, str(max(1, rows // SHARD_ROWS)), json.dumps(settings)]

    def command(self) -> list[str]:
        """See `Job.command`."""
        return self._command

    def durable_rows(self) -> int:
        """Rows in the checkpoints."""
        return sum(self._rows(path) for path in self._checkpoints.rglob("*.parquet"))

    @staticmethod
    def _rows(path: Path) -> int:
        with contextlib.suppress(OSError, pa.ArrowInvalid):  # half written, or moved meanwhile
            return int(pq.read_metadata(path).num_rows)
        return 0

    def result(self) -> pa.Table:
        """Rows of all files that can be read, by id."""
        tables = []
        for path in sorted(self.output.rglob("*.parquet")):
            try:
                tables.append(pq.ParquetFile(path).read())
            except (OSError, pa.ArrowInvalid) as error:
                print(f"unreadable output file {path.name}: {error}", flush=True)
        if not tables:
            return pa.table({"id": pa.array([], pa.int64()), "error": pa.array([], pa.string())})
        return pa.concat_tables(tables).sort_by("id")


def main() -> None:
    args = parse_args()
    end_on_sigterm()
    began = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)
        with args.log.open("a") as log:
            log.write(line + "\n")

    result: dict[str, Any] = {"benchmark": "chaos", "job": args.peer or "generate.py", "model": "demo"}
    result |= {"kinds": args.kinds, "interval_s": args.interval, "max_num_seqs": args.max_num_seqs, "plays": []}
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        source = Path(directory) / "rows.parquet"
        ids = write_rows(source, args.rows)
        whole = undisturbed(Path(directory), source, args.set)
        say(f"undisturbed: {whole.num_rows} rows after {time.monotonic() - began:.0f} s")
        while not result["plays"] or time.monotonic() - began < 60 * args.minutes:
            seed = args.seed + len(result["plays"])
            place = Path(directory) / f"play{seed}"
            job: Job
            if args.peer:
                job = RayDataJob(place, source, args.rows, args.max_num_seqs)
            else:
                job = GenerateJob(place, arguments(source, args.max_num_seqs, args.set))
            weights = {kind: WEIGHTS.get(kind, 1.0) for kind in args.kinds}
            schedule = Schedule(seed, args.kills, args.interval, weights, 60 * args.limit_minutes)
            record = play(job, schedule, ids, whole, PEER_CPUS, say)
            result["plays"].append({"seed": seed, **record.as_dict()})
            say(json.dumps(result["plays"][-1], indent=1))
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
