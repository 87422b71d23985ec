"""The mixture of experts: each launch against its torch reference, as compiled or interpreted; what is not to be read is NaN."""

from __future__ import annotations

import math
import random

import pytest
import torch

from nanovllm.kernels import fused_moe
from nanovllm.kernels.fused_moe import (
    ExpertScales,
    MoeTiles,
    ProductTiles,
    fused_experts,
    fused_experts_torch,
    moe_tiles,
    route,
    route_torch,
)
from nanovllm.kernels.grouping import group_rows, most_tiles
from nanovllm.kernels.quantize import quantize_rows_torch
from nanovllm.kernels.triton_compat import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter's bfloat16 product is wrong.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_ids(tokens: int, top_k: int, experts: int, seed: int, favourites: int | None = None) -> torch.Tensor:
    """Different experts for each token, only `favourites` of them if given: the others have nothing to do."""
    rng = random.Random(seed)
    pool = rng.sample(range(experts), favourites or experts)
    rows = [rng.sample(pool, top_k) for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).view(tokens, top_k)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (7, 128, 8), (5, 60, 4), (3, 1, 1), (0, 8, 2)])
def test_route(dtype: torch.dtype, normalize: bool, tokens: int, experts: int, top_k: int) -> None:
    # All different, so that which expert is in is not a matter of order among equals.
    logits = torch.stack([torch.randperm(experts) for _ in range(tokens)]) if tokens else torch.zeros(0, experts)
    logits = (logits / experts * 4 - 2).to(DEVICE, dtype)
    ids, weights = route(logits, top_k, normalize)
    expected_ids, expected = route_torch(logits, top_k, normalize)
    assert ids.dtype == expected_ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)
    if normalize and tokens:
        torch.testing.assert_close(weights.sum(-1), torch.ones(tokens, device=DEVICE))


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "favourites", "first", "local", "block_m"),
    [
        (1, 2, 8, None, 0, 8, 16),
        (40, 3, 5, None, 0, 5, 16),
        (300, 2, 128, None, 0, 128, 32),
        (600, 4, 16, 4, 0, 16, 64),  # more pairs than a program reads at a time, twelve experts empty
        (50, 2, 8, None, 4, 4, 16),  # the second of two ranks
        (50, 2, 8, 3, 2, 2, 16),
        (20, 1, 6, 1, 0, 3, 16),
    ],
)
def test_pairs_are_grouped_by_expert(
    tokens: int,
    top_k: int,
    experts: int,
    favourites: int | None,
    first: int,
    local: int,
    block_m: int,
) -> None:
    ids = some_ids(tokens, top_k, experts, tokens, favourites)
    order, plan = group_rows(ids, local, first, block_m)
    flat = ids.flatten().tolist()
    by_expert = [[pair for pair, expert in enumerate(flat) if expert == first + e] for e in range(local)]
    places = order[: sum(map(len, by_expert))].tolist()
    for pairs in by_expert:
        assert sorted(places[: len(pairs)]) == pairs
        places = places[len(pairs) :]
    tiles, start = [], 0
    for expert, pairs in enumerate(by_expert):
        for at in range(0, len(pairs), block_m):
            tiles.append([expert, start + at, start + min(at + block_m, len(pairs))])
        start += len(pairs)
    assert len(plan) == most_tiles(tokens * top_k, local, block_m) >= len(tiles)
    assert plan[: len(tiles), :3].tolist() == tiles
    assert (plan[len(tiles) :, 0] == -1).all()


@needs_triton
def test_there_are_always_enough_tiles() -> None:
    for pairs in range(1, 200):
        for experts in (1, 3, 8, 64):
            # The most: one pair in every expert but the rest in whole tiles and one over.
            spread = (
                [1 + 16 * (i < (pairs - experts) // 16) for i in range(experts)] if pairs >= experts else [1] * pairs
            )
            assert sum(-(-count // 16) for count in spread) <= most_tiles(pairs, experts, 16)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "size", "experts", "top_k", "favourites", "tiles"),
    [
        (1, 64, 32, 8, 2, None, None),
        (5, 40, 20, 6, 3, None, None),  # nothing is a multiple of a tile
        (
            33,
            96,
            100,
            4,
            2,
            2,
            MoeTiles(16, ProductTiles(32, 32, 2, 4), ProductTiles(16, 64, 2, 4)),
        ),  # two experts without a pair, several tiles an expert
        (70, 130, 17, 5, 1, None, MoeTiles(64, ProductTiles(64, 64, 2, 4), ProductTiles(64, 64, 2, 4), 2)),
        (24, 48, 64, 3, 3, None, MoeTiles(32, ProductTiles(16, 16, 2, 4), ProductTiles(16, 16, 2, 4), 2)),
        (2, 64, 32, 32, 2, None, None),  # pairs that are not grouped
        (
            120,
            32,
            32,
            2,
            2,
            None,
            MoeTiles(128, ProductTiles(32, 32, 2, 4), ProductTiles(32, 32, 2, 4)),
        ),  # a whole tile
        (
            90,
            32,
            32,
            3,
            1,
            None,
            MoeTiles(128, ProductTiles(32, 32, 2, 4), ProductTiles(32, 32, 2, 4)),
        ),  # smaller last ones
        (0, 64, 32, 4, 2, None, None),
    ],
)
def test_fused_experts(
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    size: int,
    experts: int,
    top_k: int,
    favourites: int | None,
    tiles: MoeTiles | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = randn(tokens, hidden + 8, dtype=dtype)[:, :hidden]
    gate_up, down = (
        randn(experts, 2 * size, hidden, dtype=dtype, seed=1),
        randn(experts, hidden, size, dtype=dtype, seed=2),
    )
    gate_up, down = gate_up / hidden**0.5, down / size**0.5
    ids = some_ids(tokens, top_k, experts, 3, favourites)
    weights = randn(tokens, top_k, seed=4).abs()
    # Whatever is read before it is written shows.
    empty = torch.empty
    monkeypatch.setattr(
        fused_moe.torch,
        "empty",
        lambda *a, dtype, **k: empty(*a, dtype=dtype, **k).fill_(math.nan if dtype.is_floating_point else 1 << 29),
    )
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    out = fused_experts(x, gate_up, down, ids, weights, tiles=tiles)
    expected = fused_experts_torch(x.float(), gate_up.float(), down.float(), ids, weights)
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    # Two ranks with half of the experts each, the first of them into a buffer of its own.
    half = experts // 2
    buffer = empty(tokens, hidden + 4, dtype=dtype, device=DEVICE)[:, :hidden]
    first = fused_experts(x, gate_up[:half], down[:half], ids, weights, 0, buffer, tiles)
    assert first is buffer
    second = fused_experts(x, gate_up[half:], down[half:], ids, weights, half, tiles=tiles)
    torch.testing.assert_close(first.float() + second.float(), expected, rtol=tolerance, atol=tolerance)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "group", "tokens"),
    [(torch.int8, 0, 30), (torch.int8, 128, 2), (torch.float8_e4m3fn, 0, 2), (torch.float8_e4m3fn, 128, 30)],
)
def test_experts_of_eight_bits(dtype: torch.dtype, group: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped pairs and single ones, scales of whole rows and of parts."""
    if DEVICE.type == "cpu":  # the interpreter rounds some numbers otherwise
        monkeypatch.setattr(fused_moe, "quantize_rows", quantize_rows_torch)
    hidden, size, experts, top_k = 256, 128, 32, 2
    x, ids, weights = randn(tokens, hidden), some_ids(tokens, top_k, experts, 3), randn(tokens, top_k, seed=4).abs()
    plain = randn(experts, 2 * size, hidden, seed=1) / hidden**0.5, randn(experts, hidden, size, seed=2) / size**0.5
    numbers, scales = zip(*(quantize_rows_torch(weight.flatten(0, 1), dtype, group) for weight in plain), strict=True)
    gate_up, down = (value.view(weight.shape) for value, weight in zip(numbers, plain, strict=True))
    of_experts = ExpertScales(*(scale.unflatten(1, (experts, -1)) for scale in scales))
    out = fused_experts(x, gate_up, down, ids, weights, scales=of_experts)
    expected = fused_experts_torch(x, gate_up, down, ids, weights, scales=of_experts)
    # What is made 8 bits after the first product may fall to the next number.
    assert (out - expected).norm() < 1e-2 * expected.norm()
    exact = fused_experts_torch(x, *plain, ids, weights)
    assert (out - exact).norm() < 0.08 * exact.norm()
    # The second of two ranks has what the first lacks.
    half = experts // 2
    parts = [
        fused_experts(
            x,
            gate_up[part],
            down[part],
            ids,
            weights,
            first,
            scales=ExpertScales(*(s[:, part].contiguous() for s in of_experts)),
        )
        for part, first in ((slice(half), 0), (slice(half, None), half))
    ]
    assert (parts[0] + parts[1] - expected).norm() < 1e-2 * expected.norm()


def test_the_reference_is_a_sum_of_experts() -> None:
    x, gate_up, down = randn(6, 16), randn(4, 20, 16, seed=1), randn(4, 16, 10, seed=2)
    ids, weights = some_ids(6, 2, 4, 5), randn(6, 2, seed=6).abs()
    out = fused_experts_torch(x, gate_up, down, ids, weights)
    for token in range(6):
        total = torch.zeros(16, device=DEVICE)
        for place in range(2):
            gate, up = (gate_up[int(ids[token, place])] @ x[token]).chunk(2)
            total += weights[token, place] * (down[int(ids[token, place])] @ (gate * torch.sigmoid(gate) * up))
        torch.testing.assert_close(out[token], total, rtol=1e-4, atol=1e-4)
    buffer = torch.empty_like(x)
    assert fused_experts_torch(x, gate_up, down, ids, weights, 0, buffer) is buffer
    assert torch.equal(buffer, out)


def test_tiles_grow_with_the_pairs_of_an_expert() -> None:
    assert [moe_tiles(pairs, 128).block_m for pairs in (8, 1024, 2048, 8192, 32768)] == [16, 16, 32, 128, 128]
