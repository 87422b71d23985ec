"""Jobs one after another on a cluster of this machine that grows from one node to four and shrinks to two in each, under a real Prometheus.

    python bench/soak_cluster.py --minutes 10 --rows 3000 --save soak_cluster_cpu
    python bench/soak_cluster.py --minutes 1 --rows 300 --max-num-seqs 2

Nodes are real raylets; those that go are killed with all that runs on them, in the middle of the job. Every node has one GPU that Ray
believes in, so an engine (on the CPU) comes with each node. After each job: the rows are those of an undisturbed job, in order, and
Prometheus has the totals of its report. Needs Debian's package prometheus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from chaos import arguments, write_rows
from common import ROOT, end_on_sigterm, save

from cluster.local_nodes import LocalNodes, Node
from tests.faults import actors
from tests.prometheus import Prometheus, installed, prometheus

SCALES = (1, 4, 2)
SHARDS = 60
POLL_S = 0.1
SETTLE_S = 120.0  # for what the driver told last to be exported and scraped
LAST_SCRAPES_S = 8.0
COMMITTED = {  # of the report -> of Prometheus
    "rows": "ray_nanovllm_committed_rows_total",
    "error_rows": "ray_nanovllm_committed_error_rows_total",
    "input_tokens": "ray_nanovllm_committed_prompt_tokens_total",
    "generated_tokens": "ray_nanovllm_committed_generated_tokens_total",
}
COMPUTED = {  # by engines, as far as they told before they were killed
    "finished_rows": "ray_nanovllm_finished_rows_total",
    "prompt_tokens": "ray_nanovllm_prompt_tokens_total",
    "generated_tokens": "ray_nanovllm_generated_tokens_total",
    "restarts": "ray_nanovllm_restarts_total",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no further job after so long")
    parser.add_argument("--rows", type=int, default=3000, help="of each job")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="few, so that a job lasts for all its changes")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


class Soak:
    """The cluster and what it is compared with."""

    def __init__(
        self, place: Path, source: Path, nodes: LocalNodes, server: Prometheus, rows: int, max_num_seqs: int
    ) -> None:
        self._place = place
        # Later settings win. One GPU an engine: as many engines as nodes.
        more = ["run.num_cpus=0", "run.num_gpus=1", f"run.replicas=[1,{max(SCALES)}]", "engine.device=cpu"]
        more += [
            f"run.shard_rows={max(1, rows // SHARDS)}",
            "run.shards_in_flight=2",
        ]  # work for engines that come late
        self._arguments = arguments(source, max_num_seqs, more)
        self._nodes = nodes
        self._server = server

    def scale(self, size: int) -> None:
        """Add nodes, or kill the youngest, until there are `size`."""
        while len(self._nodes.nodes) < size:
            self._nodes.add_node(num_cpus=1, num_gpus=1)
        while len(self._nodes.nodes) > size:
            self._nodes.kill_node(self._nodes.nodes[-1])

    def run(self, name: str, scales: tuple[int, ...]) -> tuple[dict[str, Any], pa.Table]:
        """One job from its start to its last row, the cluster changing on the way. What happened, and the output.

        Raises:
            SystemExit: the job failed, or ended before the cluster had all its sizes.
        """
        output = self._place / name
        self.scale(scales[0])
        command = [sys.executable, str(ROOT / "pipelines" / "generate.py"), *self._arguments, "--output", str(output)]
        began = time.monotonic()
        job = subprocess.Popen([*command, "--quiet"], env=self._nodes.environment(), start_new_session=True)
        changes: list[dict[str, Any]] = []
        try:
            for size in scales:
                self.scale(size)
                self._wait(job, lambda size=size: self._engines() == size)  # type: ignore[misc]
                before = len(list(output.glob("part-*")))
                changes.append({"seconds": round(time.monotonic() - began, 1), "nodes": size, "parts": before})
                # Some work with so many engines, before the next change.
                self._wait(job, lambda before=before: len(list(output.glob("part-*"))) > before)  # type: ignore[misc]
            status = job.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        if status:
            raise SystemExit(f"job {name} ended with status {status}")
        report = json.loads((output / "_run" / "report.json").read_text())
        record = {
            "seconds": round(time.monotonic() - began, 1),
            "changes": changes,
            "report": {key: report[key] for key in COMMITTED},
            "prometheus": self._totals(output, report),
        }
        return record, pq.read_table(output)

    def _totals(self, output: Path, report: dict[str, Any]) -> dict[str, float]:
        """What Prometheus has of a job, once it has all rows or will not get them. Killed nodes take what their engines told along."""
        only = f'output="{output}"'
        for name, patience_s in ((COMMITTED["rows"], SETTLE_S), (COMPUTED["finished_rows"], LAST_SCRAPES_S)):
            deadline = time.monotonic() + patience_s
            while self._server.total(name, only) < report["rows"] and time.monotonic() < deadline:
                time.sleep(POLL_S)
        return {key: self._server.total(name, only) for key, name in COMMITTED.items()} | {
            f"computed_{key}": self._server.total(name, only) for key, name in COMPUTED.items()
        }

    def _engines(self) -> int:
        """Engines that are through their constructor."""
        return sum(map(_loaded, self._nodes.nodes))

    def _wait(self, job: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
        while not what():
            if job.poll() is not None:
                raise SystemExit(f"the job ended (status {job.returncode}) before its changes did: give it more --rows")
            time.sleep(POLL_S)


def _loaded(node: Node) -> int:
    count = 0
    for actor in actors(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            count += "__init__" not in " ".join(actor.cmdline())
    return count


def problems(record: dict[str, Any], table: pa.Table, whole: pa.Table, ids: list[int]) -> list[str]:
    """What is not as it should be about a job."""
    found = []
    if table["id"].to_pylist() != ids:
        found.append("the rows are not all there once, in order")
    if not table.equals(whole):
        found.append("the output is not that of the undisturbed job")
    for key, value in record["report"].items():
        if record["prometheus"][key] != value:
            found.append(f"{key}: the report has {value}, Prometheus {record['prometheus'][key]:.0f}")
    return found


def main() -> None:
    args = parse_args()
    end_on_sigterm()
    if not installed():
        raise SystemExit("error: there is no prometheus; install Debian's package")
    began = time.monotonic()
    jobs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        place = Path(directory)
        ids = write_rows(place / "rows.parquet", args.rows)
        with (
            LocalNodes(dashboard=True) as nodes,
            prometheus(nodes.prometheus_targets, place / "prometheus") as server,
        ):
            soak = Soak(place, place / "rows.parquet", nodes, server, args.rows, args.max_num_seqs)
            record, whole = soak.run("undisturbed", (1,))
            bad = problems(record, whole, whole, ids)
            print(json.dumps(record), flush=True)
            while not bad and (not jobs or time.monotonic() - began < 60 * args.minutes):
                record, table = soak.run(f"job{len(jobs)}", SCALES)
                bad = problems(record, table, whole, ids)
                jobs.append(record)
                print(json.dumps(record), flush=True)
            series = server.value('count(count by (__name__) ({__name__=~"ray_nanovllm_.*"}))')
            scraped = server.value('sum(count_over_time(up{job="ray"}[1h]))')
    if bad:
        raise SystemExit("; ".join(bad))
    minutes = (time.monotonic() - began) / 60
    result = {
        "benchmark": "soak_cluster",
        "model": "demo",
        "rows_a_job": args.rows,
        "max_num_seqs": args.max_num_seqs,
        "nodes": SCALES,
        "minutes": round(minutes, 1),
        "jobs": len(jobs),
        "rows": args.rows * len(jobs),
        "rows_lost_or_repeated": 0,
        "jobs_whose_totals_differ": 0,
        "nodes_killed": (SCALES[1] - SCALES[2]) * len(jobs) + (SCALES[2] - SCALES[0]) * (len(jobs) - 1),
        "metric_names": series,
        "scrapes": scraped,
        "records": jobs,
    }
    print(
        f"{len(jobs)} jobs of {args.rows:,} rows in {minutes:.1f} min: rows exact and in order, totals those of the reports"
    )
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
