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
from nanovllm.utils.prefixes import MOST_LEVELS, Capacity, SharedPrefixes, SharingShape, Table

Ints = npt.NDArray[np.int64]

# A stretch is worth its own program from so many tokens on, and where it saves so many tokens of reading.
LEAST_TOKENS = 128
LEAST_SAVED = 512
# And a step only where it saves so many bytes a layer in all: what one more launch and its shortest items take (bench/NOTES.md).
LEAST_SAVED_BYTES = 64 << 20
# What joining one partial result costs, in tokens of reading.
ENTRY_TOKENS = 8
# A stretch is cut into parts where there are fewer items without it than run at the same time, but none has fewer tokens.
LEAST_PART = 256


class _Level(NamedTuple):
    """S stretches none of which follows another: their members `rows`, one stretch after the other, `sizes` [S], and their first blocks
    and ends [S]."""

    rows: Ints
    sizes: Ints
    starts: Ints
    ends: Ints


class PrefixSharing:
    """Follows the running sequences' block tables.

    Args:
        max_num_seqs, max_blocks: rows and columns of the block tables.
        shape: of the backend.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, shape: SharingShape) -> None:
        self.block_size = block_size
        self.shape = shape
        self.least_saved = -(-LEAST_SAVED_BYTES // shape.token_bytes)
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
        self.found = find_shared(tables, lens, row_slots, self.block_size, self.shape, self.capacity, self.least_saved)
        return self.found is not None, self.found


def find_shared(
    tables: Table,
    lens: Ints,
    slots: Ints,
    block_size: int,
    shape: SharingShape,
    capacity: Capacity,
    least_saved: int,
) -> SharedPrefixes | None:
    """What decodes share; None where it is not worth it.

    Args:
        tables: [D, W] block ids; lens: [D] tokens with the new one, whose block is its own; slots: [D].
        capacity: of the result; least_saved: tokens of reading.
    """
    levels = _levels(tables, (lens - 1) // block_size, block_size)
    saved = sum(int(((level.sizes - 1) * (level.ends - level.starts)).sum()) for level in levels) * block_size
    if not levels or saved < least_saved:
        return None
    tiles = [-(-level.sizes // shape.tile) for level in levels]
    work = sum(int((count * (level.ends - level.starts)).sum()) for count, level in zip(tiles, levels, strict=True))
    part = max(LEAST_PART // block_size, -(-work // shape.items), 1)
    while True:
        parts = [np.maximum((level.ends - level.starts) // part, 1) for level in levels]
        num_items = sum(int((count * of).sum()) for count, of in zip(parts, tiles, strict=True))
        entries = sum(int((count * level.sizes).sum()) for count, level in zip(parts, levels, strict=True))
        if num_items <= capacity.items and entries <= capacity.entries:
            break
        part *= 2  # with a part a stretch there is room
    counts = np.zeros(len(slots), dtype=np.int64)
    shared = np.zeros(len(slots), dtype=np.int64)
    items: list[Ints] = []
    num_members = 0
    for level, count, of in zip(levels, parts, tiles, strict=True):
        firsts = np.cumsum(level.sizes) - level.sizes
        leads = level.rows[firsts]
        stretch = np.repeat(np.arange(len(count)), count * of)
        index = np.arange(len(stretch)) - np.repeat(np.cumsum(count * of) - count * of, count * of)
        number, offset = index // of[stretch], index % of[stretch] * shape.tile
        blocks, begin = (level.ends - level.starts)[stretch], level.starts[stretch]
        items.append(
            np.stack(
                (
                    slots[leads][stretch],
                    (begin + number * blocks // count[stretch]) * block_size,
                    (begin + (number + 1) * blocks // count[stretch]) * block_size,
                    num_members + firsts[stretch] + offset,
                    np.minimum(level.sizes[stretch] - offset, shape.tile),
                    counts[leads][stretch] + number,
                ),
                axis=1,
            )
        )
        counts[level.rows] += np.repeat(count, level.sizes)
        shared[level.rows] = np.repeat(level.ends * block_size, level.sizes)
        num_members += len(level.rows)
    flat = np.concatenate(items)
    # The longest first, so that none of them starts last.
    flat = flat[np.argsort(flat[:, 1] - flat[:, 2], kind="stable")]
    rows_of = np.stack((slots, shared, np.cumsum(counts) - counts, counts))
    members = slots[np.concatenate([level.rows for level in levels])]
    return SharedPrefixes(flat.astype(np.int32), members.astype(np.int32), rows_of.astype(np.int32), saved)


def _levels(tables: Table, full: Ints, block_size: int) -> list[_Level]:
    """The stretches worth a program of their own, what comes first in a sequence in an earlier level. `full`: [D] full blocks."""
    found: list[_Level] = []
    rows = np.arange(len(full))
    # Of each row: its group, blocks that are attended already and that all of the group share, no fewer, and stretches so far.
    group, start, known, depth = np.zeros((4, len(full)), dtype=np.int64)
    while True:
        going = np.flatnonzero((full[rows] > known) & (depth < MOST_LEVELS))
        rows, group, start, known, depth = (array[going] for array in (rows, group, start, known, depth))
        # Those with the same next block go on together.
        blocks = tables[rows, known]
        order = np.lexsort((blocks, group))
        ends_group = np.ones(len(rows) + 1, dtype=bool)
        ends_group[1:-1] = (np.diff(blocks[order]) != 0) | (np.diff(group[order]) != 0)
        sizes = np.diff(np.flatnonzero(ends_group))
        going = order[np.repeat(sizes > 1, sizes)]
        if not len(going):
            return found
        rows, start, depth, sizes = rows[going], start[going], depth[going], sizes[sizes > 1]
        firsts = np.cumsum(sizes) - sizes
        group = np.repeat(np.arange(len(sizes)), sizes)
        # How far each goes with the first of its group.
        width = int(full[rows].max())
        paths = tables[rows, :width]
        differs = paths != paths[firsts][group]
        reach = np.minimum(np.where(differs.any(axis=1), differs.argmax(axis=1), width), full[rows])
        ends = np.minimum.reduceat(reach, firsts)
        starts = start[firsts]
        tokens = (ends - starts) * block_size
        worth = (tokens >= LEAST_TOKENS) & ((sizes - 1) * tokens - ENTRY_TOKENS * sizes >= LEAST_SAVED)
        if worth.any():
            found.append(_Level(rows[worth[group]], sizes[worth], starts[worth], ends[worth]))
        # Of those that are not worth it some may share more.
        start, known, depth = np.where(worth, ends, starts)[group], ends[group], depth + worth[group]
