"""Products of few rows (a decode step) with small weights, where a launch and the first read cost as much as the bytes.

One wave of programs reads the weight once; each starts while the kernel before it ends. The gated form ends in SwiGLU, and a
product that would fill too few multiprocessors is cut along the inner dimension into partial sums, which the residual addition
after it adds up (`layernorm.add_rms_norm`). Low-rank adapters (`kernels.lora`) are some more of the inner dimension. Called by `layers.linear` where `skinny_tiles` has an answer; shapes: T rows, K
inner, N outer. Reference: `torch.nn.functional.linear`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.lora import PART_COLUMNS, LowRank
from nanovllm.kernels.triton_compat import HAS_TRITON, multiprocessors, tl, triton, use_pdl

# More rows are computation, not memory traffic, and larger weights take so long that a launch does not matter: there
# cuBLAS is as fast or faster (bench/NOTES.md).
MAX_ROWS = 256
MAX_WEIGHT_ELEMENTS = 1 << 23
BLOCK_K = 64
# Columns of the adapters' low ranks that are taken at a time, at most.
MOST_BLOCK_R = 128


class SkinnyTiles(NamedTuple):
    """How a product is cut: a program makes [block_m, block_n] of the output (gated: of gate and of up) from K / splits."""

    block_m: int
    block_n: int
    splits: int
    stages: int
    warps: int


@cache
def skinny_tiles(
    rows: int, n: int, k: int, sms: int, *, gated: bool = False, partial: bool = False
) -> SkinnyTiles | None:
    """Tiles of one wave for [rows, k] x [n, k]^T (gated: x [2 * n, k]^T); None where cuBLAS is the better choice.

    Args:
        sms: multiprocessors of the device.
        partial: the caller adds partial sums up.
    """
    if not 0 < rows <= MAX_ROWS or n * k * (1 + gated) > MAX_WEIGHT_ELEMENTS or k % BLOCK_K:
        return None
    block_m = 128 if gated and rows > 128 else 64
    row_tiles = -(-rows // block_m)
    # The narrowest tile that needs no second wave; partial sums fill the wave instead, and wider tiles read their rows less often.
    widths = (32,) if partial and row_tiles == 1 else (64,) if partial or block_m == 128 else (32, 64, 128)
    for block_n in widths:
        programs = row_tiles * (n // block_n)
        if n % block_n == 0 and programs <= sms:
            splits = 1
            while partial and splits < 4 and programs * splits * 2 <= sms and k % (2 * splits * BLOCK_K) == 0:
                splits *= 2
            wide = block_n == 128 or (gated and block_n == 64)
            return SkinnyTiles(block_m, block_n, splits, stages=4 if wide else 6, warps=8 if block_m == 128 else 4)
    return None


def choose_tiles(
    x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False, partial: bool = False
) -> SkinnyTiles | None:
    """`skinny_tiles` of this product, None also where Triton or a 16-bit type is missing."""
    if not (HAS_TRITON and x.is_cuda and x.dtype.itemsize == 2):
        return None
    n = len(weight) // (2 if gated else 1)
    return skinny_tiles(len(x), n, weight.shape[1], multiprocessors(x.device), gated=gated, partial=partial)


def skinny_linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    tiles: SkinnyTiles,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, plus `bias` [N], plus what `low_rank` says of T tokens and N columns.

    Returns:
        [T, N]; gated, where the first half of `weight`'s 2 * N rows makes the gate: silu(gate) * up, [T, N]; with
        `tiles.splits` S over 1 and no gate: partial sums [S, T, N] in float32, bias and low rank in the first.
    """
    if tiles.splits > 1:
        parts = torch.stack(
            [
                F.linear(x_part.float(), w_part.float())
                for x_part, w_part in zip(x.chunk(tiles.splits, 1), weight.chunk(tiles.splits, 1), strict=True)
            ]
        )
        if bias is not None:
            parts[0] += bias
        if low_rank is not None:
            parts[0] += _low_rank_torch(low_rank)
        return parts
    y = F.linear(x, weight, bias)
    if low_rank is not None:
        y = (y.float() + _low_rank_torch(low_rank)).to(x.dtype)
    return silu_and_mul_torch(y) if gated else y


def _low_rank_torch(added: LowRank) -> torch.Tensor:
    """[T, N] float32."""
    rank = added.b.shape[2]
    total = added.low.new_zeros(len(added.adapters), added.b.shape[1])
    columns = added.parts.repeat_interleave(PART_COLUMNS)
    for token, adapter in enumerate(added.adapters.tolist()):
        if adapter >= 0:
            low = added.low[:, token].sum(0).view(-1, rank).to(added.b.dtype).float()
            total[token] = (low[columns.long()] * added.b[adapter].float()).sum(1)
    return total


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    tiles: SkinnyTiles,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """See `skinny_linear_torch`. What made `low_rank.low` was launched just before, and is waited for only at the end."""
    rows, k = x.shape
    n = len(weight) // (2 if gated else 1)
    assert x.stride(1) == 1 and weight.is_contiguous() and n % tiles.block_n == 0
    splits = tiles.splits
    shape, dtype = ((rows, n), x.dtype) if splits == 1 else ((splits, rows, n), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    adapters, rank = (0, 1) if low_rank is None else (len(low_rank.b), low_rank.b.shape[2])
    pdl = use_pdl(x)
    _skinny_linear_kernel[(triton.cdiv(rows, tiles.block_m), n // tiles.block_n, splits)](
        x,
        weight,
        bias,
        out,
        *((None,) * 4 if low_rank is None else low_rank),
        rows,
        n,
        k,
        k // splits,
        x.stride(0),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=BLOCK_K,
        STAGES=tiles.stages,
        GATED=gated,
        LOW_SPLITS=0 if low_rank is None else len(low_rank.low),
        LOW_WIDTH=0 if low_rank is None else low_rank.low.shape[2],
        ADAPTERS=adapters,
        RANK=rank,
        BLOCK_R=min(MOST_BLOCK_R, triton.next_power_of_2(max(16, adapters * rank))),
        PART_COLUMNS=PART_COLUMNS,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tiles.warps,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _skinny_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    low_ptr,
    b_ptr,
    adapters_ptr,
    parts_ptr,
    rows,
    n_size,
    k_size,
    split_size,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
    LOW_SPLITS: tl.constexpr,
    LOW_WIDTH: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * split_size + tl.arange(0, BLOCK_K)
    inside = (m < rows)[:, None]
    x_tile = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    weight_tile = weight_ptr + n.to(tl.int64)[None, :] * k_size + k[:, None]
    # With adapters the kernel before is what made `low`, and what came before that is done.
    if PDL and LOW_SPLITS == 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_tile = weight_tile + n_size.to(tl.int64) * k_size
        up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, split_size, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_tile, mask=inside, other=0.0)
        acc = tl.dot(x, tl.load(weight_tile), acc, input_precision=PRECISION)
        if GATED:
            up_acc = tl.dot(x, tl.load(up_tile), up_acc, input_precision=PRECISION)
            up_tile += BLOCK_K
        x_tile += BLOCK_K
        weight_tile += BLOCK_K
    dtype = out_ptr.dtype.element_ty
    if LOW_SPLITS > 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if split == 0:
            adapter = tl.load(adapters_ptr + m, mask=m < rows, other=-1)
            low = low_ptr + m.to(tl.int64) * LOW_WIDTH
            if GATED:
                all_rows = 2 * n_size
                up_acc = _add_low_rank(
                    up_acc, low + RANK, b_ptr, adapter, rows, all_rows, n_size + n,
                    LOW_SPLITS, LOW_WIDTH, ADAPTERS, RANK, BLOCK_R, PRECISION,
                )  # fmt: skip
            else:
                all_rows = n_size
                low += tl.load(parts_ptr + tl.program_id(1) * BLOCK_N // PART_COLUMNS) * RANK
            acc = _add_low_rank(
                acc, low, b_ptr, adapter, rows, all_rows, n,
                LOW_SPLITS, LOW_WIDTH, ADAPTERS, RANK, BLOCK_R, PRECISION,
            )  # fmt: skip
    if bias_ptr is not None:  # noqa: SIM102 - known to the compiler, and the next is not
        if split == 0:
            acc += tl.load(bias_ptr + n).to(tl.float32)[None, :]
            if GATED:
                up_acc += tl.load(bias_ptr + n_size + n).to(tl.float32)[None, :]
    if GATED:
        # Rounded where the product, silu and their product are in torch.
        gate = acc.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = silu * up_acc.to(dtype).to(tl.float32)
    out_row = split.to(tl.int64) * rows + m
    tl.store(out_ptr + out_row[:, None] * n_size + n[None, :], acc.to(dtype), mask=inside)


@triton.jit
def _add_low_rank(
    acc,
    low_rows,
    b_ptr,
    adapter,
    rows,
    all_rows,
    n,
    LOW_SPLITS: tl.constexpr,
    LOW_WIDTH: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc` plus the rows' low rank times B: all adapters' side by side, where those that are not a row's own count as 0."""
    for base in tl.static_range(0, ADAPTERS * RANK, BLOCK_R):
        one = (base + tl.arange(0, BLOCK_R)) // RANK
        r = (base + tl.arange(0, BLOCK_R)) % RANK
        own = adapter[:, None] == one[None, :]
        low = tl.zeros((acc.shape[0], BLOCK_R), tl.float32)
        for split in tl.static_range(LOW_SPLITS):
            place = low_rows[:, None] + tl.cast(split, tl.int64) * rows * LOW_WIDTH + r[None, :]
            low += tl.load(place, mask=own, other=0.0)
        place = b_ptr + (one.to(tl.int64)[:, None] * all_rows + n[None, :]) * RANK + r[:, None]
        b = tl.load(place, mask=(one < ADAPTERS)[:, None], other=0.0)
        acc = tl.dot(low.to(b.dtype), b, acc, input_precision=PRECISION)
    return acc
