"""Which workers the watchdog ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

import pipelines.progress
from pipelines.processes import born
from pipelines.progress import ProgressBoard, WorkerState
from pipelines.watchdog import Watchdog, end_process


def state(pid: int, stalled_s: float = 0.0) -> WorkerState:
    return WorkerState(0, 0, 0, 0, 1, 0, 0.5, False, stalled_s, "node", pid, "1")


class Recording(Watchdog):
    def __init__(self, hang_s: float) -> None:
        super().__init__(hang_s)
        self.ended: list[int] = []

    def _end(self, state: WorkerState) -> None:
        self.ended.append(state.pid)


def test_the_silent_and_the_stalled_are_ended_once() -> None:
    dog = Recording(5.0)
    seen = [(4.9, state(1)), (5.1, state(2)), (0.5, state(3, 49.0)), (0.5, state(4, 49.6)), (0.1, state(5))]
    for _ in range(2):
        dog.look(seen)
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join()
    assert sorted(dog.ended) == [2, 4]


def test_only_the_very_process_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not end_process(process.pid, None)
        assert not end_process(process.pid, born(os.getpid()))
        assert process.poll() is None
        assert end_process(process.pid, born(process.pid))
        assert process.wait(timeout=10) == -9
        assert not end_process(process.pid, born(os.getpid()))
    finally:
        process.kill()


def test_a_board_that_was_suspended_makes_nobody_older(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(pipelines.progress.time, "monotonic", lambda: now)
    board = ProgressBoard()
    board.report("a", state(1))
    for _ in range(3):
        now += 1
        board.read()
    now += 3600
    ((age, _),) = board.read()
    assert age == pytest.approx(3)
    for _ in range(60):
        now += 1
        ((age, _),) = board.read()
    assert age == pytest.approx(63)
