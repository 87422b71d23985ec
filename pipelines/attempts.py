"""Poison rows: what attempts at a shard leave behind when their process dies, and which of its rows that makes suspects.

Every attempt writes down that it begins, in `OUT/_run/journal/<shard>.attempts/`, before any of its rows runs. What the
next attempt finds there without an end was a death. Two kinds are told apart:

    the engine failed   its last words name the rows of the step that failed: these are to blame, and only these
    it vanished         SIGKILL, a crash in native code, a lost node: any unfinished row may be to blame, or none. Nodes
                        come and go, so this counts only where no row of the shard was finished between two such deaths.

Rows that a step held at two failures, or all unfinished rows of a shard whose process vanished three times without
progress, are *suspects*. The shard's other rows are finished without them; the suspects are tried when the job has
nothing else to do, with the engine for themselves: in small groups where there are many, and alone where their group died.
A row that ends the engine when it is alone in it is poison and becomes an error row. Where the process vanishes instead,
that must happen three times, so that a node which leaves at the wrong moment convicts nobody.

So a poison row costs at most 4 engine deaths where the engine fails (2 in company, 1 in a group, 1 alone), and at most 8
where the process vanishes (1 that made progress before it came to the row, 3 in company, 1 in a group, 3 alone).
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.commit import RecordLog, read_records
from pipelines.storage import Location

FAILURES = 2  # in which a step held a row, until it is a suspect
VANISHED = 3  # deaths without last words and without progress until all rows are suspects; the same of a row alone
FEW = 32  # suspects are tried alone from the start where there are no more
GROUPS = 16  # otherwise they are tried in about so many groups


@dataclass
class Attempt:
    """What one attempt at a shard left behind.

    Attributes:
        number: attempts are numbered from 0; two of one number ran at the same time.
        known: rows that were finished before it.
        trial: positions of the group that it tried last with the engine for itself; None in company.
        reason: why its engine failed; None where it left no last words.
        killed: the engine failed because something outside ended a part of it.
        in_step: positions of the rows in the step that failed.
        over: it ended without a death.
    """

    number: int
    known: int = 0
    trial: list[int] | None = None
    reason: str | None = None
    killed: bool = False
    in_step: list[int] = field(default_factory=list)
    over: bool = False

    @property
    def failed(self) -> bool:
        """Whether the engine failed by itself and said of which rows."""
        return self.reason is not None and not self.killed and bool(self.in_step)


@dataclass
class Diagnosis:
    """What a shard's earlier attempts say about its rows, by position.

    Attributes:
        poison: rows that ended the engine alone, with the reason.
        suspects: rows not to run in company.
        narrowed: suspects to try alone.
        deaths: in a row, with no row finished in between.
        last: the last reason.
    """

    poison: dict[int, str] = field(default_factory=dict)
    suspects: set[int] = field(default_factory=set)
    narrowed: set[int] = field(default_factory=set)
    deaths: int = 0
    last: str = "its process vanished"


def diagnose(attempts: Iterable[Attempt], unfinished: Sequence[int], known: int) -> Diagnosis:
    """Judge a shard by its earlier attempts.

    Args:
        attempts: all of this start, in any order.
        unfinished: positions of the rows that no attempt has finished.
        known: how many rows are finished.
    """
    found = Diagnosis()
    past = sorted(attempts, key=lambda attempt: attempt.number)
    blame: Counter[int] = Counter()
    vanished_alone: Counter[int] = Counter()
    idle = 0
    after = [attempt.known for attempt in past[1:]] + [known]
    for attempt, known_after in zip(past, after, strict=False):
        if attempt.over:
            continue
        found.last = attempt.reason or found.last
        progress = known_after > attempt.known
        found.deaths = 0 if progress else found.deaths + 1
        if attempt.trial is None:
            if attempt.failed:
                blame.update(attempt.in_step)
                continue
            idle = 0 if progress else idle + 1
            if idle >= VANISHED:
                found.suspects.update(unfinished)
            continue
        group = attempt.in_step if attempt.failed else attempt.trial
        found.narrowed.update(group)
        if len(group) == 1:
            vanished_alone[group[0]] += 1
            if attempt.failed or vanished_alone[group[0]] >= VANISHED:
                found.poison[group[0]] = attempt.reason or "its process vanished each time"
    if found.poison.keys() & set(unfinished):  # a verdict is progress
        found.deaths = 0
    open_rows = set(unfinished) - set(found.poison)
    found.suspects.update(row for row, count in blame.items() if count >= FAILURES)
    found.suspects.update(found.narrowed)
    found.suspects &= open_rows
    found.narrowed &= open_rows
    return found


def spread(found: Diagnosis, asked: Sequence[object], unfinished: Iterable[int]) -> None:
    """What is true of a row is true of those that ask for the same: where equal rows run once, a death is that of all of them.

    Args:
        found: is extended.
        asked: what each row asks for, by position; equal and hashable.
        unfinished: positions of the rows to look at.
    """
    reasons = {asked[row]: reason for row, reason in found.poison.items()}
    suspects = {asked[row] for row in found.suspects}
    for row in unfinished:
        if asked[row] in reasons:
            found.poison.setdefault(row, reasons[asked[row]])
        elif asked[row] in suspects:
            found.suspects.add(row)
    found.suspects -= found.poison.keys()
    found.narrowed -= found.poison.keys()


def groups(suspects: Iterable[int], narrowed: Iterable[int]) -> list[list[int]]:
    """In which order to try suspects: groups first, so that what is innocent is finished soon, then one by one."""
    alone = set(narrowed)
    rest = sorted(set(suspects) - alone)
    size = 1 if len(rest) <= FEW else -(-len(rest) // GROUPS)
    return [rest[start : start + size] for start in range(0, len(rest), size)] + [[row] for row in sorted(alone)]


class AttemptLog:
    """The attempts at one shard in one start of a job. An attempt writes through its own instance.

    Every method may raise `OSError`.
    """

    def __init__(self, directory: Location, start: str) -> None:
        """Args: `directory` of the shard's attempts; `start` of the job, whose attempts alone are counted."""
        self._directory = directory
        self._start = start
        self._log = RecordLog(directory)
        self._id = uuid.uuid4().hex
        self._number = 0

    def read(self) -> list[Attempt]:
        """What earlier attempts left."""
        attempts: dict[tuple[str, int], Attempt] = {}
        for payload in read_records(self._directory):
            record = json.loads(payload)
            if record.pop("start") != self._start:
                continue  # a new start forgives
            key = (record.pop("attempt"), record["number"])
            attempt = attempts.setdefault(key, Attempt(record["number"]))
            for name, value in record.items():
                setattr(attempt, name, value)
        self._number = max((attempt.number + 1 for attempt in attempts.values()), default=0)
        return list(attempts.values())

    def begin(self, known: int, group: Sequence[int] | None) -> None:
        """Before rows run: a `group` of suspects that has the engine for itself, or others in company. `known` are finished."""
        self._write(known=known, trial=group and list(group))

    def last_words(self, reason: str, killed: bool, in_step: Sequence[int]) -> None:
        """The engine has failed, and the process will end."""
        self._write(reason=reason, killed=killed, in_step=list(in_step))

    def over(self) -> None:
        """The attempt ends without a death."""
        self._write(over=True)
        self._log.close()

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    def _write(self, **facts: Any) -> None:
        record = {"start": self._start, "attempt": self._id, "number": self._number, **facts}
        self._log.append(json.dumps(record).encode())
