"""What dies, dies for real: actors, ranks, nodes, drivers and heads of a cluster, by SIGKILL. The job ends the same.

How many rows a kill costs is counted exactly: the engines note every row they compute in files of their own, and what is
neither committed nor journalled when a process dies is what may be computed again, no more.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.local_nodes import LocalNodes, alive, kill, wait_gone
from tests.counting import Computed, computed
from tests.faults import actors, kept_rows, members, ranks, suspend
from tests.integration.jobs import COUNTED, SLOW, journalled_rows, leases, parts, report, start, table_of, wait_for

ROWS = 240
ERRORS = 2
LIMIT_S = 200.0
# Two actors would be done with SLOW before anything can strike: blocks for about one sequence at a time.
SETTINGS = [*SLOW, "run.replicas=2", "run.num_cpus=1", "engine.num_kvcache_blocks=4"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalNodes]:
    """A head without CPUs and two nodes with two each."""
    with LocalNodes() as nodes:
        nodes.add_node(num_cpus=2)
        nodes.add_node(num_cpus=2)
        yield nodes
        family = members(nodes)
    assert alive(family) == []


class Job:
    """A job on the cluster that counts what it computes; started as often as need be."""

    def __init__(self, nodes: LocalNodes, place: Path, arguments: list[str]) -> None:
        self.nodes = nodes
        self.place = place
        self.output = place / "output"
        self.counts = place / "counts"
        self.arguments = [str(self.counts), *arguments, "--output", str(self.output)]

    def start(self) -> subprocess.Popen[str]:
        return start(self.arguments, self.place, script=COUNTED, env=self.nodes.environment())

    def end(self, process: subprocess.Popen[str]) -> str:
        """Wait for the end of a job that finishes; what it printed."""
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()
        assert process.returncode == 0, out + err
        return out

    def computed(self, pid: int | None = None) -> Computed:
        return computed(self.counts, pid)

    def unkept(self, pid: int | None = None) -> set[int]:
        """Rows that are computed (by one actor), and kept nowhere if everything died now."""
        done = set(self.computed(pid).rows)
        return done - kept_rows(self.output)

    def actor_with_unkept_rows(self) -> psutil.Process | None:
        """One that a kill now costs some rows, half-way through the job."""
        if not self.is_half_way():
            return None
        return next((actor for actor in actors(self.nodes) if len(self.unkept(actor.pid)) >= 3), None)

    def is_half_way(self) -> bool:
        """Some rows are committed. That some are journalled too lasts too short a time to wait for."""
        return len(parts(self.output)) >= 1


@pytest.fixture
def job(nodes: LocalNodes, dataset: Path, chat_model_dir: Path, tmp_path: Path) -> Job:
    return Job(nodes, tmp_path, ["--model", str(chat_model_dir), "--input", str(dataset), *SETTINGS])


def check(job: Job, undisturbed: Path, lost: set[int], kills: int = 1) -> None:
    """The output is the undisturbed one, and `lost` and nothing else was computed again."""
    assert parts(job.output) == parts(undisturbed)
    assert table_of(job.output)["id"].to_pylist() == list(range(ROWS))
    assert (job.output / "_SUCCESS").exists()
    assert leases(job.output) == []
    done = job.computed()
    print(
        f"{done.rows.total()} rows computed, {done.repeated.total()} of them again: {kills} kills, {len(lost)} rows lost"
    )
    assert len(done.rows) == ROWS - ERRORS
    assert set(done.repeated) == lost
    assert done.repeated.total() <= kills * len(lost)


def kill_actors(job: Job, victims: list[psutil.Process], strike: list[psutil.Process] | None = None) -> set[int]:
    """Suspend actors, look at which of the rows that they computed are kept nowhere, and kill them: those rows."""
    for victim in victims:
        suspend(victim)
    done = {seed for victim in victims for seed in job.computed(victim.pid).rows}
    lost = done - kept_rows(job.output)
    kill(strike or victims)
    return lost


def test_an_actor_is_killed(job: Job, undisturbed: Path) -> None:
    job.arguments += ["run.journal_flush_s=2"]
    process = job.start()
    victim = wait_for(job.actor_with_unkept_rows, process)
    lost = kill_actors(job, [victim])
    job.end(process)
    check(job, undisturbed, lost)


def test_a_rank_is_killed(job: Job, undisturbed: Path) -> None:
    """Its actor sees the engine die, and journals what is finished before it ends: nothing is computed again."""
    job.arguments += ["engine.tensor_parallel_size=2", "run.replicas=1", "run.journal_flush_s=1000"]
    job.arguments += ["engine.num_kvcache_blocks=64"]  # two ranks are slow enough
    process = job.start()
    wait_for(lambda: len(job.unkept()) >= 10, process)
    before = ranks(job.nodes)
    assert len(before) == 2
    kill(before[1:])
    wait_for(lambda: len(ranks(job.nodes)) == 2 and before[0] not in ranks(job.nodes), process)
    job.end(process)
    check(job, undisturbed, set())


def test_a_node_is_killed(job: Job, undisturbed: Path) -> None:
    job.arguments += ["run.journal_flush_s=2"]
    process = job.start()
    victim = wait_for(job.actor_with_unkept_rows, process)
    node = next(node for node in job.nodes.nodes if victim in actors(node))
    victims = actors(node)
    lost = kill_actors(job, victims, node.members())
    job.nodes.kill_node(node)
    job.nodes.add_node(num_cpus=2)
    job.end(process)
    check(job, undisturbed, lost)


def test_the_driver_is_killed(job: Job, undisturbed: Path) -> None:
    """Its Ray job ends on the cluster, and the next start takes over at once: the dead one ran on the same machine."""
    job.arguments += ["run.lease_s=1000"]
    process = job.start()
    wait_for(job.is_half_way, process)
    workers = actors(job.nodes)
    assert workers
    process.kill()
    process.communicate(timeout=60)
    assert wait_gone(workers, 60) == []
    assert actors(job.nodes) == []
    lost = job.unkept()
    committed, journalled = table_of(job.output).num_rows, journalled_rows(job.output)
    assert "taking over from" in job.end(job.start())
    check(job, undisturbed, lost)
    now = report(job.output)["this_start"]
    assert (now["resumed_rows"], now["reused_rows"]) == (committed, journalled)


def test_the_driver_is_stopped_and_the_head_replaced(job: Job, undisturbed: Path) -> None:
    job.arguments += ["run.journal_flush_s=1000"]  # no flush but the one that the signal causes
    process = job.start()
    wait_for(lambda: job.is_half_way() and len(job.unkept()) >= 10, process)
    assert journalled_rows(job.output) == 0
    workers = actors(job.nodes)
    done = set(job.computed().rows)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "error: stopped; start the same command again to go on"
    assert leases(job.output) == []
    assert wait_gone(workers, 60) == []
    assert done <= kept_rows(job.output)  # what was finished when the signal came
    lost = job.unkept()

    job.nodes.kill_head()
    job.nodes.start_head()
    job.nodes.add_node(num_cpus=2)
    job.nodes.add_node(num_cpus=2)
    began = time.monotonic()
    assert "resuming:" in job.end(job.start())
    print(f"the second start took {time.monotonic() - began:.1f} s")
    check(job, undisturbed, lost)
