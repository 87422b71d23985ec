"""What the decodes of a step share, as the engine says it to attention backends. Numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int32]

# Stretches that follow each other in one sequence.
MOST_LEVELS = 4


# Partial results that there is room for beside one a member.
SPARE_ENTRIES = 1024


class SharingShape(NamedTuple):
    """How a backend attends to what sequences share.

    Attributes:
        tile: sequences that an item of work is for at most; items: how many run at the same time.
        token_bytes: keys and values of a token in a layer of a rank.
    """

    tile: int
    items: int
    token_bytes: int


class Capacity(NamedTuple):
    """Sizes of the device's arrays."""

    items: int
    members: int
    entries: int

    @classmethod
    def of(cls, max_num_seqs: int) -> Capacity:
        """For so many sequences."""
        members = MOST_LEVELS * max_num_seqs
        return cls(members, members, members + SPARE_ENTRIES)


class SharedPrefixes(NamedTuple):
    """What D decodes share.

    Attributes:
        items: [I, 6] work on one part of a stretch for a tile of its members: the state slot whose blocks are read, first token, end,
            first of its members and how many, and which of their partial results it is.
        members: [M] state slots.
        rows: [4, D] of each decode: its state slot, tokens that are shared, first partial result and how many.
        saved: tokens that need not be read.
    """

    items: Table
    members: Table
    rows: Table
    saved: int
