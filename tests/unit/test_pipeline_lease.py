"""One start writes to an output: real processes that are killed, suspended and raced, on local directories and on stores."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import pipelines.lease
from nanovllm import UserError
from pipelines.lease import Lease, LeaseHeld, LeaseLost
from pipelines.processes import home
from pipelines.storage import Location, children, read, resolve

REPOSITORY = Path(__file__).resolve().parents[2]
LIFE_S = 1.0
SLACK_S = 20.0  # for a busy machine; nothing that works comes near it

# A start of its own: acquires in the directory it is told, says how that went, and holds until it is told to release.
# With a jitter every step of the protocol is preceded by a random pause of up to so many seconds.
START = """
import random, sys, threading, time
import pipelines.lease
from pipelines.lease import Lease, LeaseHeld
from pipelines.storage import resolve

life, jitter = float(sys.argv[1]), float(sys.argv[2])
def late(step):
    def paused(*arguments, **named):
        time.sleep(random.random() * jitter)
        return step(*arguments, **named)
    return paused
for name in ("children", "read", "exists", "delete_file") if jitter else ():
    setattr(pipelines.lease, name, late(getattr(pipelines.lease, name)))
if jitter:
    Lease._write = late(Lease._write)
for line in sys.stdin:
    lease = Lease(resolve(line.strip()), "out", life, on_lost=lambda lost: print("lost", lost, flush=True))
    try:
        lease.acquire()
        print("held", len(lease.superseded), flush=True)
    except LeaseHeld as error:
        print("refused", error, flush=True)
    sys.stdin.readline()
    lease.release()
    print("released", flush=True)
"""


class Start:
    """A process that runs `START`."""

    def __init__(self, life_s: float, jitter_s: float = 0.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(life_s), str(jitter_s)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def begin(self, place: Path) -> str:
        self.tell(str(place))
        return self.hear()


@pytest.fixture
def starts() -> Iterator[Callable[..., Start]]:
    made: list[Start] = []

    def make(life_s: float = LIFE_S, jitter_s: float = 0.0) -> Start:
        made.append(Start(life_s, jitter_s))
        return made[-1]

    yield make
    for start in made:
        start.process.kill()
        start.process.communicate(timeout=60)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """`_run` on a local disk, and on a store whose only gift is a put that replaces."""
    return resolve(
        str(tmp_path / "out" / "_run") if request.param == "local" else f"memory://b-{uuid.uuid4().hex}/_run"
    )


@contextlib.contextmanager
def holding(place: Location, life_s: float = LIFE_S, **more: Any) -> Iterator[Lease]:
    lease = Lease(place, "out", life_s, **more)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def suspend(lease: Lease) -> None:
    """Stop a lease's heartbeat and leave its claim, as a process does that is suspended or dies elsewhere."""
    lease._ended.set()
    lease._thread.join()


def claims(place: Location) -> list[str]:
    return [entry.base_name for entry in children(place)]


def test_a_living_holder_is_named_and_not_robbed(place: Location) -> None:
    with holding(place) as first:
        for _ in range(2):
            second = Lease(place, "s3://bucket/out", LIFE_S)
            with pytest.raises(LeaseHeld) as refused:
                second.acquire()
            words = str(refused.value)
            assert isinstance(refused.value, UserError)
            assert "\n" not in words
            assert "output 's3://bucket/out' is being written by another start that lives" in words
            assert f"host {socket.gethostname()}, pid {os.getpid()}, since 2" in words
            assert re.search(r"last heartbeat \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", words)
            assert "let it finish or stop it" in words
            second.release()
        first.check()
        first.confirm()
        assert len(claims(place)) == 1
    assert claims(place) == []
    with holding(place) as third:
        assert third.superseded == []
    assert claims(place) == []


def test_a_process_that_was_killed_here_is_superseded_at_once(tmp_path: Path, starts: Callable[..., Start]) -> None:
    start = starts(life_s=600)
    assert start.begin(tmp_path) == "held 0"
    start.process.kill()
    began = time.monotonic()
    with holding(resolve(str(tmp_path)), life_s=600) as lease:
        assert time.monotonic() - began < SLACK_S  # and not 600
        assert [claim.says["pid"] for claim in lease.superseded] == [start.process.pid]
        assert len(claims(resolve(str(tmp_path)))) == 1


@pytest.mark.parametrize("of", ["another process under its pid", "another host", "a system that does not say"])
def test_what_a_pid_proves(of: str, tmp_path: Path, starts: Callable[..., Start]) -> None:
    """A pid that is alive proves nothing, and one that is dead proves something only of this host and boot."""
    place = resolve(str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = Lease(place, "out", LIFE_S)
    left.acquire()
    suspend(left)
    (name,) = claims(place)
    says = json.loads(read(place.child(name)))
    says |= {
        "another process under its pid": {"pid": starts().process.pid, "lease_s": 600},
        "another host": {"home": "elsewhere", "pid": dead.pid},
        "a system that does not say": {"home": None, "pid": dead.pid},
    }[of]
    (tmp_path / name).write_text(json.dumps(says))
    began = time.monotonic()
    with holding(place, life_s=600):
        took = time.monotonic() - began
    if of == "another process under its pid":
        assert took < SLACK_S
    else:
        assert took >= LIFE_S


def test_a_silent_holder_is_superseded_after_the_life_it_promised(place: Location) -> None:
    silent = Lease(place, "out", LIFE_S)
    silent.acquire()
    suspend(silent)
    began = time.monotonic()
    with holding(place, life_s=600) as lease:
        assert LIFE_S <= time.monotonic() - began < SLACK_S
        assert len(lease.superseded) == 1
        with pytest.raises(LeaseLost, match=rf"taken over by another start: host .*, pid {os.getpid()}, since"):
            silent.confirm()
        with pytest.raises(LeaseLost):
            silent.check()
        lease.confirm()
    assert silent.lost


def test_a_write_that_was_under_way_takes_nothing_back(place: Location) -> None:
    """Suspended between looking for its claim and writing it, a start brings its claim back and learns the truth."""
    silent = Lease(place, "out", LIFE_S)
    silent.acquire()
    suspend(silent)
    with holding(place) as lease:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipelines.lease, "exists", lambda claim: True)  # as it was when it looked
            with pytest.raises(LeaseLost, match="taken over"):
                silent.confirm()
        assert len(claims(place)) == 2
        lease.confirm()
        third = Lease(place, "out", LIFE_S)
        with pytest.raises(LeaseHeld):
            third.acquire()
        silent.release()
        assert len(claims(place)) == 1


def test_a_late_contender_never_gets_in(place: Location) -> None:
    """What it saw before it wrote its claim may be as old as can be."""
    with holding(place) as first:
        saw_nothing = Lease(place, "out", LIFE_S)
        assert not saw_nothing._try({})
        saw_nothing._withdraw()
        saw_a_higher_term = Lease(place, "out", LIFE_S)
        assert not saw_a_higher_term._try({"x": pipelines.lease.Claim("lease-000007-0.json", b"", {})})
        saw_a_higher_term._withdraw()
        first.confirm()


@pytest.mark.parametrize("suspended", ["while the other works", "until the other has ended"])
def test_a_suspended_holder_finds_out(suspended: str, tmp_path: Path, starts: Callable[..., Start]) -> None:
    start = starts()
    assert start.begin(tmp_path) == "held 0"
    start.process.send_signal(signal.SIGSTOP)
    with holding(resolve(str(tmp_path))) as lease:
        assert [claim.says["pid"] for claim in lease.superseded] == [start.process.pid]
        if suspended == "while the other works":
            start.process.send_signal(signal.SIGCONT)
            assert f"taken over by another start: host {socket.gethostname()}, pid {os.getpid()}" in start.hear()
        lease.confirm()
    if suspended == "until the other has ended":
        start.process.send_signal(signal.SIGCONT)
        assert "taken over by another start, which has ended since" in start.hear()
    assert claims(resolve(str(tmp_path))) == []


def test_check_asks_the_store_only_after_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = resolve(str(tmp_path))
    with holding(place, life_s=600) as lease:
        (name,) = claims(place)
        (tmp_path / name).unlink()
        lease.check()
        now = pipelines.lease._awake_or_not()
        monkeypatch.setattr(pipelines.lease, "_awake_or_not", lambda: now + 601)
        with pytest.raises(LeaseLost, match="or its file was deleted"):
            lease.check()


@pytest.mark.parametrize("jitter_s", [0.0, 0.05])
def test_of_starts_at_the_same_moment_exactly_one_wins(
    jitter_s: float, tmp_path: Path, starts: Callable[..., Start]
) -> None:
    racers = [starts(life_s=2 * LIFE_S, jitter_s=jitter_s) for _ in range(3)]
    for number in range(10):
        place = tmp_path / f"{number}"
        if number % 2:  # every other round they race for the claim of a dead one
            place.mkdir()
            says = {"holds": True, "beat": 9, "lease_s": 600, "host": "h", "since": "", "beaten": "", "born": "0"}
            says |= {"pid": os.getpid(), "home": home()}
            (place / "lease-000004-abc.json").write_text(json.dumps(says))
        for racer in racers:
            racer.tell(str(place))
        answers = [racer.hear() for racer in racers]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "refused", "refused"], answers
        assert len(claims(resolve(str(place)))) == 1
        for racer in racers:
            racer.tell("release")
        assert [racer.hear() for racer in racers] == ["released"] * 3
        assert claims(resolve(str(place))) == []


def test_who_goes_before_waits_until_it_is_alone(place: Location) -> None:
    """The other may have listed before this one wrote, and hold in a moment."""
    after = Lease(place, "out", LIFE_S)
    place.fs.create_dir(place.path, recursive=True)
    after._place = place.child(f"lease-000001-{'f' * 33}.json")
    after._write(holds=False)
    before = Lease(place, "out", LIFE_S)
    tried = threading.Thread(target=before._try, args=({},))
    tried.start()
    until = time.monotonic() + LIFE_S / 2
    while time.monotonic() < until:
        after._write(holds=False)
        assert tried.is_alive()
        time.sleep(0.02)
    assert len(claims(place)) == 2
    after._withdraw()
    tried.join(timeout=SLACK_S)
    assert not tried.is_alive()
    (name,) = claims(place)
    assert json.loads(read(place.child(name)))["holds"]


def test_threads_race_on_a_store() -> None:
    for number in range(10):
        place = resolve(f"memory://race-{uuid.uuid4().hex}/_run")
        leases = [Lease(place, "out", LIFE_S) for _ in range(3)]
        answers: list[str] = []

        def take(lease: Lease, answers: list[str] = answers) -> None:
            try:
                lease.acquire()
                answers.append("held")
            except LeaseHeld:
                answers.append("refused")

        threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert sorted(answers) == ["held", "refused", "refused"], number
        for lease in leases:
            lease.release()
        assert claims(place) == []


class Jumping:
    """The `time` module with a monotonic clock that jumps an hour after a few looks, as over a suspension."""

    def __init__(self) -> None:
        self._calls = 0

    def monotonic(self) -> float:
        self._calls += 1
        return time.monotonic() + (3600 if self._calls > 6 else 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def test_clocks_may_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall clocks that say anything change nothing; a watcher that slept has not seen anybody be silent."""
    place = resolve(str(tmp_path))

    def no_clock() -> float:
        raise AssertionError("the lease asked for the time of day")

    years = iter(range(1970, 10_000))
    monkeypatch.setattr(time, "time", no_clock)
    monkeypatch.setattr(pipelines.lease, "_now", lambda: f"{next(years) * 37 % 8000} UTC")
    with holding(place, life_s=4 * LIFE_S):
        with pytest.raises(LeaseHeld):
            Lease(place, "out", LIFE_S).acquire()
        monkeypatch.setattr(pipelines.lease, "time", Jumping())
        with pytest.raises(LeaseHeld):
            Lease(place, "out", LIFE_S).acquire()
        monkeypatch.setattr(pipelines.lease, "time", time)
    silent = Lease(place, "out", LIFE_S)
    silent.acquire()
    suspend(silent)
    with holding(place) as lease:
        assert len(lease.superseded) == 1


def test_a_store_that_fails_now_and_then_costs_nothing(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[LeaseLost] = []
    with holding(place, life_s=0.3, on_lost=lost.append) as lease:  # a heartbeat every 0.06 s
        outcomes = itertools.cycle([OSError("throttled"), None, RuntimeError("a store's own kind"), None])
        tried = 0
        write = lease._write

        def flaky(holds: bool) -> None:
            nonlocal tried
            tried += 1
            outcome = next(outcomes)
            if outcome is not None:
                raise outcome
            write(holds)

        monkeypatch.setattr(lease, "_write", flaky)
        deadline = time.monotonic() + SLACK_S
        while tried < 15 and lease._thread.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert lease._thread.is_alive()
        assert lost == []


def test_a_store_that_fails_for_long_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    lost: list[LeaseLost] = []

    def on_lost(error: LeaseLost) -> None:
        lost.append(error)
        ended.set()

    with holding(resolve(str(tmp_path)), life_s=0.3, patience_s=1.0, on_lost=on_lost) as lease:
        began = time.monotonic()

        def refuse(holds: bool) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(lease, "_write", refuse)
        assert ended.wait(SLACK_S)
        assert time.monotonic() - began > 1.0
        with pytest.raises(LeaseLost, match=r"could not be renewed for \d+ s: no route to host"):
            lease.check()
    assert len(lost) == 1


@pytest.mark.parametrize("length", [0, 25])
def test_a_claim_that_was_cut_off_is_watched_like_any_other(length: int, tmp_path: Path) -> None:
    place = resolve(str(tmp_path))
    left = Lease(place, "out", LIFE_S)
    left.acquire()
    suspend(left)
    (name,) = claims(place)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:length])
    began = time.monotonic()
    with holding(place) as lease:
        assert time.monotonic() - began >= LIFE_S
        assert [str(claim) for claim in lease.superseded] == ["a start whose claim is cut off"]


class Caching(MemoryFileSystem):
    """A store whose client remembers every listing and every file it was asked about, as s3fs and gcsfs may."""

    protocol = "caching"
    cachable = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._remembered: dict[tuple[Any, ...], Any] = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        self._remembered.clear()

    def _once(self, key: tuple[Any, ...], ask: Callable[[], Any]) -> Any:
        if key not in self._remembered:
            self._remembered[key] = ask()
        return self._remembered[key]

    def find(self, path: str, **more: Any) -> Any:
        return self._once(("find", path), lambda: MemoryFileSystem.find(self, path, **more))

    def info(self, path: str, **more: Any) -> Any:
        return self._once(("info", path), lambda: MemoryFileSystem.info(self, path, **more))


def test_listings_that_a_client_remembers_hide_nobody() -> None:
    bucket = f"bucket-{uuid.uuid4().hex}"

    def client() -> Location:
        return Location(pafs.PyFileSystem(pafs.FSSpecHandler(Caching())), f"{bucket}/_run")

    first, second = client(), client()
    with first.fs.open_output_stream(first.child("config.yaml").path) as stream:
        stream.write(b"x")
    assert claims(second) == ["config.yaml"]
    with holding(first) as lease:
        with pytest.raises(LeaseHeld):
            Lease(second, "out", LIFE_S).acquire()
        suspend(lease)
        with holding(second), pytest.raises(LeaseLost):
            lease.confirm()


def test_a_list_without_what_was_just_written_proves_nothing(place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec gives an empty list of a directory that it cannot reach."""
    blind = iter(range(3))

    def listed(directory: Location) -> list[pafs.FileInfo]:
        if threading.current_thread() is threading.main_thread() and next(blind, None) is not None:
            return []
        return children(directory)

    with holding(place):
        monkeypatch.setattr(pipelines.lease, "children", listed)
        with pytest.raises(LeaseHeld):
            Lease(place, "out", LIFE_S).acquire()
        blind = iter(range(10_000))
        with pytest.raises(UserError, match="was written and is not listed"):
            Lease(place, "out", LIFE_S).acquire()
    assert claims(place) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="output 'out' cannot be written"):
        Lease(resolve(str(tmp_path / "file" / "_run")), "out", LIFE_S).acquire()


def test_a_contender_that_is_stopped_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = resolve(str(tmp_path))
    lease = Lease(place, "out", LIFE_S)

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lease, "_renew", stop)
    with pytest.raises(KeyboardInterrupt):
        lease.acquire()
    assert claims(place) == []
