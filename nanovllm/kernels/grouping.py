"""Rows brought together by the group they belong to (an expert, an adapter), and cut into tiles of one group each.

All on the device, in launches whose sizes follow from the number of rows alone, so that a CUDA graph can hold them. Called by
`kernels.fused_moe` and `kernels.lora`, whose products take such a tile a program (grouped GEMM, as in MegaBlocks, Gale et al. 2022).
"""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Rows of a program.
BLOCK = 128


def most_tiles(rows: int, num_groups: int, block_m: int) -> int:
    """Most tiles of up to `block_m` rows of one group each."""
    return rows // block_m + min(rows, num_groups)


def group_rows(ids: torch.Tensor, num_groups: int, first_group: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in the order of their groups, and the tiles they make. Within a group they are in any order.

    Args:
        ids: int32, contiguous, the group of each of its N elements, which are the rows; those outside `first_group` to
            `first_group + num_groups` are left out.

    Returns:
        order: [N] int32 rows, as many as are not left out; what follows is not written.
        plan: [most_tiles, 4] int32: group (counted from the first, -1 for no tile), first place in `order` and end; the last is
            not used.
    """
    rows = ids.numel()
    count = most_tiles(rows, num_groups, block_m)
    counts = torch.zeros(num_groups, dtype=torch.int32, device=ids.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=ids.device)
    order = torch.empty(rows, dtype=torch.int32, device=ids.device)
    plan = torch.empty(count, 4, dtype=torch.int32, device=ids.device)
    parts = triton.cdiv(rows, BLOCK)
    _count_kernel[(parts,)](ids, counts, ranks, rows, first_group, NUM_GROUPS=num_groups, BLOCK=BLOCK, num_warps=4)
    pdl = use_pdl(ids)
    # A program a group for its tiles, one for the tiles that are none, and those that place the rows.
    _place_kernel[(num_groups + 1 + parts,)](
        ids,
        counts,
        ranks,
        order,
        plan,
        rows,
        first_group,
        count,
        NUM_GROUPS=num_groups,
        BLOCK_M=block_m,
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK=BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    return order, plan


@triton.jit
def _local_group(ids, row, rows, first_group, NUM_GROUPS: tl.constexpr):
    """The groups of rows, counted from the first; `NUM_GROUPS` for those that are left out and past the end."""
    group = tl.load(ids + row, mask=row < rows, other=-1)
    local = group - first_group
    return tl.where((group >= 0) & (local >= 0) & (local < NUM_GROUPS), local, NUM_GROUPS)


@triton.jit(do_not_specialize=["rows", "first_group"])
def _count_kernel(ids, counts, ranks, rows, first_group, NUM_GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the rows of each group, and say which of its group's a row is."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = _local_group(ids, row, rows, first_group, NUM_GROUPS)
    inside = group < NUM_GROUPS
    rank = tl.atomic_add(counts + group, 1, mask=inside, sem="relaxed")
    tl.store(ranks + row, rank, mask=inside)


@triton.jit(do_not_specialize=["rows", "first_group", "count"])
def _place_kernel(
    ids,
    counts,
    ranks,
    order,
    plan,
    rows,
    first_group,
    count,
    NUM_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    mine = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    index = tl.arange(0, BLOCK_G)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sizes = tl.load(counts + index, mask=index < NUM_GROUPS, other=0)
    if mine > NUM_GROUPS:
        row = (mine - NUM_GROUPS - 1) * BLOCK + lane
        group = _local_group(ids, row, rows, first_group, NUM_GROUPS)
        inside = group < NUM_GROUPS
        first_of = tl.sum(tl.where(index[None, :] < group[:, None], sizes[None, :], 0), axis=1)
        tl.store(order + first_of + tl.load(ranks + row, mask=inside, other=0), row, mask=inside)
    else:
        tiles = (sizes + BLOCK_M - 1) // BLOCK_M
        first_tile = tl.sum(tl.where(index < mine, tiles, 0), axis=0)
        if mine == NUM_GROUPS:
            for base in range(0, count - first_tile, BLOCK):
                tile = first_tile + base + lane
                tl.store(plan + tile * 4, tl.full((BLOCK,), -1, tl.int32), mask=tile < count)
        else:
            first = tl.sum(tl.where(index < mine, sizes, 0), axis=0)
            end = first + tl.sum(tl.where(index == mine, sizes, 0), axis=0)
            for base in range(0, tl.sum(tl.where(index == mine, tiles, 0), axis=0), BLOCK):
                start = first + (base + lane) * BLOCK_M
                at = plan + (first_tile + base + lane) * 4
                tl.store(at, tl.zeros((BLOCK,), tl.int32) + mine, mask=start < end)
                tl.store(at + 1, start, mask=start < end)
                tl.store(at + 2, tl.minimum(start + BLOCK_M, end), mask=start < end)
