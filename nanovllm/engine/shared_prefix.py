"""Which leading KV blocks the decodes of a step share, so that attention reads them once for all. Numpy only.

Sequences that share blocks form a tree: all begin with the same instructions, some of them go on with the same document. Each stretch
of it that several sequences share is attended once for all of them (`kernels.shared_prefix`), and what is a sequence's own by itself.
Source of the method: Hydragen (arXiv 2402.05099), cascade inference in FlashInfer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.utils.prefixes import MOST_LEVELS, Capacity, SharedPrefixes, Table

Ints = npt.NDArray[np.int64]

# A stretch is worth its own program from so many tokens on, and where it saves so many tokens of reading.
LEAST_TOKENS = 128
LEAST_SAVED = 512
# And a step only where it saves so many in all: what the launches cost.
LEAST_SAVED_STEP = 8192
# What joining one partial result costs, in tokens of reading.
ENTRY_TOKENS = 8
# A stretch is cut into parts of so many tokens, or fewer where there are few programs without it.
LEAST_PART = 256
TARGET_ITEMS = 64


class _Stretch(NamedTuple):
    rows: Ints
    start: int
    end: int


class PrefixSharing:
    """Follows the running sequences' block tables.

    Args:
        max_num_seqs, max_blocks: rows and columns of the block tables.
        tile: sequences that one program attends for, see `kernels.shared_prefix`.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, tile: int) -> None:
        self.block_size = block_size
        self.tile = tile
        self.capacity = Capacity.of(max_num_seqs)
        self.tables = np.full((max_num_seqs, max_blocks), -1, dtype=np.int32)
        self.ids: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.found: SharedPrefixes | None = None

    def update(
        self, batch: list[ScheduledSequence], num_decodes: int, new_blocks: Ints
    ) -> tuple[bool, SharedPrefixes | None]:
        """Take note of a step.

        Args:
            batch: ordered; new_blocks: [3, U] as in `ModelInput`.

        Returns:
            Whether its decodes share anything, and what where that is not what they shared in the step before.
        """
        slots, columns, blocks = new_blocks
        self.tables[slots, columns] = blocks
        ids = np.fromiter((item.seq.seq_id for item in batch[:num_decodes]), np.int64, num_decodes)
        if np.array_equal(ids, self.ids):
            return self.found is not None, None
        self.ids = ids
        row_slots = np.fromiter((item.seq.slot for item in batch[:num_decodes]), np.int64, num_decodes)
        lens = np.fromiter((item.start + 1 for item in batch[:num_decodes]), np.int64, num_decodes)
        tables = self.tables[row_slots]
        self.found = find_shared(tables, lens, row_slots, self.block_size, self.tile, self.capacity, LEAST_SAVED_STEP)
        return self.found is not None, self.found


def find_shared(
    tables: Table,
    lens: Ints,
    slots: Ints,
    block_size: int,
    tile: int,
    capacity: Capacity,
    least_saved: int,
) -> SharedPrefixes | None:
    """What decodes share; None where it is not worth it.

    Args:
        tables: [D, W] block ids; lens: [D] tokens with the new one, whose block is its own; slots: [D].
        tile: members of an item; capacity: of the result; least_saved: tokens of reading.
    """
    full = (lens - 1) // block_size
    stretches: list[_Stretch] = []
    _split(tables, full, np.arange(len(slots)), 0, 0, 0, block_size, stretches)
    saved = sum((len(s.rows) - 1) * (s.end - s.start) for s in stretches) * block_size
    if saved < least_saved:
        return None
    work = sum(-(-len(s.rows) // tile) * (s.end - s.start) for s in stretches) * block_size
    part = max(LEAST_PART, -(-work // TARGET_ITEMS))
    part = -(-part // block_size) * block_size
    counts = np.zeros(len(slots), dtype=np.int64)
    shared = np.zeros(len(slots), dtype=np.int64)
    items: list[tuple[int, int, int, int, int, int]] = []
    members: list[Ints] = []
    num_members = 0
    for rows, start, end in stretches:
        first, last, entry = start * block_size, end * block_size, int(counts[rows[0]])
        starts = range(first, last, part)
        for number, begin in enumerate(starts):
            for offset in range(0, len(rows), tile):
                count = min(tile, len(rows) - offset)
                items.append(
                    (int(slots[rows[0]]), begin, min(begin + part, last), num_members + offset, count, entry + number)
                )
        counts[rows] += len(starts)
        shared[rows] = last
        members.append(slots[rows])
        num_members += len(rows)
    if len(items) > capacity.items or num_members > capacity.members or counts.sum() > capacity.entries:
        return None
    # The longest first, so that none of them starts last.
    items.sort(key=lambda item: item[1] - item[2])
    rows_of = np.stack((slots, shared, np.cumsum(counts) - counts, counts))
    return SharedPrefixes(
        np.array(items, dtype=np.int32), np.concatenate(members).astype(np.int32), rows_of.astype(np.int32), saved
    )


def _split(
    tables: Table, full: Ints, rows: Ints, start: int, known: int, level: int, block_size: int, found: list[_Stretch]
) -> None:
    """Add the stretches that some of `rows` share, parents before children.

    Args:
        full: [D] full blocks of each decode.
        start: blocks that are attended already; known: blocks that all of `rows` share, no fewer.
    """
    rows = rows[full[rows] > known]
    if len(rows) < 2 or level == MOST_LEVELS:
        return
    # Those with the same next block go on together.
    blocks = tables[rows, known]
    order = np.argsort(blocks, kind="stable")
    for together in np.split(rows[order], np.flatnonzero(np.diff(blocks[order])) + 1):
        if len(together) < 2:
            continue
        part = tables[together, known : int(full[together].min())]
        same = (part == part[0]).all(axis=0)
        end = known + (len(same) if same.all() else int(same.argmin()))
        tokens = (end - start) * block_size
        if tokens >= LEAST_TOKENS and (len(together) - 1) * tokens - ENTRY_TOKENS * len(together) >= LEAST_SAVED:
            found.append(_Stretch(together, start, end))
            _split(tables, full, together, end, end, level + 1, block_size, found)
        else:  # some may share more
            _split(tables, full, together, start, end, level, block_size, found)
