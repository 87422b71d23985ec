"""Shared prefixes are attended once for all who share them: what is found of random trees, and that the result is the plain one."""

from __future__ import annotations

import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch

from nanovllm.engine import shared_prefix
from nanovllm.engine.shared_prefix import find_shared
from nanovllm.kernels import paged_decode as paged_decode_module
from nanovllm.kernels.fp8_cache import quantize_kv_rows
from nanovllm.kernels.paged_attention import context_slots, paged_decode_torch
from nanovllm.kernels.paged_decode import (
    LAUNCH,
    DecodeLaunch,
    decode_tile,
    make_decode_buffers,
    paged_decode,
    plan_decode,
)
from nanovllm.kernels.shared_prefix import (
    SharedBuffers,
    attend_shared,
    attend_shared_torch,
    make_shared_buffers,
    members_of_tile,
)
from nanovllm.kernels.triton_compat import HAS_TRITON
from nanovllm.utils.prefixes import MOST_LEVELS, Capacity, SharedPrefixes, SharingShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Tree:
    """Sequences whose block tables are paths in a random tree, each with some blocks of its own."""

    def __init__(self, rng: random.Random, count: int, block_size: int, widest: int = 4, longest: int = 6) -> None:
        self.block_size = block_size
        self.fresh = itertools.count(3)
        self.paths: list[list[int]] = []
        self._grow(rng, [], count, widest, longest)
        rng.shuffle(self.paths)
        self.lens = np.array([len(path) * block_size - rng.randrange(block_size) for path in self.paths])
        width = max(map(len, self.paths)) + 1
        # What is behind a table's end is left over from others.
        self.tables = np.full((count, width), 1, dtype=np.int32)
        for row, path in zip(self.tables, self.paths, strict=True):
            row[: len(path)] = path
        self.slots = np.array(rng.sample(range(count + 5), count))

    def _grow(self, rng: random.Random, path: list[int], count: int, widest: int, longest: int) -> None:
        path = [*path, *itertools.islice(self.fresh, rng.randint(0, longest))]
        if count == 1 or rng.random() < 0.2:
            for _ in range(count):
                self.paths.append([*path, *itertools.islice(self.fresh, rng.randint(1, 3))])
            return
        parts = min(count, rng.randint(1, widest))
        cuts = sorted(rng.sample(range(1, count), parts - 1)) if parts > 1 else []
        for first, last in itertools.pairwise([0, *cuts, count]):
            self._grow(rng, path, last - first, widest, longest)


def check(tree: Tree, found: SharedPrefixes, tile: int, capacity: Capacity) -> None:
    """Each sequence's shared tokens are covered once, by blocks that it has, and have results of their own."""
    size = tree.block_size
    row_of = {int(slot): row for row, slot in enumerate(tree.slots)}
    rows = {int(slot): numbers for slot, *numbers in found.rows.T.tolist()}
    assert rows.keys() == row_of.keys()
    covered: dict[int, list[tuple[int, int, int]]] = {slot: [] for slot in rows}
    for rep, start, end, first, count, number in found.items.tolist():
        assert start < end and start % size == 0 and end % size == 0 and 1 <= count <= tile
        members = found.members[first : first + count].tolist()
        assert len(set(members)) == count
        for slot in members:
            covered[slot].append((start, end, number))
            ours, theirs = (tree.tables[row_of[one], start // size : end // size] for one in (slot, rep))
            assert (ours == theirs).all()
    taken: set[int] = set()
    for slot, (shared, entry, count) in rows.items():
        assert shared <= tree.lens[row_of[slot]] - 1, "the new token's block is its own"
        parts = sorted(covered[slot])
        assert [start for start, _, _ in parts] + [shared] == [0, *(end for _, end, _ in parts)], (
            "no gap, nothing twice"
        )
        assert sorted(number for _, _, number in parts) == list(range(count))
        entries = set(range(entry, entry + count))
        assert not entries & taken
        taken |= entries
    assert max(taken, default=0) < capacity.entries and len(found.items) <= capacity.items
    assert found.saved > 0


@pytest.mark.parametrize("seed", range(60))
def test_what_sequences_share(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(shared_prefix, "LEAST_TOKENS", rng.choice([1, 64]))
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED", rng.choice([1, 100]))
    monkeypatch.setattr(shared_prefix, "LEAST_PART", rng.choice([16, 64, 256]))
    tree = Tree(rng, rng.choice([2, 5, 30, 120]), rng.choice([16, 64]))
    shape = SharingShape(rng.choice([1, 4, 32]), rng.choice([1, 20, 200]), 1)
    # With one part of each stretch there is room.
    capacity = Capacity(1000, 1000, rng.choice([MOST_LEVELS * len(tree.slots), 100_000]))
    found = find_shared(tree.tables, tree.lens, tree.slots, tree.block_size, shape, capacity, least_saved=1)
    alone = len({path[0] for path in tree.paths}) == len(tree.paths)
    if found is not None:
        check(tree, found, shape.tile, capacity)
    assert not (alone and found is not None)


def test_two_levels_and_what_is_not_worth_it() -> None:
    """1,000 tokens that all share, then documents for eight each, one block of which is not worth a program."""
    size, instructions = 64, list(range(16))
    paths = []
    for document in range(4):
        own = list(range(100 * (document + 1), 100 * (document + 1) + (10 if document else 1)))
        paths += [[*instructions, *own, 1000 + 10 * document + row] for row in range(8)]
    lens = np.array([len(path) * size for path in paths])
    tables = np.full((32, 30), 5, dtype=np.int32)
    for row, path in zip(tables, paths, strict=True):
        row[: len(path)] = path
    arguments = (tables, lens, np.arange(32), size, SharingShape(32, 33, 1))
    found = find_shared(*arguments, Capacity.of(32), 1)
    assert found is not None
    assert found.rows[1].tolist() == [16 * size] * 8 + [26 * size] * 24
    assert found.saved == 31 * 16 * size + 3 * 7 * 10 * size
    few = find_shared(*arguments, Capacity(4, 1000, 1000), 1)
    assert few is not None and len(few.items) == 4 < len(found.items), "room for one part of each"
    assert find_shared(*arguments, Capacity.of(32), found.saved + 1) is None
    tables[:] = np.arange(32 * 30).reshape(32, 30)
    assert find_shared(*arguments, Capacity.of(32), 1) is None


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("seed", "block_size", "group", "kv_heads", "dim", "programs", "softcap", "fp8"),
    [
        (0, 16, 2, 2, 64, 1, 0.0, False),
        (1, 32, 5, 1, 80, 40, 0.0, True),
        (2, 64, 1, 2, 64, 6, 20.0, False),
        (3, 16, 8, 1, 128, 90, 0.0, False),
    ],
)
def test_attention_equals_the_plain_one(
    seed: int,
    block_size: int,
    group: int,
    kv_heads: int,
    dim: int,
    programs: int,
    softcap: float,
    fp8: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("LEAST_TOKENS", 1), ("LEAST_SAVED", 1), ("ENTRY_TOKENS", 0), ("LEAST_PART", 32)):
        monkeypatch.setattr(shared_prefix, name, value)
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    monkeypatch.setattr(paged_decode_module, "SHARED_VALUES", 1)  # fewer at a time than there are
    rng = random.Random(seed)
    found = None
    while found is None or found.rows[3].max() < 2:  # a random tree may share nothing
        tree = Tree(rng, 9, block_size, longest=3)
        room = Capacity(500, 500, 500)
        shape = SharingShape(members_of_tile(group), 33, 1)
        found = find_shared(tree.tables, tree.lens, tree.slots, block_size, shape, room, least_saved=1)
    generator = torch.Generator().manual_seed(seed)
    blocks, heads = int(tree.tables.max()) + 2, group * kv_heads
    k, v = torch.randn(2, blocks, block_size, kv_heads, dim, generator=generator).to(DEVICE)
    scales = None
    if fp8:
        (k, v), row_scales = quantize_kv_rows(torch.stack((k, v * 100)))
        scales = row_scales.permute(1, 3, 2, 0).contiguous()
    # As a model's, of which narrow scores' two parts lose nothing.
    q = (2 * torch.randn(9, heads, dim, generator=generator)).bfloat16().float().to(DEVICE)
    table = torch.zeros(20, tree.tables.shape[1], dtype=torch.int32, device=DEVICE)
    table[tree.slots] = torch.from_numpy(tree.tables).to(DEVICE)
    slots, lens = torch.from_numpy(tree.slots).to(DEVICE), torch.from_numpy(tree.lens).to(DEVICE)
    expected = torch.cat(
        [
            paged_decode_torch(
                q[row : row + 1],
                k,
                v,
                context_slots(table[slots[row : row + 1]], block_size, int(length)),
                None,
                dim**-0.5,
                softcap,
                scales,
            )
            for row, length in enumerate(tree.lens)
        ]
    )
    tile = decode_tile(dim, torch.float32)
    # A GPU's products of eight bits keep 14 bits of their sums.
    narrow = DecodeLaunch(narrow_scores=fp8 and DEVICE.type == "cpu")
    for attend, launch in ((attend_shared_torch, narrow), (partial(attend_shared, programs=3), LAUNCH)):
        shared = make_shared_buffers(500, 500, 500, 20, heads, dim, DEVICE)
        shared.out.fill_(float("nan"))
        shared.lse.fill_(float("nan"))
        load(shared, found)
        buffers = make_decode_buffers(9, programs, heads, kv_heads, dim, DEVICE)
        out = torch.full_like(q, float("nan"))
        plan_decode(slots, lens, programs, buffers, tile, shared=shared)
        assert shared.rows[slots].tolist() == list(range(9))
        attend(q, k, v, table, shared, dim**-0.5, softcap, scales)
        options = {"tile": tile, "softcap": softcap, "shared": shared, "scales": scales}
        paged_decode(q, k, v, table, programs, buffers, dim**-0.5, out, launch=launch, **options)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * (100 if fp8 else 1))


def load(buffers: SharedBuffers, found: SharedPrefixes) -> None:
    buffers.num_items[0] = len(found.items)
    buffers.items[: len(found.items)] = torch.from_numpy(found.items).to(DEVICE)
    buffers.members[: len(found.members)] = torch.from_numpy(found.members).to(DEVICE)
    slots, *numbers = torch.from_numpy(found.rows).to(DEVICE)
    for target, own in zip((buffers.skipped, buffers.entries, buffers.counts), numbers, strict=True):
        target[slots.long()] = own
