"""Progress of a job: a Ray actor that workers report to, and the lines the driver prints from it."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

WINDOW_S = 60.0  # rates and the ETA look back this far
GAP_S = 5.0  # between calls of the board, from which on it was not running
ALIVE_S = 5.0  # a worker that was not heard of for so long is not counted among those that live
STALE_S = 20.0  # a worker that was not heard of for so long is gone, and its unfinished rows with it


class WorkerState(NamedTuple):
    """What a worker reports about itself every second.

    Attributes:
        finished_rows: rows finished in shards that are not committed yet.
        input_tokens, generated_tokens, cached_tokens: computed by its engine since it started.
        running, waiting: requests in its engine.
        kv_usage: part of the KV pool in use, 0 to 1.
        flushed: it was told to stop and has flushed its journals.
        stalled_s: seconds since its engine last ended a step, where it has work.
        node, pid, birth: its process: id of the Ray node, process id there, and when it began.
        actor, host: id of its Ray actor, which stays over restarts, and name of its machine.
        gpu, gpus: name of its GPU, and how many of them it holds.
        up_s, load_s: seconds since it began to load its engine, and those until that was ready.
        error_rows: of `finished_rows`.
        restarted: its actor took the place of one that died.
    """

    finished_rows: int
    input_tokens: int
    generated_tokens: int
    cached_tokens: int
    running: int
    waiting: int
    kv_usage: float
    flushed: bool
    stalled_s: float
    node: str
    pid: int
    birth: str | None
    actor: str = ""
    host: str = ""
    gpu: str = ""
    gpus: float = 0.0
    up_s: float = 0.0
    load_s: float = 0.0
    error_rows: int = 0
    restarted: bool = False


class Word(NamedTuple):
    """What a worker says once: `when` by the board's clock, its process as in `WorkerState`, and what is to be told."""

    when: float
    node: str
    pid: int
    birth: str | None
    text: str


def alive(workers: Iterable[tuple[float, WorkerState]]) -> int:
    """How many of these were heard of lately."""
    return sum(age < ALIVE_S for age, _ in workers)


class ProgressBoard:
    """Collects what workers report. Run as a Ray actor; every call is short, and the driver makes one every second."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[float, WorkerState]] = {}
        self._words: list[Word] = []
        self._stopping = False
        self._called = time.monotonic()

    def report(self, worker: str, state: WorkerState) -> bool:
        """Note a worker's state; tells it whether to flush its journals because the job stops."""
        self._states[worker] = (self._now(), state)
        return self._stopping

    def read(self) -> list[tuple[float, WorkerState]]:
        """Age in seconds and state of every worker that ever reported."""
        now = self._now()
        return [(now - when, state) for when, state in self._states.values()]

    def last_words(self, node: str, pid: int, birth: str | None, text: str) -> None:
        """Note why the engine of a process has died; the process is about to end."""
        self._words.append(Word(time.monotonic(), node, pid, birth, text[:1000]))

    def words(self, known: int) -> list[tuple[float, Word]]:
        """Words after the first `known` ones, with their age in seconds. A board that began anew knows fewer, and tells them all."""
        now = time.monotonic()
        return [(now - word.when, word) for word in self._words[known if known <= len(self._words) else 0 :]]

    def _now(self) -> float:
        """The time. Where nobody called for long this process was suspended, and no worker grows older by that."""
        now = time.monotonic()
        gap, self._called = now - self._called, now
        if gap > GAP_S:
            self._states = {worker: (when + gap, state) for worker, (when, state) in self._states.items()}
        return now

    def stop(self) -> None:
        """Ask every worker to flush its journals."""
        self._stopping = True


class Sample(NamedTuple):
    """The job at one moment, `seconds` after this start began. Tokens are those since then; cached ones are of the input."""

    seconds: float
    rows: int
    input_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    kv_usage: float
    cached_tokens: int = 0


class Progress:
    """Samples of a running job, their rates, and the line that shows them."""

    def __init__(
        self,
        total_rows: int,
        committed_rows: int,
        every_s: float,
        stream: IO[str] | None = None,
        quiet: bool = False,
    ) -> None:
        self.total_rows = total_rows
        self.committed_rows = committed_rows
        self.committed_errors = 0  # rows with an error, of those that this start committed
        self.samples: list[Sample] = []
        self._recent: deque[Sample] = deque()
        self._start = time.monotonic()
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty() and not quiet
        self._every_s = 1.0 if self._terminal else every_s
        self._next_line = math.inf if quiet else 0.0
        self._heard = False
        self._errors = self._engines = 0
        self._step_s = 1.0

    @property
    def seconds(self) -> float:
        """Seconds since this start began to run."""
        return time.monotonic() - self._start

    def sample(self, workers: list[tuple[float, WorkerState]]) -> Sample:
        """Add up what workers report, and print a line when one is due."""
        recent = [state for age, state in workers if age < STALE_S]
        states = [state for _, state in workers]
        self._heard = self._heard or bool(workers)
        self._engines = alive(workers)
        self._errors = max(self._errors, self.committed_errors + sum(state.error_rows for state in recent))
        # A shard leaves its worker's count a moment before the driver hears of it; rows done never go back for that.
        done = self.committed_rows + sum(state.finished_rows for state in recent)
        before = self._recent[-1].rows if self._recent else 0
        now = Sample(
            seconds=round(self.seconds, 2),
            rows=max(before, min(self.total_rows, done)),
            input_tokens=sum(state.input_tokens for state in states),
            generated_tokens=sum(state.generated_tokens for state in states),
            running=sum(state.running for state in recent),
            waiting=sum(state.waiting for state in recent),
            kv_usage=round(sum(state.kv_usage for state in recent) / len(recent), 4) if recent else 0.0,
            cached_tokens=sum(state.cached_tokens for state in states),
        )
        self._recent.append(now)
        while now.seconds - self._recent[0].seconds > WINDOW_S:
            self._recent.popleft()
        if not self.samples or now.seconds - self.samples[-1].seconds >= self._step_s:
            self.samples.append(now)
        if len(self.samples) > 1000:  # a long job keeps a coarser curve, not a longer one
            self.samples = self.samples[::2]
            self._step_s *= 2
        if now.seconds >= self._next_line:
            self._next_line = now.seconds + self._every_s
            self._print(self.line())
        return now

    def line(self) -> str:
        """Rows done, tokens a second over the last minute, rows with an error (of this start), engines alive, and the time left."""
        if not self._recent:
            return f"0/{_short(self.total_rows)} rows"
        first, last = self._recent[0], self._recent[-1]
        passed = max(last.seconds - first.seconds, 1e-9)
        rate = (last.rows - first.rows) / passed
        left = self.total_rows - last.rows
        part = math.floor(100 * last.rows / max(1, self.total_rows))  # 100 % is all of them
        done = f"{_short(last.rows)}/{_short(self.total_rows)} rows ({part}%)"
        engines = f"{_short(self._errors)} {_plural('error', self._errors)}  {self._engines} {_plural('engine', self._engines)}"
        if last is first or rate <= 0:
            return f"{done}  {engines}  {last.running:,} running" if self._heard else f"{done}  starting engines"
        tokens_in = (last.input_tokens - first.input_tokens) / passed
        tokens_out = (last.generated_tokens - first.generated_tokens) / passed
        eta = f"ETA {duration(left / rate)}" if left else "finishing"
        return f"{done}  {tokens_in:,.0f} tok/s in  {tokens_out:,.0f} tok/s out  {engines}  {eta}"

    def end(self) -> None:
        """Leave the line that a terminal overwrites."""
        if self._terminal:
            print(file=self._stream, flush=True)

    def _print(self, line: str) -> None:
        if self._terminal:
            columns = shutil.get_terminal_size().columns  # a line that wraps could not be overwritten
            print(f"\r\033[K{line[: columns - 1]}", end="", file=self._stream, flush=True)
        else:
            print(line, file=self._stream, flush=True)

    def as_list(self) -> list[dict[str, Any]]:
        """The samples for the report."""
        return [sample._asdict() for sample in self.samples]


def _short(number: int) -> str:
    """A number of rows in at most nine characters or so."""
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.1f}M"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
