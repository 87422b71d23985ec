"""The chaos driver: runs a job on a cluster to its end while faults strike at random, and sums up what they cost.

    record = play(GenerateJob(place, arguments), Schedule(seed=1, faults=200, interval_s=4))

The job's driver is started again whenever it has died. A fault strikes a random time (half to one and a half intervals) after
the one before it, and not before the job has made at least one row durable since then: so every job that keeps anything
over a kill comes to its end, on whatever machine, and one that keeps nothing is stopped by its time limit.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.local_nodes import LocalNodes, kill
from tests.counting import computed
from tests.faults import actors, kept_rows, ranks, suspend

REPOSITORY = Path(__file__).resolve().parent.parent
# How often each fault is drawn. `suspend` needs a job that notices a hanging engine (run.hang_s); see `Schedule.weights`.
WEIGHTS = {"actor": 6.0, "rank": 2.0, "node": 2.0, "driver": 2.0, "stop": 1.0, "everything": 1.0}
POLL_S = 0.1
NODES = 2
# A driver that keeps ending by itself, with nothing done in between, ends the play.
MOST_FAILURES = 5


class Job(ABC):
    """A job that the chaos driver can run: ours, or the one it is compared with."""

    output: Path
    counts: Path

    @abstractmethod
    def command(self) -> list[str]:
        """What starts the driver, the first time and after every death."""

    @abstractmethod
    def durable_rows(self) -> int:
        """Rows that no kill can take any more."""

    @abstractmethod
    def result(self) -> pa.Table:
        """The output so far, in input order where the job keeps it."""


class GenerateJob(Job):
    """`generate.py`, with engines that count."""

    def __init__(self, place: Path, arguments: Sequence[str]) -> None:
        self.output, self.counts = place / "output", place / "counts"
        script = str(REPOSITORY / "tests" / "counting.py")
        self._command = [sys.executable, script, str(self.counts), *arguments, "--output", str(self.output)]

    def command(self) -> list[str]:
        return self._command

    def durable_rows(self) -> int:
        return len(kept_rows(self.output))

    def result(self) -> pa.Table:
        return pq.read_table(self.output)


@dataclass(frozen=True)
class Schedule:
    """Which faults strike and when.

    Attributes:
        seed: of the kinds of faults, of their victims and of the times between them.
        faults: how many are played, if the job lasts so long; it then runs to its end undisturbed.
        interval_s: mean time between two faults.
        weights: how often each kind is drawn; kinds that find no victim are drawn again.
        limit_s: the play ends after so long, finished or not.
    """

    seed: int
    faults: int
    interval_s: float
    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    limit_s: float = 3600.0


@dataclass
class Record:
    """What a play was and what it cost.

    Attributes:
        finished: the job came to its end.
        faults: how many of each kind were played.
        starts: of the driver.
        failures: drivers that ended with an error without being struck.
        rows: in the input.
        lost, duplicated: input rows that the output lacks, and output rows beyond the first of each.
        identical: the output is the undisturbed one, row by row; None where it was not compared.
        computed_rows, computed_tokens: by all engines together, in rows that came to their end.
        recomputed_rows: computed rows beyond the rows of the output.
        seconds: from the first start to the end.
    """

    finished: bool = False
    faults: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    failures: int = 0
    rows: int = 0
    lost: int = 0
    duplicated: int = 0
    identical: bool | None = None
    computed_rows: int = 0
    computed_tokens: int = 0
    recomputed_rows: int = 0
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """Faults played."""
        return sum(self.faults.values())

    def as_dict(self) -> dict[str, Any]:
        """The record for a result file."""
        per_kill = round(self.recomputed_rows / max(1, self.kills), 2)
        return {**asdict(self), "kills": self.kills, "recomputed_rows_per_kill": per_kill}


def play(
    job: Job,
    schedule: Schedule,
    ids: Sequence[int],
    undisturbed: pa.Table | None = None,
    node_cpus: int = 2,
    say: Callable[[str], None] = print,
) -> Record:
    """Run a job to its end under the faults of a schedule.

    Args:
        job: not started yet.
        schedule: of the faults.
        ids: the input's column `id`, in input order.
        undisturbed: output to compare with, where there is one.
        node_cpus: CPUs of each of the two nodes.
        say: is told what happens, a line at a time.
    """
    with LocalNodes() as nodes:
        for _ in range(NODES):
            nodes.add_node(num_cpus=node_cpus)
        player = _Player(job, schedule, nodes, node_cpus, say)
        try:
            player.play()
        finally:
            player.end_driver()
    return player.sum_up(ids, undisturbed)


class _Player:
    def __init__(
        self, job: Job, schedule: Schedule, nodes: LocalNodes, node_cpus: int, say: Callable[[str], None]
    ) -> None:
        self._job = job
        self._schedule = schedule
        self._nodes = nodes
        self._node_cpus = node_cpus
        self._say = say
        self._random = random.Random(schedule.seed)
        self._record = Record()
        self._faults: Counter[str] = Counter()
        self._driver: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._log = job.output.parent / "driver.log"

    def play(self) -> None:
        """Until the job has finished, or the time is up."""
        left, due, durable, failures = self._schedule.faults, self._due(), 0, 0
        self._start_driver()
        while time.monotonic() - self._began < self._schedule.limit_s:
            time.sleep(POLL_S)
            assert self._driver is not None
            status = self._driver.poll()
            if status == 0:
                self._record.finished = True
                return
            if status is not None:
                failures += 1
                self._record.failures += 1
                self._say(f"driver ended by itself with status {status}: {self._last_words()}")
                if failures == MOST_FAILURES:
                    return
                self._start_driver()
            elif left and time.monotonic() > due and (now := self._job.durable_rows()) > durable:
                kind = self._strike()
                if kind is None:
                    continue
                left, failures = left - 1, 0
                self._faults[kind] += 1
                durable, due = max(now, self._job.durable_rows()), self._due()
                self._say(
                    f"{time.monotonic() - self._began:7.1f} s  {kind}, {durable} rows durable, {left} faults left"
                )
        self._say(f"the time is up; the driver's last words: {self._last_words()}")

    def _due(self) -> float:
        return time.monotonic() + self._schedule.interval_s * self._random.uniform(0.5, 1.5)

    def _start_driver(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                self._job.command(),
                cwd=self._log.parent,
                env=self._nodes.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._record.starts += 1

    def _last_words(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-5:])

    def end_driver(self) -> None:
        """SIGKILL the driver and what it started itself."""
        if self._driver is None:
            return
        if self._driver.poll() is None:
            process = psutil.Process(self._driver.pid)
            kill([*process.children(recursive=True), process])
        self._driver.wait()

    def _strike(self) -> str | None:
        """Play one fault that finds a victim; None where none of those drawn does at this moment."""
        weights = self._schedule.weights
        kind = self._random.choices(list(weights), list(weights.values()))[0]
        return kind if getattr(self, f"_strike_{kind}")() else None

    def _strike_one(self, victims: list[psutil.Process]) -> bool:
        if not victims:
            return False
        kill([self._random.choice(victims)])
        return True

    def _strike_actor(self) -> bool:
        return self._strike_one(actors(self._nodes))

    def _strike_rank(self) -> bool:
        return self._strike_one(ranks(self._nodes))

    def _strike_suspend(self) -> bool:
        """Suspend an actor for good: the job has to notice."""
        victims = [actor for actor in actors(self._nodes) if actor.status() != psutil.STATUS_STOPPED]
        if not victims:
            return False
        suspend(self._random.choice(victims))
        return True

    def _strike_node(self) -> bool:
        self._nodes.kill_node(self._random.choice(self._nodes.nodes))
        self._nodes.add_node(num_cpus=self._node_cpus)
        return True

    def _strike_driver(self) -> bool:
        self.end_driver()
        self._start_driver()
        return True

    def _strike_stop(self) -> bool:
        assert self._driver is not None
        self._driver.send_signal(signal.SIGTERM)
        try:
            self._driver.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._say("the driver does not end on SIGTERM")
        self._strike_driver()
        return True

    def _strike_everything(self) -> bool:
        self.end_driver()
        self._nodes.kill_head()
        self._nodes.start_head()
        for _ in range(NODES):
            self._nodes.add_node(num_cpus=self._node_cpus)
        self._start_driver()
        return True

    def sum_up(self, ids: Sequence[int], undisturbed: pa.Table | None) -> Record:
        record = self._record
        record.seconds = round(time.monotonic() - self._began, 1)
        record.faults = dict(sorted(self._faults.items()))
        result = self._job.result()
        found = Counter(result["id"].to_pylist())
        record.rows = len(ids)
        record.lost = sum(number not in found for number in ids)
        record.duplicated = result.num_rows - len(found)
        if undisturbed is not None:
            record.identical = bool(result.equals(undisturbed))
        done = computed(self._job.counts)
        record.computed_rows, record.computed_tokens = done.rows.total(), done.tokens
        finished = sum(error is None for error in result["error"].to_pylist())
        record.recomputed_rows = record.computed_rows - finished
        return record
