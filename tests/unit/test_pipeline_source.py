"""How many shards an actor is given: its share of few, and one more than it works on of many."""

from __future__ import annotations

import pytest

from pipelines.source import in_flight


@pytest.mark.parametrize(
    ("shards", "least", "most", "limit", "expected"),
    [
        (1000, 2, 2, 8, (8, 9)),
        (8, 2, 2, 8, (4, 4)),  # the first actor that is ready leaves the other its half
        (7, 2, 2, 8, (4, 4)),
        (16, 2, 2, 8, (8, 8)),
        (17, 2, 2, 8, (8, 9)),
        (1, 4, 4, 8, (1, 1)),
        (3, 1, 1, 8, (3, 3)),
        (8, 1, 4, 8, (8, 9)),  # a pool that may grow does so where shards wait
        (30, 2, 8, 8, (8, 9)),
        (5, 2, 2, 1, (1, 2)),
        (0, 0, 0, 8, (1, 1)),
    ],
)
def test_shards_in_flight(shards: int, least: int, most: int, limit: int, expected: tuple[int, int]) -> None:
    assert in_flight(shards, least, most, limit) == expected
