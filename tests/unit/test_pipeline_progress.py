"""The line about a running job: what it says, how long it is, and where it is printed."""

from __future__ import annotations

import io
import re

import pytest

import pipelines.progress
from pipelines.progress import Progress, WorkerState


class Clock:
    """Time that a test moves on, in the place of the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pipelines.progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def worker(rows: int = 0, tokens_in: int = 0, tokens_out: int = 0, errors: int = 0, pid: int = 1) -> WorkerState:
    return WorkerState(rows, tokens_in, tokens_out, 0, 7, 0, 0.5, False, 0.0, "node", pid, "1", error_rows=errors)


def test_the_line_says_all_that_is_asked_for(clock: Clock) -> None:
    progress = Progress(1000, 100, 5.0, io.StringIO())
    assert progress.line() == "0/1,000 rows"
    progress.sample([])
    assert progress.line() == "100/1,000 rows (10%)  starting engines"
    progress.sample([(0.5, worker())])
    assert progress.line() == "100/1,000 rows (10%)  0 errors  1 engine  7 running"
    clock.now += 10
    progress.committed_rows += 50
    progress.committed_errors += 2
    progress.sample([(0.5, worker(20, 30_000, 2_000, 1)), (0.1, worker(30, 10_000, 500, 0, 2)), (9.0, worker(pid=3))])
    # 100 rows in 10 s and 800 to go; the third worker was not heard of for 9 s.
    assert progress.line() == (
        "200/1,000 rows (20%)  4,000 tok/s in  250 tok/s out  3 errors  2 engines  ETA 1 min 20 s"
    )
    clock.now += 10
    progress.committed_rows = 1000
    progress.sample([(0.5, worker(tokens_in=40_000, tokens_out=2_500))])
    assert progress.line().startswith("1,000/1,000 rows (100%)")
    assert progress.line().endswith("3 errors  1 engine  finishing")  # a row that was committed keeps its error


def test_all_but_one_row_is_not_all(clock: Clock) -> None:
    progress = Progress(1000, 999, 5.0, io.StringIO())
    progress.sample([])
    assert "(99%)" in progress.line()


def test_a_large_job_has_a_short_line(clock: Clock) -> None:
    progress = Progress(2_000_000, 0, 5.0, io.StringIO())
    for second in range(2):
        clock.now += second
        states = [(0.1, worker(20_000 * second, 3_000 * second, 2_000 * second, 20 * second, pid)) for pid in range(64)]
        progress.sample(states)
    assert "64 engines" in progress.line()
    assert len(progress.line()) <= 110
    assert Progress(3_000_000_000, 0, 5.0, io.StringIO()).line() == "0/3,000.0M rows"


def test_lines_where_there_is_no_terminal(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(10, 0, 5.0, stream)
    for _ in range(12):  # seconds 0 to 11
        progress.sample([(0.1, worker())])
        clock.now += 1
    progress.end()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # at 0, 5 and 10
    assert all(re.match(r"0/10 rows \(0%\)  0 errors", line) for line in lines)


def test_one_line_on_a_terminal_that_never_wraps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    progress = Progress(1000, 0, 60.0, stream)
    for _ in range(4):
        progress.sample([(0.1, worker())])
        clock.now += 1
    progress.end()
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert written.endswith("\n")
    shown = written.rstrip("\n").split("\r\033[K")[1:]
    assert len(shown) == 4  # every second, whatever `progress_s` is
    assert {len(line) for line in shown} == {29}


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_quiet_prints_nothing(clock: Clock, stream: io.StringIO) -> None:
    progress = Progress(10, 0, 1.0, stream, quiet=True)
    for _ in range(3):
        progress.sample([(0.1, worker())])
        clock.now += 5
    progress.end()
    assert stream.getvalue() == ""
    assert len(progress.samples) == 3  # the report has them all the same
