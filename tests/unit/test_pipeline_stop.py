"""Signals end a real process in bounded time: cleanly where it answers, and all the same where it hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STATUS = 7
END_S = 2.0
SLACK_S = 20.0

# A process that works until it is stopped, as a job does, and cleans up; `hang` is a clean-up that never ends.
PROGRAM = """
import sys, threading, time
from pipelines.stop import Stopped, StopSignals

kind = sys.argv[1]

class Lost(BaseException):
    pass

def say(*words):
    print(*words, flush=True)

def before():
    time.sleep(0.3)
    say("before")

try:
    with StopSignals(7, float(sys.argv[2])) as stop:
        stop.before = before
        stop.at_the_end = lambda: say("at the end")
        if kind == "lost":
            threading.Timer(0.3, stop.interrupt, [Lost("robbed")]).start()
        if kind == "done":
            stop.finish()
        say("ready")
        try:
            if kind == "done":
                sys.stdin.readline()
                sys.exit(0)
            for _ in range(600):
                time.sleep(0.1)
        finally:
            say("cleaning up")
            if kind == "lost":
                time.sleep(0.6)
            while kind == "hang":
                time.sleep(0.1)
            stop.finish()
            say("cleaned up")
            while kind == "late":
                time.sleep(0.1)
except (Stopped, Lost) as error:
    say(type(error).__name__, *error.args)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []

    def make(kind: str, end_s: float = END_S) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, kind, str(end_s)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made.append(process)
        assert line(process) == "ready"
        return process

    yield make
    for process in made:
        process.kill()
        process.communicate(timeout=60)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_after_what_must_come_before(
    number: signal.Signals, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("works", 600)
    process.send_signal(number)
    out, err = process.communicate(timeout=SLACK_S)
    assert out.splitlines() == ["before", "cleaning up", "cleaned up", "Stopped"]
    assert (process.returncode, err) == (0, "")


def test_what_is_being_finished_is_not_torn(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("done", 600)
    process.send_signal(signal.SIGTERM)
    assert line(process) == "before"
    out, err = process.communicate("\n", timeout=SLACK_S)
    assert (process.returncode, out, err) == (0, "cleaning up\ncleaned up\n", "")


def test_a_lost_lease_raises_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("lost", 600)
    out, err = process.communicate(timeout=SLACK_S)
    assert out.splitlines() == ["cleaning up", "cleaned up", "Lost robbed"]
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("kind", ["hang", "late"])
def test_what_hangs_is_ended(kind: str, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(kind)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=SLACK_S)
    assert time.monotonic() - began > END_S / 2
    said = ["before", "cleaning up", "at the end"]
    assert [words for words in out.splitlines() if words != "cleaned up"] == said
    assert err == ("error: stopped, though not everything answered within 2 s; start the same command again to go on\n")
    assert process.returncode == STATUS


def test_a_second_signal_ends_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("hang", 600)
    process.send_signal(signal.SIGTERM)
    assert [line(process), line(process)] == ["before", "cleaning up"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SLACK_S)
    assert (process.returncode, out) == (STATUS, "")
    assert err == "error: stopped at once; start the same command again to go on\n"
