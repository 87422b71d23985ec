"""The lease on an output directory: of all starts of a job, one writes there. `generate.py` takes it before Ray starts.

Each start has a file of its own, `OUT/_run/lease-<term>-<nonce>.json`, which it alone writes: its *claim*. It says who
the start is and whether it waits or holds, and a counter in it, the heartbeat, grows five times in the lease's life.

    take     1. Watch the claims that are there. One that holds and whose bytes change is alive: refuse, naming it. One
                that is the same for as long as its life, or whose process is dead (same host, same boot), is dead.
             2. Write a claim of the next term, waiting.
             3. List. Not alone: remove what is dead and list again; withdraw where another one holds or goes before
                (higher term, then smaller name), and begin again; wait where this one goes before.
             4. Alone: write the claim, holding.
    hold     Each heartbeat: the claim is still there, write it, list. Lost when it is gone, or when another claim of this
             term or a later one holds.
    release  Remove the claim.

Why no two hold. A start writes its claim before it lists, and holds only when its list shows no other. Of two starts the
one that writes last therefore sees the other, whatever happens in between; no put can overwrite another one's claim; and
nothing more is asked of a store than that a list shows what was written before it began. So local directories, object
stores and every fsspec store take the same path, without renames, locks or puts that fail where a file exists. The rule
who goes before only decides which of two waiting starts withdraws; it never lets one in.

Why a dead holder blocks nobody, and a living one is not robbed. No clock of two machines is compared, and none of one
machine but the monotonic one: a watcher counts its own time while the bytes stay the same, and only in steps of at most
a heartbeat, so that a watcher which was itself suspended judges nobody by the time it slept. Times in a claim are for people.

What a suspended holder can still do. Its claim has been removed by the start that took over, so its next heartbeat, which
precedes `_SUCCESS` and the report, tells it. Where it was suspended between looking for its claim and writing it, the
write brings the claim back; the list after it shows the later term, and the later term does not mind an earlier one. Its
workers may finish shards meanwhile: a shard's file is named by the plan and its rows follow from the job, so a late
put replaces a file with the same rows, and journals have a writer each.

A holder does not give up because the store fails: who cannot reach the store cannot finish the job there either, and
learns the truth from the first heartbeat that works. It ends when the store has failed for longer than both the life of
the lease and the patience it was given.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, NamedTuple

import pyarrow.fs as pafs

from nanovllm import UserError
from pipelines.processes import born, home, is_dead
from pipelines.storage import Location, children, delete_file, exists, read

BEATS = 5  # heartbeats in the life of a lease
POLL_S = 0.1  # between looks at other claims
RELEASE_S = 2.0  # how long a release waits for a heartbeat that is under way
KEYS = {"holds", "lease_s", "host", "pid", "home", "born", "since", "beaten"}
NAME = re.compile(r"lease-(\d+)-[0-9a-f]+\.json")


class LeaseHeld(UserError):
    """Another start of the job lives; the message says which and what to do."""


class LeaseLost(BaseException):
    """This start no longer holds the output. Not an `Exception`, so that nothing on the way swallows it."""


class Claim(NamedTuple):
    """A claim as another start finds it.

    Attributes:
        name: of its file.
        data: its bytes. Their change is the heartbeat; an unfinished write counts as one.
        says: what the bytes say; empty where they are cut off.
    """

    name: str
    data: bytes
    says: dict[str, Any]

    @property
    def term(self) -> int:
        """Number of the claim; one that supersedes others has a higher one."""
        match = NAME.fullmatch(self.name)
        return int(match[1]) if match else 0

    @property
    def holds(self) -> bool:
        """Whether its writer was alone and works; otherwise it waits to be."""
        return bool(self.says.get("holds"))

    @property
    def precedence(self) -> tuple[int, str]:
        """Of two waiting claims the one with the smaller value goes before."""
        return (-self.term, self.name)

    def died(self) -> bool:
        """Whether its process is known to be dead: it ran on this host since its last boot, and is no more."""
        where = self.says.get("home")
        return where is not None and where == home() and is_dead(self.says["pid"], self.says["born"])

    def __str__(self) -> str:
        """Who wrote it, for messages."""
        says = self.says
        if not says:
            return "a start whose claim is cut off"
        return f"host {says['host']}, pid {says['pid']}, since {says['since']}, last heartbeat {says['beaten']}"


class Lease:
    """The lease of this start. `acquire` it, ask `check` or `confirm` before what only a holder may do, `release` it.

    Attributes:
        superseded: claims of dead starts that `acquire` removed.
    """

    def __init__(
        self,
        directory: Location,
        address: str,
        life_s: float,
        patience_s: float = 0.0,
        on_lost: Callable[[LeaseLost], None] = lambda lost: None,
    ) -> None:
        """Args: `directory` holds the claims and is made if need be; `address` is the output's name in messages; `life_s`
        is how long another start watches this one before it takes over; `patience_s` how long the store may fail (at
        least `life_s`); `on_lost` is called by the heartbeat's thread."""
        self.superseded: list[Claim] = []
        self._directory = directory
        self._address = address
        self._life_s = life_s
        self._patience_s = max(patience_s, life_s)
        self._on_lost = on_lost
        self._since = _now()
        self._place: Location | None = None
        self._beat = 0
        self._renewed = self._written = 0.0
        self._lost: LeaseLost | None = None
        self._listed = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    # Taking it

    def acquire(self) -> None:
        """Take the lease, and keep it until `release`. A start that died elsewhere is taken over after its life.

        Raises:
            LeaseHeld: another start holds it and lives.
            UserError: the store refused.
        """
        try:
            self._directory.fs.create_dir(self._directory.path, recursive=True)
            while not self._try(self._watch()):
                self._withdraw()
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._withdraw()
            if isinstance(error, OSError):
                raise UserError(f"output {self._address!r} cannot be written: {_one_line(error)}") from None
            raise
        self._thread.start()

    def _watch(self) -> dict[str, Claim]:
        """Watch the claims of others until none of them lives; those that are left are dead."""
        watch = _Watch(self._life_s)
        while True:
            claims = watch.look(self._claims)
            living = [claim for claim in claims.values() if claim.holds and watch.changed(claim)]
            if living:
                raise LeaseHeld(
                    f"output {self._address!r} is being written by another start that lives: {living[0]}; let it finish "
                    "or stop it (SIGTERM, Ctrl-C or `ray job stop`), and start the same command again"
                )
            if all(watch.is_dead(claim) for claim in claims.values()):
                return claims
            time.sleep(POLL_S)

    def _try(self, dead: dict[str, Claim]) -> bool:
        """Write a claim above `dead` and wait to be alone; False where another one goes before."""
        term = 1 + max((claim.term for claim in dead.values()), default=0)
        self._place = self._directory.child(f"lease-{term:06d}-{uuid.uuid4().hex}.json")
        mine = Claim(self._name, b"", {})
        self._write(holds=False)
        watch = _Watch(self._life_s)
        while True:
            claims = watch.look(self._claims)
            if claims.pop(mine.name, None) is None and not exists(self._place):
                return False  # taken for dead: this start was suspended
            # A list without what was written before it began says nothing about others either.
            complete = self._listed
            gone = [claim for claim in claims.values() if dead.get(claim.name) == claim]
            for claim in gone:
                delete_file(self._directory.child(claim.name))
                self.superseded.append(claim)
            others = [claim for claim in claims.values() if claim not in gone]
            if any(claim.holds or claim.precedence < mine.precedence or watch.is_dead(claim) for claim in others):
                return False
            if gone:
                continue
            if complete and not others:
                return self._renew() is None
            if not complete and time.monotonic() - self._written > self._life_s:
                raise OSError(f"{self._place.path} was written and is not listed")
            time.sleep(POLL_S)
            if complete and time.monotonic() - self._written > self._life_s / BEATS:
                self._write(holds=False)  # so that others see this one live

    def _withdraw(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            delete_file(place)

    # Keeping it

    def check(self) -> None:
        """See that the lease is still held, without the store as long as the heartbeat is in time.

        Raises:
            LeaseLost: it is not.
        """
        if _awake_or_not() - self._renewed > self._life_s:  # suspended: the thread may not have run yet
            with contextlib.suppress(OSError):
                self.confirm()
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """See that the lease is held at this moment, by a heartbeat.

        Raises:
            LeaseLost: it is not.
            OSError: the store does not say.
        """
        with self._lock:
            if self._lost is None:
                self._lost = self._renew()
            if self._lost is not None:
                raise self._lost

    @property
    def lost(self) -> bool:
        """Whether the lease was lost, as far as this start knows."""
        return self._lost is not None

    def _renew(self) -> LeaseLost | None:
        """One heartbeat; what there is to say where it finds the lease lost."""
        assert self._place is not None, "renewed before it was acquired"
        if not exists(self._place):
            return self._gone(self._later())
        self._write(holds=True)
        later = self._later()
        if later:
            return self._gone(later)
        if not self._listed:
            raise OSError(f"{self._place.path} was written and is not listed")
        self._renewed = _awake_or_not()
        return None

    def _later(self) -> list[Claim]:
        """Claims of others that supersede this one."""
        claims = self._claims()
        own = Claim(self._name, b"", {})
        return [claim for claim in claims.values() if claim.name != own.name and claim.holds and claim.term >= own.term]

    def _gone(self, later: list[Claim]) -> LeaseLost:
        by = f"another start: {later[0]}" if later else "another start, which has ended since (or its file was deleted)"
        return LeaseLost(
            f"the lease on output {self._address!r} was taken over by {by}; this start was suspended or cut off from the "
            f"store for more than {self._life_s:g} s, has stopped and marks nothing finished"
        )

    def _keep(self) -> None:
        """Thread: beat until the lease ends."""
        failing_since: float | None = None
        while not self._ended.wait(self._life_s / BEATS):
            try:
                self.confirm()
                failing_since = None
            except LeaseLost as lost:
                if not self._ended.is_set():
                    self._on_lost(lost)
                return
            except Exception as error:  # fsspec stores raise their own kinds too
                now = time.monotonic()
                failing_since = failing_since or now
                if now - failing_since > self._patience_s and not self._ended.is_set():
                    self._lost = LeaseLost(
                        f"the lease on output {self._address!r} could not be renewed for {now - failing_since:.0f} s: "
                        f"{_one_line(error)}; this start has ended, start the same command again to go on"
                    )
                    self._on_lost(self._lost)
                    return

    def release(self) -> None:
        """Give the lease up, in a few seconds at most. A claim that cannot be removed is a dead one to later starts."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=RELEASE_S)
        with contextlib.suppress(OSError):
            self._withdraw()

    # Claims

    @property
    def _name(self) -> str:
        return self._place.path.rsplit("/", 1)[-1] if self._place is not None else ""

    def _write(self, holds: bool) -> None:
        """Write this start's claim in place: a rename over it could hide it from a list for a moment."""
        assert self._place is not None
        self._beat += 1
        claim = {
            "holds": holds,
            "beat": self._beat,
            "lease_s": self._life_s,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "home": home(),
            "born": born(os.getpid()),
            "since": self._since,
            "beaten": _now(),
        }
        with self._place.fs.open_output_stream(self._place.path) as stream:
            stream.write(json.dumps(claim).encode() + b"\n")
        self._written = time.monotonic()

    def _claims(self) -> dict[str, Claim]:
        """All claims in the directory, by name."""
        claims = {}
        names = [entry.base_name for entry in children(self._directory) if entry.type == pafs.FileType.File]
        self._listed = self._name in names
        for name in filter(NAME.fullmatch, names):
            place = self._directory.child(name)
            try:
                data = read(place)
            except FileNotFoundError:
                if exists(place):
                    raise  # fsspec says so of what it cannot reach
                continue  # released since it was listed
            claims[name] = Claim(name, data, _parse(data))
        return claims


class _Watch:
    """For how long claims have stayed the same, on the watcher's own monotonic clock."""

    def __init__(self, life_s: float) -> None:
        self._life_s = life_s
        self._seen: dict[str, bytes] = {}
        self._silent_s: dict[str, float] = {}
        self._changed: set[str] = set()
        self._looked = time.monotonic()

    def look(self, claims: Callable[[], dict[str, Claim]]) -> dict[str, Claim]:
        """Read the claims and count the time since the last look for those that have not changed."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        found = claims()
        for name, claim in found.items():
            before = self._seen.get(name)
            if before == claim.data:
                # What passes while this process is suspended is no evidence: the others may be suspended with it.
                self._silent_s[name] += min(passed, self._life_of(claim) / BEATS)
                continue
            if before is not None:
                self._changed.add(name)
            self._seen[name] = claim.data
            self._silent_s[name] = now - time.monotonic()  # it may have been written as late as this look ended
        return found

    def _life_of(self, claim: Claim) -> float:
        return float(claim.says.get("lease_s", self._life_s))

    def changed(self, claim: Claim) -> bool:
        """Whether it changed while it was watched."""
        return claim.name in self._changed

    def is_dead(self, claim: Claim) -> bool:
        """Whether its process is dead or it did not change for as long as it promised to."""
        return claim.died() or self._silent_s.get(claim.name, 0.0) > self._life_of(claim)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        says = json.loads(data)
    except ValueError:
        return {}
    return says if isinstance(says, dict) and says.keys() >= KEYS else {}


def _awake_or_not() -> float:
    """Seconds on a clock that also runs while the machine sleeps, where the system has one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
