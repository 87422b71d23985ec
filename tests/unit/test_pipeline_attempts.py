"""Which rows are blamed for the deaths that earlier attempts at a shard left behind, and what a poison row costs at most."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.attempts import FEW, Attempt, AttemptLog, diagnose, groups, spread
from pipelines.storage import resolve

ROWS = list(range(1000))


def test_two_failures_make_suspects_of_the_rows_that_were_in_both_steps() -> None:
    first = Attempt(0, known=0, reason="a", in_step=[1, 2, 3])
    second = Attempt(1, known=5, reason="b", in_step=[3, 4])
    assert diagnose([first], ROWS, 5).suspects == set()
    found = diagnose([second, first], ROWS, 5)
    assert (found.suspects, found.narrowed, found.poison, found.last) == ({3}, set(), {}, "b")


def test_nodes_that_leave_convict_nobody() -> None:
    """However often, as long as the shard gets on in between."""
    past = [Attempt(number, known=number // 2) for number in range(100)]
    found = diagnose(past, ROWS, 50)
    assert (found.suspects, found.poison, found.deaths) == (set(), {}, 0)
    assert diagnose([*past, Attempt(100, known=50), Attempt(101, known=50)], ROWS, 50).suspects == set()
    assert diagnose([*past, *(Attempt(n, known=50) for n in (100, 101, 102))], ROWS, 50).suspects == set(ROWS)


def test_a_rank_that_was_killed_from_outside_blames_nobody() -> None:
    past = [Attempt(n, known=n, reason="rank 1 was killed", killed=True, in_step=[7]) for n in range(5)]
    assert diagnose(past, ROWS, 5).suspects == set()


def test_attempts_that_ended_do_not_count() -> None:
    assert diagnose([Attempt(n, known=0, over=True) for n in range(9)], ROWS, 0).deaths == 0


def test_alone_a_failure_convicts_at_once_and_a_process_that_vanishes_after_three_times() -> None:
    assert diagnose([Attempt(0, trial=[4], reason="bad", in_step=[4])], ROWS, 0).poison == {4: "bad"}
    vanished = [Attempt(number, trial=[4]) for number in range(3)]
    assert diagnose(vanished[:2], ROWS, 0).poison == {}
    assert diagnose(vanished[:2], ROWS, 0).narrowed == {4}
    found = diagnose(vanished, ROWS, 0)
    assert (found.poison, found.suspects, found.deaths) == ({4: "its process vanished each time"}, set(), 0)


@pytest.mark.parametrize("suspects", [1, FEW, FEW + 1, 1000])
def test_groups_try_every_suspect_once(suspects: int) -> None:
    narrowed = {suspects // 2}
    tried = groups(range(suspects), narrowed)
    assert sorted(row for group in tried for row in group) == list(range(suspects))
    assert tried[-1] == [suspects // 2]
    assert len(tried) <= FEW + 1
    if suspects <= FEW:
        assert all(len(group) == 1 for group in tried)


@pytest.mark.parametrize("vanishes", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_a_poison_row_costs_a_bounded_number_of_deaths(tmp_path: Path, seed: int, vanishes: bool) -> None:
    """Attempts as the worker makes them, over a real log, with an engine that dies in a step that holds a poison row."""
    rng = random.Random(seed)
    rows, slots = 400, 64
    poison = set(rng.sample(range(rows), rng.choice((1, 1, 3))))
    place = resolve(str(tmp_path / "attempts"))
    finished: dict[int, str] = {}
    deaths = 0

    def run(log: AttemptLog, todo: list[int]) -> bool:
        """Steps of up to `slots` rows; what a step before has finished is kept. False where the engine dies."""
        for start in range(0, len(todo), slots):
            step = todo[start : start + slots]
            if poison.intersection(step):
                if not vanishes:
                    log.last_words("bad", False, step)
                return False
            finished.update(dict.fromkeys(step, "fine"))
        return True

    def attempt(apart: bool) -> str:
        log = AttemptLog(place, "start")
        past = log.read()
        found = diagnose(past, [row for row in range(rows) if row not in finished], len(finished))
        assert found.deaths < 10, "given up"
        finished.update(found.poison)
        log.begin(len(finished), None)
        if not run(log, [row for row in range(rows) if row not in finished and row not in found.suspects]):
            return "died"
        for group in groups(found.suspects, found.narrowed) if apart else ():
            log.begin(len(finished), group)
            if not run(log, group):
                return "died"
        log.over()
        return "done" if len(finished) == rows else "apart"

    apart = False
    while (outcome := attempt(apart)) != "done":
        deaths += outcome == "died"
        apart = apart or outcome == "apart"
    assert {row for row, how in finished.items() if how != "fine"} == poison
    assert deaths <= len(poison) * (8 if vanishes else 4)


def test_a_log_keeps_to_its_start_and_numbers_attempts(tmp_path: Path) -> None:
    place = resolve(str(tmp_path / "attempts"))
    make: Callable[[str], AttemptLog] = lambda start: AttemptLog(place, start)  # noqa: E731
    for start in ("a", "a", "b"):
        log = make(start)
        log.read()
        log.begin(3, [1, 2] if start == "b" else None)
        log.close()
    assert sorted(attempt.number for attempt in make("a").read()) == [0, 1]
    assert make("b").read() == [Attempt(0, known=3, trial=[1, 2])]
    assert make("c").read() == []


def test_rows_that_ask_for_the_same_share_a_verdict() -> None:
    asked = ["a", "b", "a", "c", "b", "a", "d"]
    twice = [Attempt(n, known=0, reason="x", in_step=[0, 1]) for n in range(2)]
    found = diagnose(twice, range(7), 0)
    spread(found, asked, [0, 1, 2, 3, 4, 6])
    assert (found.suspects, found.poison) == ({0, 1, 2, 4}, {})  # 5 is finished
    alone = [*twice, Attempt(2, known=2, trial=[0], reason="died", in_step=[0])]
    found = diagnose(alone, range(7), 2)
    spread(found, asked, range(7))
    assert found.poison == dict.fromkeys([0, 2, 5], "died")
    assert (found.suspects, found.narrowed) == ({1, 4}, set())
