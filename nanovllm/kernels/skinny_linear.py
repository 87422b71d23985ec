"""Products of few rows (a decode step) with small weights, where a launch and the first read cost as much as the bytes.

One wave of programs reads the weight once; each starts while the kernel before it ends. The gated form ends in SwiGLU, and a
product that would fill too few multiprocessors is cut along the inner dimension into partial sums, which the residual addition
after it adds up (`layernorm.add_rms_norm`). Called by `layers.linear` where `skinny_tiles` has an answer; shapes: T rows, K
inner, N outer. Reference: `torch.nn.functional.linear`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.triton_compat import HAS_TRITON, tl, triton, use_pdl

# More rows are computation, not memory traffic, and larger weights take so long that a launch does not matter: there
# cuBLAS is as fast or faster (bench/NOTES.md).
MAX_ROWS = 256
MAX_WEIGHT_ELEMENTS = 1 << 23
BLOCK_K = 64
# Multiprocessors where there is no GPU to ask.
DEFAULT_SMS = 132


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


@cache
def _multiprocessors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def choose_tiles(
    x: torch.Tensor, weight: torch.Tensor, *, gated: bool = False, partial: bool = False
) -> SkinnyTiles | None:
    """`skinny_tiles` of this product, None also where Triton or a 16-bit type is missing."""
    if not (HAS_TRITON and x.is_cuda and x.dtype.itemsize == 2):
        return None
    n = len(weight) // (2 if gated else 1)
    return skinny_tiles(len(x), n, weight.shape[1], _multiprocessors(x.device.index or 0), gated=gated, partial=partial)


def skinny_linear_torch(
    x: torch.Tensor, weight: torch.Tensor, tiles: SkinnyTiles, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, plus `bias` [N].

    Returns:
        [T, N]; gated, where the first half of `weight`'s 2 * N rows makes the gate: silu(gate) * up, [T, N]; with
        `tiles.splits` S over 1 and no gate: partial sums [S, T, N] in float32, the bias in the first.
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
        return parts
    y = F.linear(x, weight, bias)
    return silu_and_mul_torch(y) if gated else y


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, tiles: SkinnyTiles, bias: torch.Tensor | None = None, *, gated: bool = False
) -> torch.Tensor:
    """See `skinny_linear_torch`."""
    rows, k = x.shape
    n = len(weight) // (2 if gated else 1)
    assert x.stride(1) == 1 and weight.is_contiguous() and n % tiles.block_n == 0
    splits = tiles.splits
    shape, dtype = ((rows, n), x.dtype) if splits == 1 else ((splits, rows, n), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    pdl = use_pdl(x)
    _skinny_linear_kernel[(triton.cdiv(rows, tiles.block_m), n // tiles.block_n, splits)](
        x,
        weight,
        bias,
        out,
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
    if PDL:
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
