"""Attention over the paged cache and the ends of a decode step, against their torch references, as compiled or interpreted.

What no kernel may look at is poisoned: outputs and buffers before a call, cache blocks of no sequence (NaN), and the rest of a
sequence's last block (large, but finite: the engine clears its pool).
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels import paged_decode as paged_decode_module
from nanovllm.kernels.decode_step import advance, advance_torch, gather_decode, gather_decode_torch
from nanovllm.kernels.fp8_cache import FP8, quantize_kv_rows
from nanovllm.kernels.paged_attention import context_slots, gather_kv, paged_decode_torch, paged_prefill_torch
from nanovllm.kernels.paged_decode import (
    FP8_LAUNCH,
    ITEM_TILES,
    LAUNCH,
    MIN_PART_TOKENS,
    NARROW_LAUNCH,
    DecodeBuffers,
    DecodeLaunch,
    decode_programs,
    decode_tile,
    make_decode_buffers,
    paged_decode,
    plan_decode,
)
from nanovllm.kernels.paged_prefill import BLOCK_M, BLOCK_N, NUM_WARPS, paged_prefill, prefill_tiles
from nanovllm.kernels.sampling import LEAST_KEY
from nanovllm.kernels.triton_compat import DEFAULT_SMS, HAS_TRITON
from nanovllm.layers.attention import AttentionBackend, AttentionBatch, AttentionSpec
from nanovllm.layers.backends import triton_backend
from nanovllm.layers.backends.torch_backend import TorchBackend

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter's bfloat16 product is wrong.
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]

POISON = 1 << 30

DIMS = [64, 80, 96, 128, 256]
BLOCK_SIZES = [16, 32, 64, 128, 256]
GROUPS = [1, 2, 3, 5, 7, 8, 16]
LAYOUTS = ["apart", "interleaved", "heads first"]


class Case(NamedTuple):
    """One model's shapes and the order of its cache in memory."""

    dim: int
    block_size: int
    group: int
    kv_heads: int
    layout: str


# Every head dim with every block size; the rest in turns.
CASES = [
    Case(dim, block_size, GROUPS[i % 7], (2, 1, 1, 1, 3, 1, 1, 1)[i % 8] * (2 if GPU else 1), LAYOUTS[i % 3])
    for i, (dim, block_size) in enumerate(itertools.product(DIMS, BLOCK_SIZES))
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Cache:
    """Random keys and values of sequences of `lens` tokens, whose block ids and slots are scattered."""

    def __init__(self, case: Case, lens: list[int], dtype: torch.dtype, seed: int, unowned: float = math.nan) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // case.block_size) for length in lens]
        rows, spare = len(lens) + 3, 4
        ids = torch.randperm(sum(counts) + spare, generator=generator)
        slots = torch.randperm(rows, generator=generator)[: len(lens)]
        table = ids[torch.randint(spare, (rows, max(counts, default=0) + 2), generator=generator)]
        shape = len(ids), case.block_size, case.kv_heads, case.dim
        values = torch.full((2, *shape), unowned)
        start = spare
        for slot, length, count in zip(slots.tolist(), lens, counts, strict=True):
            table[slot, :count] = ids[start : start + count]
            values[:, ids[start : start + count]] = 1e4
            at = context_slots(table[slot : slot + 1], case.block_size, length)[0]
            values.view(2, -1, *shape[2:])[:, at] = torch.randn(2, length, *shape[2:], generator=generator)
            start += count
        self.case, self.lens = case, lens
        self.table, self.slots = table.int().to(DEVICE), slots.to(DEVICE)
        self.k, self.v = self.stored(values.to(DEVICE, dtype))
        self.scales: torch.Tensor | None = None

    def stored(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values apart, as neighbours in each block, or with heads before tokens and gaps between rows."""
        blocks, block_size, heads, dim = values.shape[1:]
        if self.case.layout == "apart":
            pool = values.new_empty(2, blocks, block_size, heads, dim)
        elif self.case.layout == "interleaved":
            pool = values.new_empty(blocks, 2, block_size, heads, dim).transpose(0, 1)
        else:
            gap = 0x7F if values.dtype == torch.uint8 else math.nan  # which is a NaN of eight bits
            pool = values.new_full((2, blocks, heads, block_size, dim + 16), gap).transpose(2, 3)[..., :dim]
        pool.copy_(values)
        return pool[0], pool[1]

    def quantize(self) -> None:
        """Keys and values in eight bits from here on, those of a token between a thousandth and a thousand times what they were."""
        generator = torch.Generator().manual_seed(1)
        factors = 10 ** (torch.rand(2, *self.k.shape[:3], generator=generator) * 6 - 3)
        factors[0] = factors[0].clamp(max=1)  # of keys: no single score may decide
        values = torch.stack((self.k, self.v)) * factors[..., None].to(self.k)
        rows, scales = quantize_kv_rows(values)
        stored = self.stored(rows.view(torch.uint8))
        self.k, self.v = (cache.view(rows.dtype) for cache in stored)
        self.scales = scales.permute(1, 3, 2, 0).contiguous()

    def queries(self, tokens: int, dtype: torch.dtype, seed: int, scale: float = 3.0) -> torch.Tensor:
        """Large enough that a few tokens take most of the weight."""
        case, generator = self.case, torch.Generator().manual_seed(seed)
        q = torch.randn(tokens, case.kv_heads * case.group, case.dim, generator=generator) * scale
        return q.to(DEVICE, dtype)

    def next_layer(self) -> Cache:
        """The same sequences with other contents: keys and values change places."""
        layer = copy.copy(self)
        layer.k, layer.v = self.v, self.k
        return layer

    @functools.cached_property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scales is None:
            return self.k.float().contiguous(), self.v.float().contiguous()
        blocks, block_size = self.k.shape[:2]
        every = torch.arange(blocks * block_size, device=DEVICE).view(blocks, block_size)
        return gather_kv(self.k.contiguous(), self.v.contiguous(), self.scales, every, torch.float32)

    def attended(self, i: int, q: torch.Tensor, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
        """What the last tokens of sequence `i` see, `q` [C, Hq, D], by the references in float32."""
        if self.lens[i] == 0:
            return torch.zeros_like(q, dtype=torch.float32)
        slots = context_slots(self.table[self.slots[i : i + 1]], self.case.block_size, self.lens[i])
        if len(q) == 1:
            slots = slots[:, -window:]
            return paged_decode_torch(q.float(), *self.exact, slots, None, self.case.dim**-0.5, softcap)
        return paged_prefill_torch(q.float(), *self.exact, slots[0], self.case.dim**-0.5, window, softcap)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-5) -> None:
    """`expected` is in float32; bfloat16's weights and results round to 8 bits."""
    tolerance = tolerance if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def assert_close_rows(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Rows of any size, each to a part of its largest value."""
    largest = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert_close(actual / largest.to(actual.dtype), expected / largest)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def poison(buffers: DecodeBuffers) -> None:
    """All but the arrivals, which are a launch's to leave as it found them."""
    assert not buffers.arrived.any()
    buffers.starts.fill_(POISON)
    buffers.items.fill_(POISON)
    buffers.partial_out.fill_(math.nan)
    buffers.partial_lse.fill_(math.nan)


def some_lens(rng: random.Random) -> list[int]:
    """Padding, the shortest, an exact block or tile, one far longer than the rest."""
    lens = [0, 1, rng.randint(2, 31), rng.choice([32, 64, 128]), rng.randint(130, 200)]
    if GPU:
        lens += [rng.randint(1, 700) for _ in range(40)] + [0, rng.randint(5000, 9000)]
    rng.shuffle(lens)
    return lens


def decoded(
    cache: Cache,
    q: torch.Tensor,
    programs: int,
    buffers: DecodeBuffers,
    tile: int | None = None,
    item_tiles: int = ITEM_TILES,
    window: int = 0,
    softcap: float = 0.0,
    launch: DecodeLaunch = LAUNCH,
) -> torch.Tensor:
    """A planned launch on poisoned buffers; only the batch's rows are written, and zeros are those of padding."""
    batch, lens = len(cache.lens), torch.tensor(cache.lens, device=DEVICE)
    tile = tile or decode_tile(cache.case.dim, q.dtype)
    poison(buffers)
    plan_decode(cache.slots, lens, programs, buffers, tile, item_tiles, window)
    padded = nans(batch + 2, *q.shape[1:], dtype=q.dtype)
    paged_decode(
        q,
        cache.k,
        cache.v,
        cache.table,
        programs,
        buffers,
        cache.case.dim**-0.5,
        padded[1:-1],
        tile=tile,
        launch=launch,
        window=window,
        softcap=softcap,
        scales=cache.scales,
    )
    assert padded[[0, -1]].isnan().all()
    assert not padded[1:-1][lens == 0].any()
    assert not buffers.arrived.any(), "arrivals are counted from 0 again by the next launch"
    return padded[1:-1]


def attended_by_all(cache: Cache, q: torch.Tensor, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
    return torch.cat([cache.attended(i, q[i : i + 1], window, softcap) for i in range(len(cache.lens))])


def buffers_for(case: Case, batch: int, programs: int) -> DecodeBuffers:
    return make_decode_buffers(batch, programs, case.kv_heads * case.group, case.kv_heads, case.dim, DEVICE)


def planned(buffers: DecodeBuffers, programs: int) -> list[list[list[int]]]:
    """The items of each program."""
    starts, items = buffers.starts[: programs + 1].tolist(), buffers.items.tolist()
    return [items[first:last] for first, last in itertools.pairwise(starts)]


@needs_triton
@each_dtype
@each_case
def test_paged_decode(dtype: torch.dtype, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    rng = random.Random(str(case))
    tile, buffers = decode_tile(case.dim, dtype), buffers_for(case, 60, 4000 if GPU else 100)
    # One program for all, several sequences a program, a tile a program and some programs without.
    for seed, programs in enumerate((1, rng.randint(2, 5), None)):
        cache, item_tiles = Cache(case, some_lens(rng), dtype, seed), rng.choice([0, 1, 2, 5])
        most = 1 if programs == 1 else -(-max(cache.lens) // tile) + item_tiles
        programs = programs or sum(item_tiles + max(1, -(-length // tile)) for length in cache.lens) + 3
        q = cache.queries(len(cache.lens), dtype, seed)
        before = q.clone()
        out = decoded(cache, q, programs, buffers, item_tiles=item_tiles)
        assert_close(out, attended_by_all(cache, q))
        assert torch.equal(q, before)
        counts = [item[5] for items in planned(buffers, programs) for item in items]
        assert max(counts) == most or programs in range(2, 6)


@needs_triton
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("block_size", [16, 64])
def test_paged_decode_by_other_tiles(tile: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    case = Case(64, block_size, 3, 1, "apart")
    cache = Cache(case, [65, 0, 130, 17], torch.float32, 1)
    q = cache.queries(4, torch.float32, 2)
    for programs in (1, 2, 4, 30):
        assert_close(decoded(cache, q, programs, buffers_for(case, 4, 30), tile), attended_by_all(cache, q))


@needs_triton
@pytest.mark.parametrize(("group", "item_tiles"), [(16, 0), (16, 1), (16, 2), (16, 5), (1, 5)])
def test_paged_decode_by_every_number_of_programs(group: int, item_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that begin at a sequence, before its first tile and in it; items without tokens, several in a row among them."""
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    case = Case(128, 32, group, 1, "apart")
    cache = Cache(case, [33, 0, 1, 100, 0, 0, 64], torch.float32, 1)
    q = cache.queries(7, torch.float32, 2)
    expected, buffers = attended_by_all(cache, q), buffers_for(case, 7, 60)
    empty = 0
    for programs in (1, 2, 3, 5, 8, 60):
        assert_close(decoded(cache, q, programs, buffers, item_tiles=item_tiles), expected)
        split = [item for items in planned(buffers, programs) for item in items if item[5] > 1]
        empty += sum(item[2] == item[3] for item in split)
    assert bool(empty) == (item_tiles > 0)


@needs_triton
@pytest.mark.parametrize(
    ("lens", "programs", "most_items", "most_parts"),
    [
        ([1400 * (1 + 10 * GPU)], 5, 1, 5),
        ([1000 + 9000 * GPU], 90, 1, 40 if GPU else 5),
        ([0, 300, 5, 0, 64, 1, 200, 31, 0], 1, 9, 1),
        ([1, 2, 0, 40, 3, 1500, 4, 5, 0, 6, 7, 8], 4, 7, 4),
        ([0] * 12, 40, 4, 2),
    ],
)
def test_paged_decode_as_the_engine_plans(lens: list[int], programs: int, most_items: int, most_parts: int) -> None:
    """One sequence in many programs, one program with many sequences, nothing but padding: with parts as short as they may be."""
    case = Case(128, 16, 2, 2, "interleaved")
    cache, buffers = Cache(case, lens, torch.float32, 1), buffers_for(case, len(lens), programs)
    for seed in range(2):
        q = cache.queries(len(lens), torch.float32, seed)
        assert_close(decoded(cache, q, programs, buffers), attended_by_all(cache, q))
        plan = planned(buffers, programs)
        assert (max(map(len, plan)), max(item[5] for items in plan for item in items)) == (most_items, most_parts)


@needs_triton
@each_dtype
def test_one_plan_serves_every_layer(dtype: torch.dtype) -> None:
    """Launches that share a plan and buffers, whose partial results are of the layer before; all runs of one agree in every bit."""
    case = Case(64, 16, 2, 2, "apart")
    lens = [160, 0, 300, 33] * (16 if GPU else 1)
    batch, programs = len(lens), len(lens) + 1
    layers = [Cache(case, lens, dtype, 5)]
    layers.append(layers[0].next_layer())
    tile = decode_tile(case.dim, dtype)
    buffers, context_lens = buffers_for(case, batch, programs), torch.tensor(lens, device=DEVICE)
    poison(buffers)
    plan_decode(layers[0].slots, context_lens, programs, buffers, tile)
    assert any(item[5] > 1 for items in planned(buffers, programs) for item in items)
    q = layers[0].queries(batch, dtype, 6)
    results: list[list[torch.Tensor]] = [[], []]
    for i in [0, 1] * (200 if GPU else 2):
        out, cache = torch.full_like(q, math.nan), layers[i]
        paged_decode(q, cache.k, cache.v, cache.table, programs, buffers, case.dim**-0.5, out, tile=tile)
        results[i].append(out)
    assert not buffers.arrived.any()
    for cache, outs in zip(layers, results, strict=True):
        assert_close(outs[0], attended_by_all(cache, q))
        assert all(torch.equal(out, outs[0]) for out in outs)


@needs_triton
def test_whichever_item_arrives_last_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs in turn: to have a sequence's first item join, the others are counted as there already."""
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    case, programs = Case(64, 16, 2, 2, "apart"), 3
    cache, buffers = Cache(case, [70, 5, 500, 300], torch.float32, 1), buffers_for(case, 4, programs)
    q, tile = cache.queries(4, torch.float32, 2), 32
    expected = decoded(cache, q, programs, buffers, tile)
    assert_close(expected, attended_by_all(cache, q))
    plan = planned(buffers, programs)
    assert any(item[5] > 1 and item[4] > 0 and item is items[-1] for items in plan for item in items)
    counts = {item[0]: item[5] for items in plan for item in items}
    # The first KV head has the results of the launch before, equal to this one's; the second has none of its own yet.
    others = torch.tensor([counts[row] - 1 for row in range(4)], dtype=torch.int32, device=DEVICE)
    buffers.arrived[:, 0] = others
    buffers.partial_out[:, case.group :] = buffers.partial_lse[:, case.group :] = math.nan
    out = torch.full_like(q, math.nan)
    paged_decode(q, cache.k, cache.v, cache.table, programs, buffers, case.dim**-0.5, out, tile=tile)
    assert torch.equal(out, expected)
    assert not buffers.arrived[:, 1].any()
    assert GPU or torch.equal(buffers.arrived[:, 0], others), "counted from 0 after the join"


@needs_triton
def test_large_scores_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of some hundreds: the weights of whole items vanish beside another's, in either order."""
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    case = Case(64, 32, 2, 1, "apart")
    cache = Cache(case, [100, 180, 40], torch.float32, 3)
    q = cache.queries(3, torch.float32, 4, scale=200.0)
    for programs in (1, 4, 20):
        assert_close(decoded(cache, q, programs, buffers_for(case, 3, 20)), attended_by_all(cache, q), 5e-3)
    chunk_lens = [60, 180, 2]
    q = cache.queries(sum(chunk_lens), torch.float32, 5, scale=200.0)
    assert_close(prefilled(cache, q, chunk_lens), prefill_reference(cache, q, chunk_lens), 5e-3)


def check_plan(
    lens: list[int],
    programs: int,
    tile: int = 32,
    item_tiles: int = ITEM_TILES,
    least: int = MIN_PART_TOKENS,
    dtype: torch.dtype = torch.int64,
) -> None:
    """Equal parts of all tiles laid end to end, `item_tiles` before each sequence's; nothing is written that is not read."""
    buffers = make_decode_buffers(len(lens) + 3, programs + 5, 1, 1, 16, DEVICE)
    poison(buffers)
    slots = [3 * row + 1 for row in reversed(range(len(lens)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_decode_module, "MIN_PART_TOKENS", least)
        on_device = torch.tensor([slots, lens], dtype=dtype, device=DEVICE)
        plan_decode(on_device[0], on_device[1], programs, buffers, tile, item_tiles)

    # A row for every tile: what a part has of a sequence is a run of equal rows.
    laid = [row for row, length in enumerate(lens) for _ in range(item_tiles + max(1, -(-length // tile)))]
    part = max(-(-len(laid) // programs), least // tile, 1)
    runs = [
        [(row, len(list(run))) for row, run in itertools.groupby(laid[at : at + part])]
        for at in range(0, programs * part, part)
    ]
    counts = collections.Counter(row for run in runs for row, _ in run)
    starts, items = buffers.starts.tolist(), buffers.items.tolist()
    assert starts[: programs + 1] == [0, *itertools.accumulate(map(len, runs))]
    assert starts[programs + 1 :] == [POISON] * 5
    total = starts[programs]
    assert total <= len(lens) + programs - 1
    assert items[total:] == [[POISON] * 8] * (len(items) - total)
    assert not buffers.arrived.any()

    pieces: list[list[int]] = [[] for _ in lens]
    first = dict[int, int]()
    done = [-item_tiles for _ in lens]
    for i, (item, (row, cost)) in enumerate(zip(items, itertools.chain(*runs), strict=False)):
        begin, done[row] = max(done[row], 0), done[row] + cost
        end = min(max(done[row], 0) * tile, lens[row])
        assert item == [row, slots[row], begin * tile, end, first.setdefault(row, i), counts[row], POISON, POISON]
        pieces[row] += range(item[2], item[3])
    assert pieces == [list(range(length)) for length in lens], "every token once, in order"


@needs_triton
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.one_of(st.just(0), st.integers(0, 70), st.integers(0, 1500)), min_size=1, max_size=20),
    programs=st.one_of(st.integers(1, 8), st.integers(1, 300)),
    tile=st.sampled_from([16, 32, 64]),
    item_tiles=st.sampled_from([0, 1, ITEM_TILES, 5]),
    least=st.sampled_from([1, 32, MIN_PART_TOKENS]),
)
def test_plan_decode(lens: list[int], programs: int, tile: int, item_tiles: int, least: int) -> None:
    check_plan(lens, programs, tile, item_tiles, least)


@needs_triton
@pytest.mark.parametrize(
    ("lens", "programs"),
    [
        ([0], 1),
        ([1], 4096),
        ([100_000], 1),
        ([100_000], 64),
        ([3000] * 300, 1500),
        ([5] * 257 + [9000], 528),
        ([0] * 40, 1100),
        ([0] * 256, 255),
        ([4096] * 16, 256),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_plan_decode_of_extremes(lens: list[int], programs: int, dtype: torch.dtype) -> None:
    check_plan(lens, programs, dtype=dtype)


def test_decode_programs_fill_the_device() -> None:
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count if GPU else DEFAULT_SMS
    for kv_heads in (1, 3, 8, 5000):
        programs = decode_programs(kv_heads, DEVICE, 2)
        assert programs == 1 or programs * kv_heads <= sms * 2 < (programs + 1) * kv_heads
    assert decode_programs(8, torch.device("cpu"), 1) == 16


def test_decode_tiles_are_powers_of_2() -> None:
    """Tiles and blocks divide one another; bfloat16's are of 16 KiB where tokens are not too small or too large for it."""
    for dim in range(16, 513, 8):
        assert decode_tile(dim, torch.float32) in (16, 32, 64) and decode_tile(dim, torch.bfloat16) in (16, 32, 64)
    assert [decode_tile(dim, torch.bfloat16) for dim in (64, 80, 128, 256)] == [64, 64, 64, 32]
    assert [decode_tile(dim, FP8, NARROW_LAUNCH) for dim in (16, 64, 128, 256, 512)] == [64] * 5
    assert [decode_tile(dim, FP8, FP8_LAUNCH) for dim in (64, 128, 256)] == [64, 32, 16]


def prefilled(
    cache: Cache,
    q: torch.Tensor,
    query_lens: list[int],
    first_row: int = 0,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """A launch over the sequences' last tokens; `q` has `first_row` rows before them and may have some after them."""
    tiles = prefill_tiles(
        cache.slots.cpu().numpy(), np.array(query_lens), np.array(cache.lens), first_row, cache.case.group, block_m
    )
    out, end = torch.full_like(q, math.nan), first_row + sum(query_lens)
    paged_prefill(
        q,
        cache.k,
        cache.v,
        cache.table,
        torch.from_numpy(tiles).to(DEVICE),
        cache.case.dim**-0.5,
        out,
        block_m=block_m,
        block_n=block_n,
        num_warps=NUM_WARPS if block_m == BLOCK_M else 4,
        window=window,
        softcap=softcap,
        scales=cache.scales,
    )
    assert out[:first_row].isnan().all() and out[end:].isnan().all(), "other rows are not touched"
    return out[first_row:end]


def prefill_reference(
    cache: Cache, q: torch.Tensor, query_lens: list[int], window: int = 0, softcap: float = 0.0
) -> torch.Tensor:
    return torch.cat([cache.attended(i, part, window, softcap) for i, part in enumerate(q.split(query_lens))])


def hide(cache: Cache, i: int, before: int) -> None:
    """Make NaNs of all tokens of sequence `i` before `before` that share no tile with later ones: nobody may read them."""
    before -= before % 64
    slots = context_slots(cache.table[cache.slots[i : i + 1]], cache.case.block_size, max(before, 0))[0]
    for stored in (cache.k, cache.v):
        stored[slots // cache.case.block_size, slots % cache.case.block_size] = math.nan


def test_references_of_windows_and_softcaps() -> None:
    """Token by token, by the definitions."""
    cache = Cache(Case(16, 16, 2, 2, "apart"), [50], torch.float32, 3)
    k, v = cache.exact
    slots = context_slots(cache.table[cache.slots], 16, 50)[0]
    keys, values = k.view(-1, 2, 16)[slots], v.view(-1, 2, 16)[slots]
    q = cache.queries(20, torch.float32, 4)
    for window, softcap in ((7, 0.0), (0, 2.0), (33, 1.5), (1, 0.0), (100, 0.0)):
        out = paged_prefill_torch(q, k, v, slots, 0.3, window, softcap)
        for i, head in itertools.product(range(20), range(4)):
            end = 31 + i
            seen = slice(max(0, end - window) if window else 0, end)
            scores = keys[seen, head // 2] @ q[i, head] * 0.3
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            torch.testing.assert_close(out[i, head], scores.softmax(0) @ values[seen, head // 2])
        one = paged_decode_torch(q[-1:], k, v, slots[None, -window:], None, 0.3, softcap)
        torch.testing.assert_close(one, out[-1:])


SMALL, LARGE = Case(64, 16, 3, 1, "apart"), Case(80, 128, 2, 2, "interleaved")
each_window = pytest.mark.parametrize(
    ("window", "softcap", "case"),
    [(1, 0.0, SMALL), (17, 0.0, SMALL), (64, 0.0, LARGE), (100, 20.0, SMALL), (0, 5.0, LARGE), (1000, 0.0, SMALL)],
)


@needs_triton
@each_dtype
@each_window
def test_paged_decode_with_windows(
    dtype: torch.dtype, window: int, softcap: float, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    lens = some_lens(random.Random(window))
    cache = Cache(case, lens, dtype, 1)
    q = cache.queries(len(lens), dtype, 2)
    expected = attended_by_all(cache, q, window, softcap)
    tile = decode_tile(case.dim, dtype)
    if window:
        for i, length in enumerate(lens):
            hide(cache, i, length - window)
    most = sum(2 + -(-min(length, window or length) // tile) + 1 for length in lens)
    for programs in (1, 5, most):
        buffers = buffers_for(case, len(lens), most)
        out = decoded(cache, q, programs, buffers, window=window, softcap=softcap)
        assert_close(out, expected)
        # The split covers no more than the windows, to a whole tile.
        if programs == most and window:
            read = collections.Counter[int]()
            for item in itertools.chain(*planned(buffers, programs)):
                assert item[2] <= item[3], "nobody counts tiles before the window"
                read[item[0]] += item[3] - item[2]
            assert all(count < min(window, lens[i]) + tile for i, count in read.items())


@needs_triton
@each_dtype
@each_window
def test_paged_prefill_with_windows(dtype: torch.dtype, window: int, softcap: float, case: Case) -> None:
    block_m, block_n = (BLOCK_M, BLOCK_N) if case is SMALL else (32, 16)
    query_lens, lens = some_chunks(random.Random(window))
    cache = Cache(case, lens, dtype, 1)
    q = cache.queries(sum(query_lens), dtype, 2)
    expected = prefill_reference(cache, q, query_lens, window, softcap)
    if window:
        for i, (query_len, length) in enumerate(zip(query_lens, lens, strict=True)):
            hide(cache, i, length - query_len - window + 1)
    assert_close(prefilled(cache, q, query_lens, 0, block_m, block_n, window, softcap), expected)


@needs_triton
@each_dtype
@pytest.mark.parametrize(
    ("case", "window", "softcap"),
    [
        (Case(64, 16, 2, 2, "apart"), 0, 0.0),
        (Case(80, 64, 5, 1, "heads first"), 0, 0.0),
        (Case(128, 256, 8, 1, "interleaved"), 40, 0.0),
        (Case(256, 32, 1, 2, "apart"), 0, 5.0),
        (Case(64, 64, 16, 1, "interleaved"), 0, 0.0),
    ],
)
def test_a_cache_in_eight_bits(
    dtype: torch.dtype, case: Case, window: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the scales are, attention is that over the values as they are stored."""
    monkeypatch.setattr(paged_decode_module, "MIN_PART_TOKENS", 1)
    query_lens, lens = some_chunks(random.Random(window))
    cache = Cache(case, [*lens, 0], dtype, 1)
    cache.quantize()
    # As a model's, of which narrow scores' two parts lose nothing.
    q = cache.queries(len(lens) + 1, dtype, 2).bfloat16().to(dtype)
    expected = attended_by_all(cache, q, window, softcap)
    tile = decode_tile(case.dim, cache.k.dtype, FP8_LAUNCH)
    # A GPU's products of eight bits keep 14 bits of their sums.
    launches = [(1, False), (12, dtype == torch.bfloat16)] if GPU else [(1, False), (12, True)]
    for programs, narrow in launches:
        buffers, launch = buffers_for(case, len(lens) + 1, 12), DecodeLaunch(narrow_scores=narrow)
        out = decoded(
            cache, q, programs, buffers, 64 if narrow else tile, window=window, softcap=softcap, launch=launch
        )
        assert_close_rows(out, expected)
    q = cache.queries(sum(query_lens), dtype, 3)
    out = prefilled(cache, q, [*query_lens, 0], window=window, softcap=softcap)
    assert_close_rows(out, prefill_reference(cache, q, [*query_lens, 0], window, softcap))


def some_chunks(rng: random.Random) -> tuple[list[int], list[int]]:
    """New tokens and contexts: a whole prompt, a last token, chunks after a prefix of whole blocks and of any length."""
    queries = [rng.randint(40, 150), 1, rng.randint(2, 60), rng.randint(1, 20)]
    prefixes = [0, rng.randint(0, 200), 16 * rng.randint(1, 16), rng.randint(1, 380)]
    if GPU:
        queries += [rng.randint(1, 600) for _ in range(8)] + [3000]
        prefixes += [rng.randint(0, 2000) for _ in range(8)] + [1000]
    order = rng.sample(range(len(queries)), len(queries))
    return [queries[i] for i in order], [queries[i] + prefixes[i] for i in order]


@needs_triton
@each_dtype
@each_case
def test_paged_prefill(dtype: torch.dtype, case: Case) -> None:
    rng = random.Random(str(case))
    query_lens, lens = some_chunks(rng)
    cache = Cache(case, lens, dtype, 1)
    first_row, after = rng.choice([0, 1, 5]), rng.choice([0, 2])
    q = cache.queries(first_row + sum(query_lens) + after, dtype, 2)
    out = prefilled(cache, q, query_lens, first_row)
    assert_close(out, prefill_reference(cache, q[first_row : first_row + sum(query_lens)], query_lens))


@needs_triton
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 64), (64, 32)])
@pytest.mark.parametrize(("group", "block_size"), [(1, 16), (7, 64)])
def test_paged_prefill_by_other_tiles(block_m: int, block_n: int, group: int, block_size: int) -> None:
    """Contexts that end at, before and behind the tiles' edges."""
    cache = Cache(Case(64, block_size, group, 1, "apart"), [64, 63, 65, 130, 1], torch.float32, 7)
    query_lens = [16, 33, 17, 2, 1]
    q = cache.queries(sum(query_lens) + 3, torch.float32, 8)
    out = prefilled(cache, q, query_lens, 3, block_m, block_n)
    assert_close(out, prefill_reference(cache, q[3:], query_lens))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("block_m", [16, 64, BLOCK_M])
def test_prefill_tiles(group: int, block_m: int) -> None:
    """Every row in one tile, at its own position; the longest contexts first."""
    rng = np.random.default_rng(group)
    for count, first_row in ((1, 0), (2, 3), (30, 11)):
        slots, query_lens = rng.permutation(100)[:count], rng.integers(1, 500, count)
        query_lens[0] = 1 + 2 * (block_m // group)
        lens = query_lens + rng.integers(0, 2, count) * rng.integers(0, 900, count)
        tiles = prefill_tiles(slots, query_lens, lens, first_row, group, block_m)
        assert tiles.dtype == np.int32
        assert np.all(np.diff(tiles[:, 3]) <= 0)
        rows = {row + i: (slot, position + i) for slot, row, length, position in tiles.tolist() for i in range(length)}
        assert len(rows) == tiles[:, 2].sum() == query_lens.sum()
        assert np.all(tiles[:, 2] >= 1) and np.all(tiles[:, 2] * group <= block_m)
        expected = [
            (slot, position)
            for slot, query_len, length in zip(slots.tolist(), query_lens.tolist(), lens.tolist(), strict=True)
            for position in range(length - query_len, length)
        ]
        assert [rows[first_row + i] for i in range(len(expected))] == expected


class State(NamedTuple):
    """Sequences' state as the engine keeps it; `slots` are those of a step, the last slot its padding."""

    slots: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    steps: torch.Tensor
    block_tables: torch.Tensor


def make_state(batch: int, block_size: int) -> State:
    generator, rows, width = torch.Generator().manual_seed(batch), batch + 7, 6

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    slots, positions = torch.randperm(rows - 1, generator=generator)[:batch], ints(0, width * block_size, rows)
    edges = torch.tensor([0, block_size - 1, block_size, width * block_size - 1])
    positions[slots[:4]] = edges[: len(slots[:4])]
    positions[-1] = -1
    if batch > 2:
        slots[batch // 3 :: 7] = rows - 1
    table = ints(0, 1 << 24, rows, width + 3).int().to(DEVICE)[:, :width]
    tokens, steps = ints(0, 1 << 17, rows), ints(0, 5000, rows)
    return State(slots.to(DEVICE), tokens.to(DEVICE), positions.to(DEVICE), steps.to(DEVICE), table)


@needs_triton
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("batch", [1, 5, 256, 300, 513])
def test_gather_decode(batch: int, block_size: int) -> None:
    state = make_state(batch, block_size)
    before = [tensor.clone() for tensor in state]
    inputs = gather_decode(state.slots, state.tokens, state.positions, state.block_tables, block_size)
    expected = gather_decode_torch(state.slots, state.tokens, state.positions, state.block_tables, block_size)
    for actual, other in zip(inputs, expected, strict=True):
        assert actual.dtype == torch.int64
        assert torch.equal(actual, other)
    padding = state.slots == len(state.tokens) - 1
    assert padding.any() or batch < 3
    assert (inputs.slot_mapping[padding] == -1).all() and not inputs.context_lens[padding].any()
    assert (inputs.slot_mapping[~padding] >= 0).all()
    assert all(torch.equal(tensor, other) for tensor, other in zip(state, before, strict=True))


@needs_triton
@pytest.mark.parametrize("batch", [1, 5, 256, 300, 513])
def test_advance(batch: int) -> None:
    state = make_state(batch, 16)
    ids = torch.randint(0, 2**31 - 1, (batch,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    keys = ((torch.arange(batch, device=DEVICE) - batch // 2) << 32) | (0x7FFFFFFF - ids)
    context_lens = state.positions[state.slots] + 1
    results = []
    for step in (advance, advance_torch):
        # One key more than there are sequences: it stays.
        held, out = torch.cat((keys, keys[:1])), torch.full((batch + 1,), -7, device=DEVICE)
        moved = state.tokens.clone(), state.positions.clone(), state.steps.clone()
        step(held[:batch], state.slots, context_lens, *moved, out[:batch])
        assert torch.equal(out[:batch], ids) and out[-1] == -7
        assert (held[:batch] == LEAST_KEY).all() and held[-1] == keys[0]
        results.append(moved)
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    tokens, positions, steps = results[0]
    live = state.slots[context_lens > 0]
    assert torch.equal(positions[live], state.positions[live] + 1) and torch.equal(steps[live], state.steps[live] + 1)
    assert torch.equal(tokens[live], ids[context_lens > 0])
    others = torch.ones_like(tokens, dtype=torch.bool)
    others[live] = False
    for moved_tensor, tensor in zip(results[0], (state.tokens, state.positions, state.steps), strict=True):
        assert torch.equal(moved_tensor[others], tensor[others]), "padding and sequences of no step stay"


@needs_triton
@each_dtype
@pytest.mark.parametrize(
    ("case", "programs"),
    [
        (Case(64, 16, 2, 2, "apart"), 2),
        (Case(80, 64, 7, 1, "interleaved"), 6),
        (Case(128, 256, 3, 2, "heads first"), 250 if GPU else 40),
    ],
    ids=["few", "some", "many"],
)
def test_backends_agree(dtype: torch.dtype, case: Case, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random mixed steps through one backend of each kind, two layers a step."""
    monkeypatch.setattr(triton_backend, "decode_programs", lambda *_: programs)
    rng = random.Random(str(case))
    heads = case.kv_heads * case.group
    reference: AttentionBackend = TorchBackend(heads, case.kv_heads, case.dim, 60, DEVICE)
    backend = triton_backend.TritonBackend(heads, case.kv_heads, case.dim, 60, DEVICE, dtype)
    specs = AttentionSpec(case.dim**-0.5), AttentionSpec(0.1, window=rng.randint(10, 100), softcap=7.0)
    for spec in specs:
        reference.add_window(spec.window)
        backend.add_window(spec.window)
    for seed, (decodes, chunks) in enumerate([(4, 0), (0, 2), (3, 2), (1, 1)]):
        more = 50 * GPU if decodes > 1 else 0
        decode_lens = sorted((rng.randint(1, 400) for _ in range(decodes + more)), reverse=True)
        query_lens = [rng.randint(1, 90) for _ in range(chunks)]
        chunk_lens = [length + rng.choice([0, 16, rng.randint(1, 150)]) for length in query_lens]
        cache, count = Cache(case, decode_lens + chunk_lens, dtype, seed, unowned=1e4), len(decode_lens)
        batch = AttentionBatch(
            cache.table,
            case.block_size,
            cache.slots[:count],
            torch.tensor(decode_lens, dtype=torch.int64, device=DEVICE),
            decode_lens,
            cache.slots[count:].cpu().numpy(),
            np.array(query_lens, dtype=np.int64),
            np.array(chunk_lens, dtype=np.int64),
        )
        tiles = backend.chunk_tiles(batch.chunk_slots, batch.chunk_query_lens, batch.chunk_lens)
        assert len(tiles) <= backend.most_tiles(sum(query_lens), chunks)
        # Rows of zeros, as a CUDA graph has them at the end, change nothing.
        tiles[:, 1] += count
        tiles = np.concatenate((tiles, np.zeros((2, 4), dtype=np.int32)))
        batch = batch._replace(chunk_tiles=torch.from_numpy(tiles).to(DEVICE) if chunks else None)
        plan, expected_plan = backend.plan(batch), reference.plan(batch)
        for layer, spec in zip((cache, cache.next_layer()), specs, strict=True):
            q = cache.queries(count + sum(query_lens), dtype, seed)
            out = backend.attend(q, layer.k, layer.v, plan, spec)
            expected = reference.attend(q.float(), *layer.exact, expected_plan, spec)
            assert out.shape == q.shape and out.dtype == dtype
            assert_close(out, expected)
            assert not backend.buffers.arrived.any()
