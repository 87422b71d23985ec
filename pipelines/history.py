"""What happened in a job, for its report: events and the actors of this start, and what earlier starts left in `OUT/_run/history/`.

The driver tells it what the board says every second, and what it hears itself. Everything here is bounded, however many actors,
deaths and starts there are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipelines.commit import RecordLog, read_records
from pipelines.progress import STALE_S, WorkerState
from pipelines.storage import Location

MAX_ACTORS = 1000  # that are told apart
OTHERS = "others"  # the name of all that are too many
MAX_LIVES = 50  # processes of an actor that the report shows
MAX_EVENTS = 1000  # of a start: the first half, and the latest
MAX_STARTS = 50  # earlier ones that are told apart
POINTS = 100  # of an actor's curve
CURVES = 20  # actors whose curves are in the report: the busiest
WRITE_S = 30.0
TEXT_CHARS = 500


class Event(NamedTuple):
    """Something that happened, `seconds` after its start began.

    Attributes:
        kind: `begin`, `actor` (an engine is ready), `restart` (in a new process), `gone` (not heard of again), `death` (an engine
            said why), `hang` (killed by the watchdog), `retry` (of a shard), `apart`, `failed`, `stopping`, `stopped`, `end`.
        actor: its name in the report, where it is about one.
    """

    seconds: float
    kind: str
    text: str
    actor: str = ""


class Usage(NamedTuple):
    """What engines did and held, summed over their processes. Tokens are those that engines worked on, finished or not."""

    actors: int = 0
    processes: int = 0
    actor_seconds: float = 0.0
    gpu_seconds: float = 0.0
    loading_seconds: float = 0.0
    gpu_loading_seconds: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Start(NamedTuple):
    """A start of the job. `began` is in seconds since 1970; `status` is `running` where it ended without a word."""

    name: str
    began: float
    seconds: float
    status: str
    gpu: str
    usage: Usage
    events: list[Event]


@dataclass
class _Life:
    """One process of an actor: when it began to load, when its engine was ready, when it was last heard of."""

    began: float
    ready: float
    heard: float
    state: WorkerState
    gone: bool = False


@dataclass
class _Actor:
    name: str
    lives: list[_Life] = field(default_factory=list)
    points: list[tuple[float, int, float]] = field(default_factory=list)

    def usage(self) -> Usage:
        return _sum([_usage_of(life) for life in self.lives])._replace(actors=1)


class History:
    """Events and actors of one start. Safe to call from several threads."""

    def __init__(self, directory: Location, name: str, seconds: Callable[[], float]) -> None:
        """Args: `directory` of the records; `name` of the start; `seconds` since it began."""
        self._directory = directory
        self._log = RecordLog(directory)
        self._name = name
        self._seconds = seconds
        self._began = time.time() - seconds()
        self._status = "running"
        self._gpu = ""
        self._events: list[Event] = []
        self._unwritten: list[Event] = []
        self._actors: dict[str, _Actor] = {}
        self._lives: dict[tuple[str, int, str | None], tuple[_Actor, _Life]] = {}
        self._latest: dict[str, _Life] = {}
        self._counters: dict[str, Mapping[str, Any]] = {}
        self._point_every_s = 1.0
        self._point_due = 0.0
        self._lock = threading.RLock()
        self._writing = threading.Lock()

    def note(self, kind: str, text: str, actor: str = "", ago: float = 0.0, at: float | None = None) -> None:
        """Note an event of `ago` seconds ago, or `at` so many seconds of this start."""
        seconds = max(0.0, self._seconds() - ago if at is None else at)
        event = Event(round(seconds, 2), kind, " ".join(text.split())[:TEXT_CHARS], actor)
        with self._lock:
            self._events.append(event)
            self._unwritten.append(event)
            if len(self._events) > MAX_EVENTS:
                del self._events[MAX_EVENTS // 2]
            del self._unwritten[:-MAX_EVENTS]

    def actor_of(self, node: str, pid: int, birth: str | None) -> str:
        """Name of the actor that a process is, "" where it is not known."""
        with self._lock:
            found = self._lives.get((node, pid, birth))
            return found[0].name if found else ""

    def look(self, workers: Iterable[tuple[float, WorkerState]]) -> None:
        """Take ages and states of all workers that ever reported."""
        now = self._seconds()
        with self._lock:
            for age, state in workers:
                self._hear(now - age, age, state)
            if now >= self._point_due:
                self._point_due = now + self._point_every_s
                for actor in self._actors.values():
                    life = actor.lives[-1]
                    if now - life.heard < STALE_S:
                        generated = actor.usage().generated_tokens
                        actor.points.append((round(life.heard, 2), generated, round(life.state.kv_usage, 4)))
            if now / self._point_every_s > POINTS:  # a long job keeps coarser curves, not longer ones
                self._point_every_s *= 2
                for actor in self._actors.values():
                    actor.points = actor.points[::2]

    def _hear(self, heard: float, age: float, state: WorkerState) -> None:
        process = (state.node, state.pid, state.birth)
        if process in self._lives:
            actor, life = self._lives[process]
            if state.up_s >= life.state.up_s:
                life.state = state
            life.heard = max(life.heard, heard)
        else:
            key = state.actor or f"{state.node}:{state.pid}"
            if key not in self._actors and len(self._actors) >= MAX_ACTORS:
                key = OTHERS
            name = key if key == OTHERS else f"a{len(self._actors) + 1}"
            actor = self._actors.setdefault(key, _Actor(name))
            began = heard - state.up_s
            life = _Life(began, began + state.load_s, heard, state)
            self._gpu = self._gpu or state.gpu
            self._lives[process] = actor, life
            self._latest[f"{state.host}:{state.pid}"] = life
            self._apply(f"{state.host}:{state.pid}")
            self._note_new(actor, life)
            actor.lives.append(life)
        if age < STALE_S:
            life.gone = False
        elif not life.gone and life is actor.lives[-1]:
            life.gone = True
            if actor.name != OTHERS:
                self.note("gone", f"{actor.name}, pid {state.pid}, was not heard of again", actor.name, at=life.heard)

    def _note_new(self, actor: _Actor, life: _Life) -> None:
        state = life.state
        where = f"{actor.name} on {state.host or state.node[:8]}, pid {state.pid}"
        loaded = f"engine ready after {state.load_s:.1f} s"
        if actor.name == OTHERS:
            return
        if actor.lives:
            last = actor.lives[-1].state.pid
            self.note("restart", f"{where}: a new process for pid {last}; {loaded}", actor.name, at=life.began)
        else:
            self.note("actor", f"{where}: {loaded}", actor.name, at=life.ready)

    def did(self, process: str, counters: Mapping[str, Any]) -> None:
        """Take newer counters of a process, which is `host:pid`, than those of its last report."""
        with self._lock:
            self._counters[process] = counters
            if process in self._latest:
                self._apply(process)

    def _apply(self, process: str) -> None:
        life, counters = self._latest[process], self._counters.get(process, {})
        if counters.get("up_s", 0.0) > life.state.up_s:
            life.state = life.state._replace(**counters)
            life.heard = max(life.heard, min(self._seconds(), life.began + life.state.up_s))

    def begin(self) -> None:
        """This start owns the output."""
        self.note("begin", "this start began", at=0.0)
        self.write()

    def end(self, status: str, text: str) -> None:
        """This start ends."""
        self._status = status
        self.note(status if status in ("stopped", "failed") else "end", text)
        self.write()

    def write_regularly(self, finished: threading.Event) -> None:
        """Thread: write now and then, rarer in a long job, whose record is then never older than a twentieth of it."""
        while not finished.wait(max(WRITE_S, self._seconds() / 20)):
            self.write()

    def write(self) -> None:
        """Record this start as far as it is. A store that refuses, or hangs in another thread, costs only the record."""
        if not self._writing.acquire(timeout=1):
            return
        try:
            with self._lock:
                start, events = self._this([]), self._unwritten
                self._unwritten = []
            record = {**start._asdict(), "usage": start.usage._asdict(), "events": events}
            try:
                self._log.append(json.dumps(record).encode())
            except OSError:
                with self._lock:
                    self._unwritten = events + self._unwritten
        finally:
            self._writing.release()

    def starts(self) -> list[Start]:
        """Earlier starts, oldest first, as far as `MAX_STARTS`; then this one. What more there were is the first one's usage.

        Raises:
            OSError: the records cannot be read.
        """
        found: dict[str, Start] = {}
        for payload in read_records(self._directory):
            values = json.loads(payload)
            events = [Event(*event) for event in values.pop("events")]
            start = Start(**{**values, "usage": Usage(**values["usage"])}, events=events)
            before = found.get(start.name)
            if before is not None:
                latest = max(before, start, key=lambda one: (one.seconds, one.status != "running"))
                start = latest._replace(events=_in_order(before.events + start.events)[-MAX_EVENTS:])
            found[start.name] = start
        earlier = sorted((s for s in found.values() if s.name != self._name), key=lambda start: start.began)
        while len(earlier) > MAX_STARTS:
            oldest = earlier.pop(0)
            earlier[0] = earlier[0]._replace(usage=_sum([oldest.usage, earlier[0].usage]))
        with self._lock:
            return [*earlier, self._this(_in_order(self._events))]

    def _this(self, events: list[Event]) -> Start:
        usage = _sum([actor.usage() for actor in self._actors.values()])
        return Start(self._name, self._began, round(self._seconds(), 2), self._status, self._gpu, usage, events)

    def actors(self) -> list[dict[str, Any]]:
        """The actors of this start, busiest first; the first `CURVES` with points: [seconds, tokens generated, part of the KV
        cache], and as many that died with their lives."""
        with self._lock:
            busiest = sorted(self._actors.values(), key=lambda actor: -actor.usage().generated_tokens)
            eventful = [actor for actor in busiest if len(actor.lives) > 1 or actor.lives[-1].gone]
            drawn = {actor.name for actor in [*busiest[:CURVES], *eventful[:CURVES]]}
            return [
                {
                    "name": actor.name,
                    "host": actor.lives[-1].state.host,
                    "node": actor.lives[-1].state.node,
                    "gpu": actor.lives[-1].state.gpu,
                    "gpus": actor.lives[-1].state.gpus,
                    "restarts": len(actor.lives) - 1,
                    **{key: value for key, value in actor.usage()._asdict().items() if key.endswith("tokens")},
                    "seconds": round(actor.usage().actor_seconds, 2),
                    "loading_seconds": round(actor.usage().loading_seconds, 2),
                    "lives": [
                        {
                            "pid": life.state.pid,
                            "began": round(life.began, 2),
                            "ready": round(life.ready, 2),
                            "heard": round(life.heard, 2),
                        }
                        for life in (actor.lives[-MAX_LIVES:] if actor.name in drawn else ())
                    ],
                    "points": [list(point) for point in (actor.points if place < CURVES else ())],
                }
                for place, actor in enumerate(busiest)
            ]


def _in_order(events: Iterable[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.seconds)


def total_usage(starts: Sequence[Start]) -> Usage:
    """Of several starts; `actors` is that of the latest that had any."""
    latest = [start.usage.actors for start in starts if start.usage.actors]
    return _sum([start.usage for start in starts])._replace(actors=latest[-1] if latest else 0)


def _usage_of(life: _Life) -> Usage:
    state = life.state
    return Usage(
        processes=1,
        actor_seconds=state.up_s,
        gpu_seconds=state.up_s * state.gpus,
        loading_seconds=state.load_s,
        gpu_loading_seconds=state.load_s * state.gpus,
        input_tokens=state.input_tokens,
        cached_tokens=state.cached_tokens,
        generated_tokens=state.generated_tokens,
    )


def _sum(usages: Iterable[Usage]) -> Usage:
    totals: list[Any] = [sum(values) for values in zip(Usage(), *usages, strict=True)]
    rounded: list[Any] = [round(total, 2) if isinstance(total, float) else total for total in totals]
    return Usage(*rounded)
