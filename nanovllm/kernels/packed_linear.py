"""Products with weights of 4 or 8 bits that are widened in registers; activations stay as they are. Called by `layers.quantized`.

T rows, K inner, N outer; `group` neighbouring columns of a weight's row share a scale and a zero point. Of 4 bits, byte j of a row holds
column j below and column K / 2 + j above: both halves meet rows of `x` that lie together, and nothing need be interleaved.
Few rows are bound by the weight's bytes, which are read once. For many, the weight is widened in a buffer and cuBLAS does the rest.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nanovllm.kernels.triton_compat import multiprocessors, tl, triton, use_pdl

# More rows than this are worth a widened copy of the weight.
MAX_ROWS = 256
# What 4 bits without zero points mean is their number less this.
MIDDLE = 8


class PackedTiles(NamedTuple):
    """How a product is cut: a program makes [block_m, block_n] of the output, block_k columns (of each half) at a time."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    stages: int
    warps: int


@cache
def packed_tiles(rows: int, n: int, k: int, group: int, sms: int, *, partial: bool = False) -> PackedTiles:
    """Tiles for [rows, k] x [n, k]^T on `sms` multiprocessors; `partial`: the caller adds partial sums up."""
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_n = 64
    programs = -(-rows // block_m) * -(-n // block_n)
    splits = 1
    while partial and splits < 4 and programs * splits < sms and k % (2 * splits * 2 * 128) == 0:
        splits *= 2
    return PackedTiles(block_m, block_n, 64 if group % 64 == 0 else 32, splits, 4, 4)


def pack_columns(numbers: torch.Tensor) -> torch.Tensor:
    """[N, K] numbers from 0 to 15 -> [N, K / 2] uint8, see above."""
    low, high = numbers.to(torch.uint8).chunk(2, dim=1)
    return low | (high << 4)


def unpack_weight_torch(
    numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What a weight means: [N, K] of `dtype`.

    Args:
        numbers: [N, K / 2] uint8 of `pack_columns`, or [N, K] int8 or float8_e4m3fn.
        scale: [G, N] float32, G groups; zero: [G, N] int16, None: without zero points.
    """
    if numbers.dtype == torch.uint8:
        values = torch.cat((numbers & 15, numbers >> 4), dim=1).float()
    else:
        values = numbers.float()
    grouped = values.view(len(values), len(scale), -1)
    if zero is not None:
        grouped = grouped - zero.t().float().unsqueeze(-1)
    elif numbers.dtype == torch.uint8:
        grouped = grouped - MIDDLE
    return (grouped * scale.t().unsqueeze(-1)).view(values.shape).to(dtype)


def unpack_weight(
    numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """See `unpack_weight_torch`."""
    rows, width = numbers.shape
    packed = numbers.dtype == torch.uint8
    k = width * (1 + packed)
    weight = torch.empty(rows, k, dtype=dtype, device=numbers.device)
    block = 1024
    _unpack_kernel[(rows, triton.cdiv(width, block))](
        numbers, scale, zero, weight, rows, width, k // len(scale), PACKED=packed, BLOCK=block, num_warps=4
    )
    return weight


@triton.jit
def _unpack_kernel(
    numbers_ptr, scale_ptr, zero_ptr, weight_ptr, rows, width, group, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(numbers_ptr + row * width + column, mask=inside, other=0.0)
    dtype = weight_ptr.dtype.element_ty
    for half in tl.static_range(2 if PACKED else 1):
        values = numbers
        if PACKED:
            values = (numbers >> 4) if half == 1 else (numbers & 15)
        k = half * width + column
        at = (k // group).to(tl.int64) * rows + row
        values = values.to(tl.float32)
        if zero_ptr is not None:
            values -= tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
        elif PACKED:
            values -= 8.0
        values *= tl.load(scale_ptr + at, mask=inside, other=0.0)
        tl.store(weight_ptr + row * width * (2 if PACKED else 1) + k, values.to(dtype), mask=inside)


def packed_linear_torch(
    x: torch.Tensor,
    numbers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    partial: bool = False,
) -> torch.Tensor:
    """`x` [T, K] times what the weight means (see `unpack_weight_torch`), transposed, plus `bias` [N].

    Args:
        out: [T, N] to write to, None: a fresh tensor; partial: whether the result may be partial sums.

    Returns:
        [T, N] in the type of `x`, or partial sums [S, T, N] in float32, the bias in the first.
    """
    y = F.linear(x, unpack_weight_torch(numbers, scale, zero, x.dtype), bias)
    return y if out is None else out.copy_(y)


def packed_linear(
    x: torch.Tensor,
    numbers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    partial: bool = False,
) -> torch.Tensor:
    """See `packed_linear_torch`; K is a multiple of 128, groups of 32, N of 32."""
    if len(x) > MAX_ROWS:
        weight = unpack_weight(numbers, scale, zero, x.dtype)
        y = F.linear(x, weight, bias)
        return y if out is None else out.copy_(y)
    tiles = packed_tiles(
        len(x), len(numbers), x.shape[1], x.shape[1] // len(scale), multiprocessors(x.device), partial=partial
    )
    return triton_packed_linear(x, numbers, scale, zero, tiles if out is None else tiles._replace(splits=1), bias, out)


def triton_packed_linear(
    x: torch.Tensor,
    numbers: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    tiles: PackedTiles,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`packed_linear` with these tiles; no `out` where they make partial sums."""
    (rows, k), (n, width) = x.shape, numbers.shape
    packed = numbers.dtype == torch.uint8
    group = k // len(scale)
    assert x.stride(1) == 1 and numbers.is_contiguous() and width == k // (1 + packed)
    assert width % (tiles.splits * tiles.block_k) == 0 and group % tiles.block_k == 0
    assert n % 32 == 0 and (out is None or out.stride(1) == 1)
    if tiles.splits > 1:
        assert out is None
        out = torch.empty(tiles.splits, rows, n, dtype=torch.float32, device=x.device)
    elif out is None:
        out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    pdl = use_pdl(x)
    grid = (triton.cdiv(rows, tiles.block_m), triton.cdiv(n, tiles.block_n), tiles.splits)
    _packed_linear_kernel[grid](
        x,
        numbers,
        scale,
        zero,
        bias,
        out,
        rows,
        n,
        width,
        width // tiles.splits,
        group,
        x.stride(0),
        out.stride(-2),
        PACKED=packed,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        EVEN_N=n % tiles.block_n == 0,
        STAGES=tiles.stages,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=tiles.warps,
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _packed_linear_kernel(
    x_ptr,
    numbers_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    rows,
    n_size,
    width,
    split_size,
    group,
    stride_x,
    stride_out,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = split * split_size
    k = start + tl.arange(0, BLOCK_K)
    inside = (m < rows)[None, :]
    # Rows past the end of the weight are read from its beginning, and thrown away.
    n_read = n if EVEN_N else n % n_size
    x_tile = x_ptr + m.to(tl.int64)[None, :] * stride_x + k[:, None]
    tile = numbers_ptr + n_read.to(tl.int64)[:, None] * width + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Transposed, the weight being the left side: that is the one tensor cores take from registers.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in tl.range(start, start + split_size, BLOCK_K, num_stages=STAGES):
        numbers = tl.load(tile)
        x = tl.load(x_tile, mask=inside, other=0.0)
        low = (numbers & 15) if PACKED else numbers
        weight = _meaning(low, scale_ptr, zero_ptr, at // group, n_size, n_read, PACKED)
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision=PRECISION)
        if PACKED:
            x = tl.load(x_tile + width, mask=inside, other=0.0)
            weight = _meaning(numbers >> 4, scale_ptr, zero_ptr, (width + at) // group, n_size, n_read, PACKED)
            acc = tl.dot(weight.to(x.dtype), x, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        tile += BLOCK_K
    if bias_ptr is not None:  # noqa: SIM102 - known to the compiler, and the next is not
        if split == 0:
            acc += tl.load(bias_ptr + n_read).to(tl.float32)[:, None]
    out_row = split.to(tl.int64) * rows + m
    out = out_ptr + out_row[None, :] * stride_out + n[:, None]
    mask = inside if EVEN_N else inside & (n < n_size)[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _meaning(numbers, scale_ptr, zero_ptr, group, n_size, n, PACKED: tl.constexpr):
    """A tile [n, k] of one group in float32."""
    at = group.to(tl.int64) * n_size + n
    values = numbers.to(tl.float32)
    if zero_ptr is not None:
        values -= tl.load(zero_ptr + at).to(tl.float32)[:, None]
    elif PACKED:
        values -= 8.0
    return values * tl.load(scale_ptr + at)[:, None]
