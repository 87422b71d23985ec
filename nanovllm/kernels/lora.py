"""Low-rank adapters: `out += (x A^T) B^T`, with the A and B of each token's own adapter. Called by `layers.lora`.

T tokens of K features; L adapters of rank R each; P matrices of one input side by side (query, key and value, say), whose rows of `out`
follow each other. An adapter's matrices are padded with zeros to R, which is a power of two of 16 or more.
Tokens are grouped by adapter once a step (`kernels.grouping`); those without one are in no group and cost nothing. A layer is then two
launches, to the low rank and back, or one where the layer's own product can end in the second (`LowRank`). Source of the method: S-LoRA (arXiv 2311.03285), Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from nanovllm.kernels.grouping import group_rows
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Tokens of a tile, and the most parts that its sum over K is made in, for steps of up to so many tokens: few tokens make few tiles,
# and parts occupy the device, but each tile of the product after it reads them all (bench/NOTES.md).
TILES = ((128, 16, 8), (1024, 32, 2))
LARGEST_TILE = (64, 1)
SPLIT_FEATURES = 512
BLOCK_K = 128


class AdapterGroups(NamedTuple):
    """A step's tokens by adapter: what `group_rows` made of them in tiles of `block_m`, each sum over K in up to `splits` parts."""

    order: torch.Tensor
    plan: torch.Tensor
    block_m: int
    splits: int


class ColumnTiles(NamedTuple):
    """The columns of P matrices cut into tiles of up to `size` of one matrix each: [C, 3] int32 matrix, first column, its matrix's end.

    `aligned`: all of them are multiples of 16.
    """

    tiles: torch.Tensor
    size: int
    aligned: bool


class LowRank(NamedTuple):
    """What a product of `kernels.skinny_linear` adds to its result: for token t the product of its low rank with its adapter's B.

    Attributes:
        low: [S, T, P * R] float32 of `shrink`; b: [L, N, R]; adapters: [T] int32, -1 for none.
        parts: [N / PART_COLUMNS] int32, the matrix each column belongs to.
    """

    low: torch.Tensor
    b: torch.Tensor
    adapters: torch.Tensor
    parts: torch.Tensor


# Columns that an element of `LowRank.parts` stands for.
PART_COLUMNS = 32
# Most columns of all adapters' low ranks that a product goes through for every token.
MOST_APPENDED = 512


def group_adapters(adapters: torch.Tensor, count: int) -> AdapterGroups:
    """Groups of a step whose tokens have `adapters` [T] int32 of `count`, -1 for none."""
    block_m, splits = next((rest for most, *rest in TILES if len(adapters) <= most), LARGEST_TILE)
    return AdapterGroups(*group_rows(adapters, count, 0, block_m), block_m, splits)


def column_tiles(starts: list[int], device: torch.device) -> ColumnTiles:
    """Tiles of a layer whose matrices begin at `starts`, see `lora_add_torch`."""
    size = 256 if starts[-1] >= 8192 else 128
    tiles = [
        (part, column, end)
        for part, (start, end) in enumerate(itertools.pairwise(starts))
        for column in range(start, end, size)
    ]
    return ColumnTiles(
        torch.tensor(tiles, dtype=torch.int32, device=device), size, all(start % 16 == 0 for start in starts)
    )


def part_columns(starts: list[int], device: torch.device) -> torch.Tensor:
    """`LowRank.parts` of a layer whose matrices begin at `starts`."""
    parts = [sum(start <= column for start in starts[1:-1]) for column in range(0, starts[-1], PART_COLUMNS)]
    return torch.tensor(parts, dtype=torch.int32, device=device)


def lora_add_torch(
    x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapters: torch.Tensor, starts: list[int]
) -> torch.Tensor:
    """Add each token's adapter to `out`.

    Args:
        x: [T, K]; out: [T, N], changed and returned.
        a: [L, P * R, K]; b: [L, N, R].
        adapters: [T] which one is a token's; -1: none.
        starts: [P + 1] the first row of each matrix in `out`, and N.
    """
    rank = b.shape[2]
    for adapter in adapters.unique().tolist():
        if adapter < 0:
            continue
        rows = (adapters == adapter).nonzero().squeeze(1)
        low = x[rows].float() @ a[adapter].float().t()
        high = torch.cat(
            [
                low[:, part * rank : (part + 1) * rank].to(x.dtype).float() @ b[adapter, start:end].float().t()
                for part, (start, end) in enumerate(itertools.pairwise(starts))
            ],
            dim=1,
        )
        out[rows] = (out[rows].float() + high).to(out.dtype)
    return out


def lora_add(
    x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, groups: AdapterGroups, columns: ColumnTiles
) -> torch.Tensor:
    """See `lora_add_torch`; `groups` of the step's adapters and `columns` of the layer's starts.

    The kernel that is launched last must not be what makes `x`; it may be what makes `out`.
    """
    tokens, width = len(x), a.shape[1]
    if not tokens:
        return out
    rank = b.shape[2]
    assert out.stride(1) == 1 and b.is_contiguous()
    low = shrink(x, a, rank, groups, x_is_old=True)
    pdl = use_pdl(x)
    _expand_kernel[(len(columns.tiles), len(groups.plan))](
        low,
        b,
        out,
        groups.order,
        groups.plan,
        columns.tiles,
        tokens,
        width,
        out.stride(0),
        b.shape[1],
        SPLITS=len(low),
        BLOCK_M=groups.block_m,
        RANK=rank,
        COLUMNS=columns.size,
        ALIGNED=columns.aligned,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    return out


def shrink(x: torch.Tensor, a: torch.Tensor, rank: int, groups: AdapterGroups, *, x_is_old: bool) -> torch.Tensor:
    """`x` [T, K] times its tokens' rows of `a` [L, P * R, K]: [S, T, P * R] float32, to be added up over S.

    Rows of tokens without adapters are not written.

    Args:
        groups: the kernel that was launched last is not what makes them: they are read before its end.
        x_is_old: nor is it what makes `x`, so that this one may run beside it.
    """
    tokens, features = x.shape
    width = a.shape[1]
    assert x.stride(1) == 1 and a.is_contiguous()
    splits = max(1, min(groups.splits, features // SPLIT_FEATURES))
    split_features = triton.cdiv(triton.cdiv(features, splits), BLOCK_K) * BLOCK_K
    splits = triton.cdiv(features, split_features)
    low = torch.empty(splits, tokens, width, dtype=torch.float32, device=x.device)
    pdl = use_pdl(x)
    _shrink_kernel[(width // rank, splits, len(groups.plan))](
        x,
        a,
        low,
        groups.order,
        groups.plan,
        tokens,
        features,
        width,
        x.stride(0),
        split_features,
        BLOCK_M=groups.block_m,
        RANK=rank,
        BLOCK_K=BLOCK_K,
        OLD_X=x_is_old,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    return low


@triton.jit(do_not_specialize=["tokens"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    order,
    plan,
    tokens,
    features,
    width,
    stride_x,
    split_features,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OLD_X: tl.constexpr,
    PDL: tl.constexpr,
):
    """low[split, t, r] = sum over the split's k of x[t, k] * a[adapter of t, r, k]."""
    r = tl.program_id(0) * RANK + tl.arange(0, RANK)
    split = tl.program_id(1)
    tile = plan + tl.program_id(2) * 4
    adapter = tl.load(tile)
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    inside = (m < tl.load(tile + 2)) & (adapter >= 0)
    # A tile that is none goes on with nothing to sum up: every program has to wait below.
    first = split * split_features
    size = tl.where(adapter < 0, 0, tl.minimum(split_features, features - first))
    t = tl.load(order + m, mask=inside, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + t[:, None] * stride_x + (first + k)[None, :]
    a_tile = a_ptr + (adapter * width + r[None, :]).to(tl.int64) * features + (first + k)[:, None]
    if PDL and not OLD_X:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for base in tl.range(0, size, BLOCK_K, num_stages=4):
        rest = k < size - base
        x = tl.load(x_tile, mask=inside[:, None] & rest[None, :], other=0.0)
        acc = tl.dot(x, tl.load(a_tile, mask=rest[:, None], other=0.0), acc, input_precision="ieee")
        x_tile += BLOCK_K
        a_tile += BLOCK_K
    if PDL and OLD_X:
        # Nothing above was made by the kernel before, whose time this one's takes.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = low_ptr + (split * tokens + t[:, None]) * width + r[None, :]
    tl.store(place, acc, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _expand_kernel(
    low_ptr,
    b_ptr,
    out_ptr,
    order,
    plan,
    column_tiles,
    tokens,
    width,
    stride_out,
    all_rows,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t, n] += sum over r of low[t, r of n's matrix] * b[adapter of t, n, r]."""
    tile = plan + tl.program_id(1) * 4
    adapter = tl.load(tile)
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    inside = (m < tl.load(tile + 2)) & (adapter >= 0)
    columns = column_tiles + tl.program_id(0) * 3
    column, end = tl.load(columns + 1), tl.load(columns + 2)
    if ALIGNED:
        column, end = tl.multiple_of(column, 16), tl.multiple_of(end, 16)
    n = column + tl.arange(0, COLUMNS)
    in_matrix = n < end
    r = tl.arange(0, RANK)
    t = tl.load(order + m, mask=inside, other=0).to(tl.int64)
    low_place = low_ptr + t[:, None] * width + tl.load(columns) * RANK + r[None, :]
    b = tl.load(
        b_ptr + (adapter * all_rows + n[None, :]).to(tl.int64) * RANK + r[:, None],
        mask=in_matrix[None, :] & (adapter >= 0),
        other=0.0,
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if adapter >= 0:
        low = tl.zeros((BLOCK_M, RANK), tl.float32)
        for split in tl.static_range(SPLITS):
            low += tl.load(low_place + tl.cast(split, tl.int64) * tokens * width, mask=inside[:, None], other=0.0)
        added = tl.dot(low.to(b.dtype), b, input_precision="ieee")
        mask = inside[:, None] & in_matrix[None, :]
        place = out_ptr + t[:, None] * stride_out + n[None, :]
        out = tl.load(place, mask=mask, other=0.0)
        tl.store(place, (out.to(tl.float32) + added).to(out.dtype), mask=mask)
