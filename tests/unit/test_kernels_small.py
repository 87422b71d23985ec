"""The small kernels against their torch references: on a GPU as compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from nanovllm.kernels.activation import gelu_and_mul, gelu_and_mul_torch, silu_and_mul, silu_and_mul_torch
from nanovllm.kernels.embedding import embedding_shard, embedding_shard_torch
from nanovllm.kernels.fp8_cache import FP8, quantize_kv_rows, scales_shape
from nanovllm.kernels.layernorm import add_rms_norm, add_rms_norm_rounded, add_rms_norm_torch
from nanovllm.kernels.paged_attention import gather_kv
from nanovllm.kernels.qk_norm_rope import qk_norm_rope_store, qk_norm_rope_store_torch
from nanovllm.kernels.quantize import quantize_rows
from nanovllm.kernels.sampling import (
    LEAST_KEY,
    RowMasks,
    _gumbel,
    _noise_key,
    gumbel_noise,
    key_to_token,
    keys_to_tokens,
    sample_keys,
    sample_keys_torch,
)
from nanovllm.kernels.skinny_linear import (
    BLOCK_K,
    MAX_ROWS,
    MAX_WEIGHT_ELEMENTS,
    SkinnyTiles,
    skinny_linear,
    skinny_linear_torch,
    skinny_tiles,
)
from nanovllm.kernels.triton_compat import HAS_TRITON, tl, triton, use_triton
from nanovllm.layers.activation import silu_and_mul as silu_and_mul_layer
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parallel import TensorParallel

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 in ways of its own; float16 shows the same roundings.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def randint(high: int, *shape: int, low: int = 0, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """Gumbel-max sampling as its formula says, without keys."""
    greedy = (temperatures == 0).unsqueeze(1)
    scaled = logits.float() * torch.where(greedy, 1.0, temperatures.clamp(min=1e-20).unsqueeze(1)).reciprocal()
    return torch.where(greedy, scaled, scaled + gumbel_noise(seeds, steps, logits.shape[1])).argmax(dim=-1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, ulps: float = 2.0) -> None:
    """Equal but for the order of float32 sums, and for the few values which that rounds to a neighbour."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = ulps * max(torch.finfo(actual.dtype).eps, 2e-6)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_rounds_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`assert_close`, and in 16 bits all but a few are the same: each step rounds where the reference does."""
    assert_close(actual, expected)
    if actual.dtype != torch.float32:
        assert int((actual != expected).sum()) <= 1 + 0.01 * actual.numel()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (3, 37), (1, 1024), (17, 1000), (2, 2560), (1, 16384), (0, 64)])
@pytest.mark.parametrize("strided", [False, True])
def test_add_rms_norm(dtype: torch.dtype, tokens: int, size: int, strided: bool) -> None:
    x = randn(tokens, 2 * size, dtype=dtype)[:, size:] if strided else randn(tokens, size, dtype=dtype)
    residual, weight = randn(tokens, size, dtype=dtype, seed=1) * 30, randn(size, dtype=dtype, seed=2)
    x_before, residual_before = x.clone(), residual.clone()
    for other in (residual, None):
        normed, total = add_rms_norm(x, other, weight, 1e-6)
        expected_normed, expected_total = add_rms_norm_torch(x, other, weight, 1e-6)
        assert torch.equal(total, expected_total)
        assert_rounds_alike(normed, expected_normed)
        assert normed.is_contiguous()
    assert total is x, "without a residual the sum is x, not a copy"
    assert torch.equal(x, x_before) and torch.equal(residual, residual_before)


@needs_triton
@pytest.mark.parametrize("numbers", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("size", "group"), [(96, 0), (1024, 0), (384, 128)])
def test_add_rms_norm_rounds_as_two_launches_do(numbers: torch.dtype, size: int, group: int) -> None:
    x, residual = randn(5, size).bfloat16(), randn(5, size, seed=1).bfloat16()
    x[2] = residual[2] = 0
    for weight in (randn(size), randn(size).bfloat16()):
        for other in (residual, None):
            normed, expected_total = add_rms_norm(x, other, weight, 1e-6)
            expected, expected_scale = quantize_rows(normed, numbers, group)
            rounded, scale, total = add_rms_norm_rounded(x, other, weight, 1e-6, numbers, group)
            assert rounded.dtype == numbers
            assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scale, expected_scale)
            assert torch.equal(total, expected_total)


@needs_triton
def test_add_rms_norm_applies_the_scales_of_a_product() -> None:
    half = DTYPES[1]
    x, residual, weight = randn(7, 96, dtype=half) * 1000, randn(7, 96, dtype=half, seed=1), randn(96, dtype=half)
    scales = randn(7, seed=2).abs() / 1000, randn(96, seed=3).abs()
    meant = (x.double() * scales[0].double()[:, None] * scales[1].double()).to(half)
    for found in (add_rms_norm, add_rms_norm_torch):
        normed, total = found(x, residual, weight, 1e-6, scales)
        expected, expected_total = add_rms_norm_torch(meant, residual, weight, 1e-6)
        assert_rounds_alike(total, expected_total)
        assert_rounds_alike(normed, expected)
    normed, expected_total = add_rms_norm(x, residual, weight, 1e-6, scales)
    expected, expected_scale = quantize_rows(normed, torch.int8)
    rounded, scale, total = add_rms_norm_rounded(x, residual, weight, 1e-6, torch.int8, scales=scales)
    assert torch.equal(rounded, expected) and torch.equal(scale, expected_scale) and torch.equal(total, expected_total)


@needs_triton
def test_add_rms_norm_of_more_dimensions() -> None:
    qkv = randn(5, 7 * 16)
    heads = qkv[:, : 4 * 16].unflatten(-1, (4, 16))
    assert_close(add_rms_norm(heads, None, randn(16), 1e-5)[0], add_rms_norm_torch(heads, None, randn(16), 1e-5)[0])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("splits", "tokens", "size"), [(1, 3, 40), (2, 5, 1024), (4, 1, 37), (4, 0, 64)])
def test_add_rms_norm_adds_partial_sums_up(dtype: torch.dtype, splits: int, tokens: int, size: int) -> None:
    parts = randn(splits, tokens, size)
    residual, weight = randn(tokens, size, dtype=dtype, seed=1) * 30, randn(size, dtype=dtype, seed=2)
    normed, total = add_rms_norm(parts, residual, weight, 1e-6)
    expected_normed, expected_total = add_rms_norm_torch(parts, residual, weight, 1e-6)
    assert_rounds_alike(total, expected_total)
    # A sum that was rounded to its neighbour moves the whole row's norm a little.
    assert_close(normed, expected_normed, ulps=4)
    whole = add_rms_norm_torch(parts.sum(0).to(dtype), residual, weight, 1e-6)
    assert_close(normed, whole[0], ulps=4)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "k", "gated", "tiles"),
    [
        (1, 64, 64, False, SkinnyTiles(64, 32, 1, 6, 4)),
        (65, 192, 128, False, SkinnyTiles(64, 64, 1, 6, 4)),
        (5, 256, 192, False, SkinnyTiles(64, 128, 1, 4, 4)),
        (7, 96, 256, False, SkinnyTiles(64, 32, 4, 6, 4)),
        (70, 128, 384, False, SkinnyTiles(64, 64, 2, 6, 4)),
        (3, 96, 128, True, SkinnyTiles(64, 32, 1, 6, 4)),
        (130, 64, 64, True, SkinnyTiles(128, 64, 1, 4, 8)),
    ],
)
def test_skinny_linear(
    dtype: torch.dtype, bias: bool, rows: int, n: int, k: int, gated: bool, tiles: SkinnyTiles
) -> None:
    outer = 2 * n if gated else n
    x = randn(rows, k + 8, dtype=dtype)[:, :k]
    weight, b = randn(outer, k, dtype=dtype, seed=1), randn(outer, dtype=dtype, seed=2) * 5 if bias else None
    actual = skinny_linear(x, weight, tiles, b, gated=gated)
    expected = skinny_linear_torch(x, weight, tiles, b, gated=gated)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-6 if actual.dtype == torch.float32 else 5e-3)


def test_skinny_tiles_fill_one_wave_and_divide() -> None:
    shapes = {"qkv": (4096, 1024, False, False), "o": (1024, 2048, False, True), "gate_up": (3072, 1024, True, False), "down": (1024, 3072, False, True)}  # fmt: skip
    for n, k, gated, partial in shapes.values():
        for rows in range(1, MAX_ROWS + 1):
            tiles = skinny_tiles(rows, n, k, 132, gated=gated, partial=partial)
            assert tiles is not None, f"Qwen3-0.6B's products are what this is for: {rows}, {n}, {k}"
            programs = -(-rows // tiles.block_m) * (n // tiles.block_n) * tiles.splits
            assert 48 <= programs <= 132
            assert n % tiles.block_n == 0 and k % (tiles.splits * BLOCK_K) == 0
            assert partial or tiles.splits == 1


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(0, 4096, 1024), (MAX_ROWS + 1, 4096, 1024), (1, 4096, 1000), (1, 4097, 1024), (8, MAX_WEIGHT_ELEMENTS // 1024 + 128, 1024)],
)  # fmt: skip
def test_skinny_tiles_leave_the_rest_to_cublas(rows: int, n: int, k: int) -> None:
    assert skinny_tiles(rows, n, k, 132) is None


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_with_weights_in_float32_round_once(dtype: torch.dtype) -> None:
    x, residual, weight = randn(5, 640, dtype=dtype), randn(5, 640, dtype=dtype, seed=2), randn(640, seed=1)
    assert weight.dtype == torch.float32
    exact = torch.nn.functional.rms_norm((x + residual).float(), (640,), weight, 1e-6)
    for kernel in (add_rms_norm, add_rms_norm_torch):
        assert_rounds_alike(kernel(x, residual, weight, 1e-6)[0], exact.to(dtype))


@needs_triton
def test_the_norm_keeps_epsilon() -> None:
    tiny = randn(3, 40) * 1e-4
    assert_close(add_rms_norm(tiny, None, randn(40), 1e-2)[0], add_rms_norm_torch(tiny, None, randn(40), 1e-2)[0])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (5, 7), (3, 1024), (2, 3000), (0, 8)])
def test_silu_and_mul(dtype: torch.dtype, tokens: int, size: int) -> None:
    wide = randn(tokens, 2 * size + 6, dtype=dtype) * 20
    for x in (wide[:, : 2 * size], wide[:, : 2 * size].contiguous()):
        assert_rounds_alike(silu_and_mul(x), silu_and_mul_torch(x))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (5, 7), (2, 3000)])
def test_gelu_and_mul(dtype: torch.dtype, tokens: int, size: int) -> None:
    x = randn(tokens, 2 * size, dtype=dtype) * 3
    # Far below 0 the reference's 1 + tanh loses what the kernel's form keeps.
    torch.testing.assert_close(
        gelu_and_mul(x), gelu_and_mul_torch(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=3e-6
    )


@needs_triton
def test_silu_of_extremes() -> None:
    gate = torch.tensor([-math.inf, -1e4, -88.0, -0.0, 0.0, 88.0, 1e4, math.inf], device=DEVICE)
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    torch.testing.assert_close(silu_and_mul(x), silu_and_mul_torch(x), equal_nan=True)
    torch.testing.assert_close(gelu_and_mul(x), gelu_and_mul_torch(x), equal_nan=True)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [5, 64, 1100])
def test_embedding_shards(dtype: torch.dtype, ids: torch.dtype, size: int) -> None:
    table, rows = randn(22, size, dtype=dtype), 6  # four ranks' rows, two of them past the vocabulary's end
    table = torch.cat((table, torch.zeros(2, size, dtype=dtype, device=DEVICE)))
    token_ids = randint(22, 40).to(ids)
    whole = torch.zeros(40, size, dtype=dtype, device=DEVICE)
    for start in range(0, 24, rows):
        shard = table[start : start + rows].contiguous()
        part = embedding_shard(token_ids, shard, start)
        assert torch.equal(part, embedding_shard_torch(token_ids, shard, start))
        whole += part
    assert torch.equal(whole, table[token_ids.long()])


def make_cache(
    blocks: int, block_size: int, heads: int, dim: int, layout: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Keys' and values' caches in memory: apart, as neighbours in each block, or heads before tokens."""
    if layout == "apart":
        return [torch.full((blocks, block_size, heads, dim), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    if layout == "interleaved":
        return list(torch.full((blocks, 2, block_size, heads, dim), 7.0, dtype=dtype, device=DEVICE).unbind(1))
    pools = [torch.full((blocks, heads, block_size, dim + i), 7.0, dtype=dtype, device=DEVICE) for i in range(2)]
    return [pool.transpose(1, 2)[..., :dim] for pool in pools]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "layout"),
    [
        (1, 1, "apart"),
        (5, 1, "interleaved"),
        (6, 2, "heads first"),
        (16, 8, "apart"),
        (20, 20, "heads first"),
        (40, 8, "interleaved"),
    ],
)
def test_qk_norm_rope_store(dtype: torch.dtype, dim: int, num_heads: int, num_kv_heads: int, layout: str) -> None:
    tokens, blocks, block_size = 6, 4, 3
    width = (num_heads + 2 * num_kv_heads) * dim
    strided = layout != "apart"
    qkv = randn(tokens, width + 16 * strided, dtype=dtype)[:, :width] * 5
    qkv = qkv if strided else qkv.contiguous()
    angles = randn(50, dim // 2, seed=3)
    cos, sin = angles.cos().repeat(1, 2).to(dtype), angles.sin().repeat(1, 2).to(dtype)
    positions = randint(50, tokens, seed=4)
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(5))[:tokens].to(DEVICE)
    slots[1::3] = -1
    weights = [randn(dim, dtype=dtype, seed=6), randn(dim, dtype=dtype, seed=7)]
    for q_weight, k_weight in (weights, (None, None), (weights[0], None)):
        caches = make_cache(blocks, block_size, num_kv_heads, dim, layout, dtype)
        expected_caches = make_cache(blocks, block_size, num_kv_heads, dim, "apart", dtype)
        before = qkv.clone()
        q = qk_norm_rope_store(qkv, positions, cos, sin, q_weight, k_weight, 1e-6, *caches, slots)
        expected = qk_norm_rope_store_torch(qkv, positions, cos, sin, q_weight, k_weight, 1e-6, *expected_caches, slots)
        assert q.is_contiguous() and expected.is_contiguous() and torch.equal(qkv, before)
        # The reference rounds both products and the sum; a difference of two large ones loses more than its own ulps.
        largest = max(1.0, q.abs().max().item())
        assert_close(q / largest, expected / largest)
        assert_close(caches[0] / largest, expected_caches[0] / largest)
        assert torch.equal(caches[1], expected_caches[1]), "values are copied, slots not written are untouched"


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_norm_rounds_as_the_reference(dtype: torch.dtype) -> None:
    qkv, cos = randn(9, 8 * 128, dtype=dtype), torch.ones(20, 128, dtype=dtype, device=DEVICE)
    caches, expected_caches = (make_cache(3, 4, 2, 128, "apart", dtype) for _ in range(2))
    slots = torch.arange(9, device=DEVICE)
    args = slots, cos, torch.zeros_like(cos), randn(128, dtype=dtype, seed=1), randn(128, dtype=dtype, seed=2), 1e-3
    q = qk_norm_rope_store(qkv, *args, *caches, slots)
    assert_rounds_alike(q, qk_norm_rope_store_torch(qkv, *args, *expected_caches, slots))
    assert_rounds_alike(caches[0], expected_caches[0])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 32), (96, 72), (128, 2), (80, 78)])
def test_a_part_of_each_head_is_rotated(dtype: torch.dtype, dim: int, rotary: int) -> None:
    tokens, heads, kv_heads = 5, 6, 2
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = randn(50, rotary // 2, seed=3)
    cos, sin = angles.cos().repeat(1, 2).to(dtype), angles.sin().repeat(1, 2).to(dtype)
    positions, slots = randint(50, tokens, seed=4), torch.arange(tokens, device=DEVICE)
    for weight in (None, randn(dim, dtype=dtype, seed=6), randn(dim, seed=6)):
        caches, expected_caches = (make_cache(2, 4, kv_heads, dim, "apart", dtype) for _ in range(2))
        args = qkv, positions, cos, sin, weight, weight, 1e-6
        q = qk_norm_rope_store(*args, *caches, slots)
        expected = qk_norm_rope_store_torch(*args, *expected_caches, slots)
        largest = max(1.0, q.abs().max().item())
        assert_close(q / largest, expected / largest)
        assert_close(caches[0] / largest, expected_caches[0] / largest)
        assert torch.equal(caches[1], expected_caches[1])
        if weight is None:
            assert torch.equal(q[..., rotary:], qkv.view(tokens, -1, dim)[:, :heads, rotary:])


def test_rows_in_eight_bits() -> None:
    """Three bits of mantissa, whatever a row's size is, down to 2^-14 of its largest value; zeros stay zeros."""
    rows = randn(300, 96) * torch.logspace(-12, 12, 300, device=DEVICE)[:, None]
    rows[5], rows[6], rows[7, 1:] = 0.0, 448.0, 0.0
    values, scales = quantize_kv_rows(rows)
    restored = values.float() * scales.float()[:, None]
    assert bool((scales.float().frexp().mantissa == 0.5).all())
    error, largest = (restored - rows).abs(), rows.abs().amax(-1, keepdim=True)
    assert bool((error <= torch.maximum(rows.abs() * 2**-4, largest * 2**-17)).all())
    assert bool((values.float().abs().amax(-1) >= 120)[rows.any(-1)].all()), "the range is used"


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "num_heads", "num_kv_heads", "layout"),
    [(64, 6, 2, "apart"), (80, 20, 20, "heads first"), (128, 16, 8, "interleaved")],
)
def test_qk_norm_rope_store_in_eight_bits(
    dtype: torch.dtype, dim: int, num_heads: int, num_kv_heads: int, layout: str
) -> None:
    tokens, blocks, block_size = 6, 4, 3
    qkv = randn(tokens, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
    qkv *= torch.tensor([1e-3, 1.0, 1e3, 0.0, 20.0, 1.0], dtype=dtype, device=DEVICE)[:, None]
    angles = randn(50, dim // 2, seed=3)
    cos, sin = angles.cos().repeat(1, 2).to(dtype), angles.sin().repeat(1, 2).to(dtype)
    positions = randint(50, tokens, seed=4)
    slots = torch.tensor([7, 0, -1, 5, 11, 3], device=DEVICE)
    weight = randn(dim, dtype=dtype, seed=6)
    found = []
    for store, order in ((qk_norm_rope_store, layout), (qk_norm_rope_store_torch, "apart")):
        caches = [
            cache.to(torch.uint8).view(FP8) for cache in make_cache(blocks, block_size, num_kv_heads, dim, order, dtype)
        ]
        scales = torch.full(scales_shape(blocks, block_size, num_kv_heads), 3.0, dtype=torch.bfloat16, device=DEVICE)
        store(qkv, positions, cos, sin, None, weight, 1e-6, *caches, slots, scales)
        every = torch.arange(blocks * block_size, device=DEVICE)[None]
        rows = gather_kv(*(cache.contiguous() for cache in caches), scales, every, torch.float32)
        found.append((torch.stack(rows), scales))
    (rows, scales), (expected, expected_scales) = found
    largest = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # Where another rounding of the rotation tips a value, it is the next one of eight bits. The difference of two large products is
    # as far off as those were rounded.
    rounding = 2**-15 if dtype == torch.float32 else 2**-7
    close = (rows - expected).abs() <= expected.abs() * 2**-3 + largest * rounding
    if DEVICE == "cpu":  # the interpreter loses the carry of a value that is rounded up to a power of two
        close |= expected.frexp().mantissa.abs() == 0.5
    assert bool(close.all()) and (rows != expected).float().mean() < 0.1
    assert (scales != expected_scales).float().mean() < 0.02 and bool((scales[0, :, 1] == 3).all())


@needs_triton
def test_qk_norm_rope_store_without_tokens_or_slots() -> None:
    k_cache, v_cache = make_cache(2, 4, 2, 64, "apart", torch.float32)
    table = randn(10, 64)
    for tokens in (0, 3):
        slots = torch.full((tokens,), -1, device=DEVICE)
        q = qk_norm_rope_store(
            randn(tokens, 8 * 64), slots + 1, table, table, None, None, 1e-6, k_cache, v_cache, slots.int()
        )
        assert q.shape == (tokens, 4, 64)
    assert bool((k_cache == 7).all()) and bool((v_cache == 7).all())


def make_state(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Temperatures, seeds and steps of `rows` sequences: every kind of temperature, seeds of all 63 bits."""
    temperatures = torch.tensor([0.0, 1.0, 0.3, 2.0, 1e-45, 1e-30, 1e30, math.inf, 0.7])
    temperatures = temperatures.repeat(-(-rows // len(temperatures)))[:rows].to(DEVICE)
    seeds = randint(2**62, rows, seed=8) * 2 + randint(2, rows, seed=9)
    seeds[::5] = torch.arange(len(seeds[::5]), device=DEVICE)
    return temperatures, seeds, randint(5000, rows, seed=10)


def scores_of(keys: torch.Tensor) -> torch.Tensor:
    order = (keys >> 32).to(torch.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)


def assert_keys_match(keys: torch.Tensor, expected: torch.Tensor) -> None:
    """The same tokens with the same scores but for the last bits of a logarithm."""
    assert torch.equal(keys_to_tokens(keys), keys_to_tokens(expected))
    torch.testing.assert_close(scores_of(keys), scores_of(expected), rtol=1e-6, atol=2e-6)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (1, 20001), (3, 2048), (27, 513), (40, 8193), (4, 50000)])
def test_sample_keys(dtype: torch.dtype, count: int, columns: int) -> None:
    logits = randn(count, columns + 5, dtype=dtype)[:, :columns] * 4
    state = make_state(count + 30)
    rows = torch.randperm(count + 30, generator=torch.Generator().manual_seed(11))[:count].to(DEVICE)
    keys = sample_keys(logits, rows, *state)
    assert_keys_match(keys, sample_keys_torch(logits, rows, *state))
    assert torch.equal(keys_to_tokens(keys), exact_tokens(logits, *(tensor[rows] for tensor in state)))
    out = torch.full((count,), LEAST_KEY, device=DEVICE)
    assert sample_keys(logits, rows, *state, out=out) is out
    assert torch.equal(out, keys)


@needs_triton
@pytest.mark.parametrize(("vocab_size", "ranks"), [(1000, 4), (1001, 4), (5, 4), (20000, 2)])
def test_shards_join_by_maximum(vocab_size: int, ranks: int) -> None:
    columns = -(-vocab_size // ranks)
    # What stands beyond the vocabulary's end would win if it were looked at.
    logits = torch.full((18, columns * ranks), 1e9, device=DEVICE)
    logits[:, :vocab_size] = randn(18, vocab_size)
    state, rows = make_state(18), torch.arange(18, device=DEVICE)
    whole = sample_keys(logits[:, :vocab_size], rows, *state)
    for kernel in (sample_keys, sample_keys_torch):
        parts = [
            kernel(logits[:, start : start + columns], rows, *state, vocab_start=start, vocab_size=vocab_size)
            for start in range(0, columns * ranks, columns)
        ]
        assert_keys_match(torch.stack(parts).amax(0), whole)
        if columns * (ranks - 1) >= vocab_size:
            assert bool((parts[-1] == LEAST_KEY).all())
    assert torch.equal(keys_to_tokens(whole), exact_tokens(logits[:, :vocab_size], *state))


@pytest.mark.parametrize("kernel", [pytest.param(sample_keys, marks=needs_triton), sample_keys_torch])
def test_masks_of_some_rows(kernel: Callable[..., torch.Tensor]) -> None:
    """Rows with a mask sample as if all else had no probability, in each shard of the vocabulary; the others as without masks."""
    count, vocab_size, ranks = 9, 5001, 2
    logits, state, rows = randn(count, vocab_size), make_state(count), torch.arange(count, device=DEVICE)
    index = torch.tensor([2, -1, 0, 1, -1, 3, -1, -1, 4], device=DEVICE)
    allowed = randint(2, 5, 157 * 32) == 1
    allowed[3, :vocab_size] = False
    allowed[3, 4990] = True
    bits = (allowed.long().view(5, 157, 32) << torch.arange(32, device=DEVICE)).sum(-1)
    masks = RowMasks(torch.where(bits >= 2**31, bits - 2**32, bits).int(), index)
    ruled_out = logits.clone()
    for row, mask in enumerate(index.tolist()):
        if mask >= 0:
            ruled_out[row, ~allowed[mask, :vocab_size]] = -math.inf
    expected = sample_keys_torch(ruled_out, rows, *state)
    columns = -(-vocab_size // ranks)
    parts = [
        kernel(logits[:, start : start + columns], rows, *state, start, vocab_size, masks=masks)
        for start in range(0, columns * ranks, columns)
    ]
    assert_keys_match(torch.stack(parts).amax(0), expected)
    assert keys_to_tokens(expected)[5] == 4990
    unmasked = sample_keys_torch(logits, rows, *state)
    assert bool(((unmasked == expected) | (index >= 0)).all()) and bool((unmasked != expected).any())


@pytest.mark.parametrize("kernel", [pytest.param(sample_keys, marks=needs_triton), sample_keys_torch])
def test_the_lowest_id_wins_and_infinity_loses(kernel: Callable[..., torch.Tensor]) -> None:
    inf = math.inf
    logits = torch.full((6, 9000), -inf, device=DEVICE)
    logits[0, 8999] = -3e38
    logits[1, [70, 8000]] = 5.0
    logits[2, 4000:] = -0.0
    logits[2, 4001] = 0.0
    logits[4, 17] = inf
    logits[5] = 100.0
    logits[5, [5000, 6000]] = -math.nan  # as x86 makes them
    for temperature in (0.0, 1.0):
        state = torch.full((6,), temperature), torch.arange(6), torch.zeros(6, dtype=torch.int64)
        keys = kernel(logits, torch.arange(6, device=DEVICE), *(tensor.to(DEVICE) for tensor in state))
        tokens = keys_to_tokens(keys).tolist()
        assert tokens[0] == 8999
        assert tokens[1] in ((70,) if temperature == 0 else (70, 8000))
        assert tokens[2] == 4000 if temperature == 0 else tokens[2] >= 4000
        assert tokens[3:] == [0, 17, 5000]


@pytest.mark.parametrize(
    ("kernel", "temperature", "count"),
    [
        (sample_keys_torch, 0.5, 20000),
        (sample_keys_torch, 2.0, 20000),
        # The interpreter is slow.
        pytest.param(sample_keys, 1.0, 300 if DEVICE == "cpu" else 100000, marks=needs_triton),
    ],
)
def test_sampled_tokens_follow_the_softmax(kernel: Callable[..., torch.Tensor], temperature: float, count: int) -> None:
    """Pearson's chi-square, five deviations wide."""
    logits = randn(12)
    rows = torch.arange(count, device=DEVICE)
    state = torch.full((count,), temperature, device=DEVICE), rows + 10**12, torch.zeros_like(rows)
    tokens = keys_to_tokens(kernel(logits.expand(count, -1), rows, *state))
    expected = torch.softmax(logits.double() / temperature, -1) * count
    counts = torch.bincount(tokens, minlength=12)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < 11 + 5 * math.sqrt(2 * 11), statistic


@triton.jit
def _noise_kernel(out, seed_ptr, step_ptr, count, BLOCK: tl.constexpr, CUDA: tl.constexpr):
    """Noise of `count` ids, through the kernel's own functions."""
    from_key = _noise_key(tl.load(seed_ptr), tl.load(step_ptr))
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + ids, _gumbel(from_key, ids, CUDA), mask=ids < count)


@needs_triton
@pytest.mark.parametrize("seed", [0, 16, 86, 2**31, 2**40 + 3, 2**63 - 1])
def test_the_noise_is_the_references(seed: int) -> None:
    """Close, also at the ends of the range, where an approximate logarithm goes wrong."""
    seeds, steps = torch.tensor([seed], device=DEVICE), torch.tensor([0], device=DEVICE)
    expected = gumbel_noise(seeds, steps, 110000)[0]
    noise = torch.empty_like(expected)
    _noise_kernel[(triton.cdiv(len(noise), 4096),)](noise, seeds, steps, len(noise), BLOCK=4096, CUDA=DEVICE == "cuda")
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=4e-6)


@triton.jit
def _tokens_kernel(keys, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, key_to_token(tl.load(keys + i)))


@needs_triton
def test_keys_hold_tokens() -> None:
    ids = randint(2**31 - 1, 64)
    keys = (randint(2**31, 64, low=-(2**31)) << 32) | (0x7FFFFFFF - ids)
    out = torch.empty_like(keys)
    _tokens_kernel[(1,)](keys, out, BLOCK=64)
    assert torch.equal(out, ids) and torch.equal(keys_to_tokens(keys), ids)


def test_noise_of_a_shard_is_part_of_the_whole() -> None:
    seeds, steps = torch.arange(5), torch.arange(5) * 7
    assert torch.equal(gumbel_noise(seeds, steps, 30, 70), gumbel_noise(seeds, steps, 100)[:, 70:])


def test_layers_dispatch_by_device() -> None:
    x = randn(3, 40)
    assert use_triton(x) == (HAS_TRITON and DEVICE == "cuda")
    norm = RMSNorm(40, 1e-6).to(DEVICE)
    assert_close(norm(x), add_rms_norm_torch(x, None, norm.weight, 1e-6)[0])
    for actual, expected in zip(norm.add_norm(x, x * 2), add_rms_norm_torch(x, x * 2, norm.weight, 1e-6), strict=True):
        assert_close(actual, expected)
    assert_close(silu_and_mul_layer(x), silu_and_mul_torch(x))


def test_vocab_parallel_embedding_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, x: x)
    table, token_ids = randn(10, 8), randint(10, 30)
    parts = []
    for rank in range(3):
        embedding = VocabParallelEmbedding(10, 8, TensorParallel(rank, 3)).to(DEVICE)
        embedding.load(embedding.weight, table, None)
        parts.append(embedding(token_ids))
    assert torch.equal(sum(parts, torch.zeros_like(parts[0])), table[token_ids])


def test_kernel_modules_import_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from nanovllm import LLM
from nanovllm.kernels import activation, embedding, layernorm, qk_norm_rope, sampling, triton_compat
assert not triton_compat.HAS_TRITON and not triton_compat.use_triton(torch.zeros(1))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
