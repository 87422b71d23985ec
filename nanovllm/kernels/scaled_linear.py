"""Products of 8-bit activations and 8-bit weights on tensor cores, scaled to what they mean. Called by `layers.quantized`.

T rows, K inner, N outer. A row of either side has one scale, or one for each 128 columns (as DeepSeek-V3 has them, arXiv 2412.19437):
then what 128 columns add up to is scaled before it is added. cuBLAS takes large products with one scale a row; here are the small ones,
where a wave of narrow tiles reads the weight at the memory's pace, those with more scales, and those of integers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nanovllm.kernels.triton_compat import multiprocessors, tl, triton, use_pdl

# Columns of a group; inner tile of all products.
GROUP = 128
# Rows up to which a product whose rows have one scale is faster here than in cuBLAS.
MAX_ROWS = 64


class ScaledTiles(NamedTuple):
    """How a product is cut: a program makes [block_m, block_n] of the output from K / splits."""

    block_m: int
    block_n: int
    splits: int
    stages: int
    warps: int


@cache
def scaled_tiles(rows: int, n: int, k: int, sms: int, *, grouped: bool = False, partial: bool = False) -> ScaledTiles:
    """Tiles for [rows, k] x [n, k]^T on `sms` multiprocessors, from what was fastest on an H200 (bench/NOTES.md).

    Args:
        grouped: rows have a scale for each 128 columns: two sums, for which 128 x 128 needs the registers of eight warps.
        partial: the caller adds partial sums up.
    """
    if rows > 256:
        return ScaledTiles(128, 128, 1, 4, 8) if grouped else ScaledTiles(128, 128, 1, 3, 4)
    block_m = 64 if rows <= 64 or (grouped and not partial) else 128
    row_tiles = -(-rows // block_m)
    # The widest tiles that still occupy every multiprocessor, or nearly, cut along K where the caller adds up.
    most_splits = 4 if partial else 1
    widths = (64,) if partial and block_m == 128 else (128, 64)
    block_n = next((width for width in widths if row_tiles * (n // width) * most_splits >= 0.9 * sms), 32)
    splits = 1
    while splits < most_splits and row_tiles * (n // block_n) * splits < sms and k % (2 * splits * GROUP) == 0:
        splits *= 2
    stages = 3 if (block_m, block_n) == (128, 128) else 4 if splits > 1 or block_m == 128 or grouped else 5
    return ScaledTiles(block_m, block_n, splits, stages, warps=4)


def scaled_linear_torch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    partial: bool = False,
) -> torch.Tensor:
    """What `x` means times what `weight` means, transposed, plus `bias` [N].

    Args:
        x: [T, K] and x_scale: [G, T] float32 of `quantize_rows`, G being 1 or K / 128.
        weight: [N, K] of the type of `x`; scale: [G, N] float32.
        dtype: of the result; out: [T, N] of it to write to, None: a fresh tensor.
        partial: whether the result may be partial sums.

    Returns:
        [T, N] of `dtype`, or partial sums [S, T, N] in float32, the bias in the first.
    """
    group = x.shape[1] // len(scale)
    meant, weights = (
        values.float() * scales.t().repeat_interleave(group, 1) for values, scales in ((x, x_scale), (weight, scale))
    )
    y = F.linear(meant, weights, None if bias is None else bias.float()).to(dtype)
    return y if out is None else out.copy_(y)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    partial: bool = False,
) -> torch.Tensor:
    """See `scaled_linear_torch`; K is a multiple of 128, N of 32."""
    rows, (n, k) = len(x), weight.shape
    if len(scale) == 1 and rows > MAX_ROWS and x.is_cuda and x.dtype != torch.int8 and dtype == torch.bfloat16:
        return _cublas(x, x_scale, weight, scale, bias, out)
    tiles = scaled_tiles(rows, n, k, multiprocessors(x.device), grouped=len(scale) > 1, partial=partial and out is None)
    return triton_scaled_linear(x, x_scale, weight, scale, dtype, tiles, bias, out)


def _cublas(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    # Sums of less precision than float32, as tensor cores make them: what is rounded to 8 bits has none to lose.
    scales = {"scale_a": x_scale.view(-1, 1), "scale_b": scale, "use_fast_accum": True}
    given = {} if out is None else {"out": out}
    return torch._scaled_mm(x, weight.t(), bias=bias, out_dtype=torch.bfloat16, **scales, **given)


def unscaled_pays(rows: int, n: int, sms: int) -> bool:
    """Whether cuBLAS is faster at a product [rows, K] x [n, K]^T without its scales: with those of rows it has tiles of 128 x 128 only, and
    the last wave of these would leave multiprocessors idle (bench/NOTES.md)."""
    tiles = -(-rows // 128) * -(-n // 128)
    return rows > MAX_ROWS and tiles < 0.9 * -(-tiles // sms) * sms


def unscaled_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K], transposed, both float8_e4m3fn on a GPU, without their scales: [T, N] bfloat16."""
    one = _one(x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


def triton_scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    tiles: ScaledTiles,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`scaled_linear` with these tiles; no `out` where they make partial sums."""
    (rows, k), n = x.shape, len(weight)
    assert x.is_contiguous() and weight.is_contiguous() and k % (GROUP * tiles.splits) == 0
    assert n % 32 == 0 and (out is None or out.stride(1) == 1)
    if tiles.splits > 1:
        assert out is None
        out = torch.empty(tiles.splits, rows, n, dtype=torch.float32, device=x.device)
    elif out is None:
        out = torch.empty(rows, n, dtype=dtype, device=x.device)
    pdl = use_pdl(x)
    grid = (triton.cdiv(rows, tiles.block_m) * triton.cdiv(n, tiles.block_n), tiles.splits)
    _scaled_linear_kernel[grid](
        x,
        x_scale,
        weight,
        scale,
        bias,
        out,
        rows,
        n,
        k,
        k // tiles.splits,
        out.stride(-2),
        GROUPED=len(scale) > 1,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=GROUP,
        EVEN_N=n % tiles.block_n == 0,
        STAGES=tiles.stages,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tiles.warps,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _scaled_linear_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    n_size,
    k_size,
    split_size,
    stride_out,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # Programs that run at the same time share rows of eight tiles, so that the L2 cache holds what they read.
    SHARED: tl.constexpr = 8
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(n_size, BLOCK_N)
    first_m = tl.program_id(0) // (SHARED * column_tiles) * SHARED
    height = tl.minimum(row_tiles - first_m, SHARED)
    place = tl.program_id(0) % (SHARED * column_tiles)
    m = (first_m + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    k = split * split_size + tl.arange(0, BLOCK_K)
    inside = m < rows
    # Rows past the end of the weight are read from its beginning, and thrown away.
    n_read = n if EVEN_N else n % n_size
    x_tile = x_ptr + m.to(tl.int64)[:, None] * k_size + k[None, :]
    weight_tile = weight_ptr + n_read.to(tl.int64)[None, :] * k_size + k[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    if GROUPED:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first_group = split * (split_size // BLOCK_K)
        x_scale = x_scale_ptr + first_group * rows + m
        scale = scale_ptr + first_group.to(tl.int64) * n_size + n_read
        for _ in tl.range(0, split_size, BLOCK_K, num_stages=STAGES):
            x = tl.load(x_tile, mask=inside[:, None], other=0.0)
            part = tl.dot(x, tl.load(weight_tile), out_dtype=SUM)
            x_by = tl.load(x_scale, mask=inside, other=0.0)
            acc += part.to(tl.float32) * x_by[:, None] * tl.load(scale)[None, :]
            x_tile += BLOCK_K
            weight_tile += BLOCK_K
            x_scale += rows
            scale += n_size
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for _ in tl.range(0, split_size, BLOCK_K, num_stages=STAGES):
            x = tl.load(x_tile, mask=inside[:, None], other=0.0)
            total = tl.dot(x, tl.load(weight_tile), total, out_dtype=SUM)
            x_tile += BLOCK_K
            weight_tile += BLOCK_K
        x_by = tl.load(x_scale_ptr + m, mask=inside, other=0.0)
        acc = total.to(tl.float32) * x_by[:, None] * tl.load(scale_ptr + n_read)[None, :]
    if bias_ptr is not None:  # noqa: SIM102 - known to the compiler, and the next is not
        if split == 0:
            acc += tl.load(bias_ptr + n_read).to(tl.float32)[None, :]
    out_row = split.to(tl.int64) * rows + m
    out = out_ptr + out_row[:, None] * stride_out + n[None, :]
    mask = inside[:, None] if EVEN_N else inside[:, None] & (n < n_size)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
