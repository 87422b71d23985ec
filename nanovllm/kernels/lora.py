"""Low-rank adapters: `out += (x A^T) B^T`, with the A and B of each token's own adapter. Called by `layers.lora`.

T tokens of K features; L adapters of rank R each; P matrices of one input side by side (query, key and value, say), whose rows of `out`
follow each other. An adapter's matrices are padded with zeros to R, which is a power of two of 16 or more.
Tokens are grouped by adapter once a step (`kernels.grouping`); those without one are in no group and cost nothing. A layer is then two
launches: to the low rank and back. Source of the method: S-LoRA (arXiv 2311.03285), Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from nanovllm.kernels.grouping import group_rows
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Tokens of a tile, and the most parts that its sum over K is made in, for steps of up to so many tokens: few tokens make few tiles,
# and parts occupy the device.
TILES = ((128, 16, 8), (1024, 32, 4))
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
    """The columns of P matrices cut into tiles of up to `size` of one matrix each: [C, 3] int32 matrix, first column, its matrix's end."""

    tiles: torch.Tensor
    size: int


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
    return ColumnTiles(torch.tensor(tiles, dtype=torch.int32, device=device), size)


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

    `x` must be there before the kernel that is launched last has begun; that one may be what makes `out`.
    """
    tokens, features = x.shape
    if not tokens:
        return out
    _, width, _ = a.shape
    rank = b.shape[2]
    assert x.stride(1) == 1 and out.stride(1) == 1 and a.is_contiguous() and b.is_contiguous()
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
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
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
        SPLITS=splits,
        BLOCK_M=groups.block_m,
        RANK=rank,
        COLUMNS=columns.size,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    return out


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
    PDL: tl.constexpr,
):
    """low[split, m, r] = sum over the split's k of x[t, k] * a[adapter, r, k], where t is the token at place m."""
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
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for base in tl.range(0, size, BLOCK_K, num_stages=4):
        rest = k < size - base
        x = tl.load(x_tile, mask=inside[:, None] & rest[None, :], other=0.0)
        acc = tl.dot(x, tl.load(a_tile, mask=rest[:, None], other=0.0), acc, input_precision="ieee")
        x_tile += BLOCK_K
        a_tile += BLOCK_K
    if PDL:
        # Nothing above was made by the kernel before, whose time this one's takes.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = low_ptr + (split * tokens + m[:, None]).to(tl.int64) * width + r[None, :]
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
    PDL: tl.constexpr,
):
    """out[t, n] += sum over r of low[m, r of n's matrix] * b[adapter, n, r], where t is the token at place m."""
    tile = plan + tl.program_id(1) * 4
    adapter = tl.load(tile)
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    inside = (m < tl.load(tile + 2)) & (adapter >= 0)
    columns = column_tiles + tl.program_id(0) * 3
    n = tl.load(columns + 1) + tl.arange(0, COLUMNS)
    in_matrix = n < tl.load(columns + 2)
    r = tl.arange(0, RANK)
    low_place = low_ptr + m[:, None].to(tl.int64) * width + tl.load(columns) * RANK + r[None, :]
    t = tl.load(order + m, mask=inside, other=0).to(tl.int64)
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
