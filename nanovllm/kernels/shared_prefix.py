"""Attention of many sequences over keys and values that they share: read once a tile of them, as one dense product.

A stretch of shared tokens is cut into parts, and each part with a tile of its members is an item of work. As many programs as run at a
time take the items in turn, so that what a step shares changes nothing about its launch. Their results are partial: what attends to a
sequence's own tokens joins them (`paged_decode`, by log-sum-exp). What is shared by whom the host says (`engine.shared_prefix`).
Source of the method: Hydragen (arXiv 2402.05099).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.fp8_cache import load_scales, scale_words
from nanovllm.kernels.paged_attention import context_slots, gather_kv, softcapped
from nanovllm.kernels.paged_decode import softcap_scores
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Rows of a program's product: the query heads of its members that share a KV head.
ROWS = 64
TILE = 64
# Those that run at the same time on a multiprocessor.
PROGRAMS_PER_SM = 2
NUM_STAGES = 3
NUM_WARPS = 4


class SharedBuffers(NamedTuple):
    """What the host says of a step's shared tokens, and partial results over them; all of fixed size, so that CUDA graphs can read them.

    Attributes:
        items: [I, 6] int32, see `SharedPrefixes`; num_items: [1] int32, how many there are.
        members: [M] int32 state slots.
        skipped, entries, counts: [R] int32 by state slot: tokens that are shared, first partial result, and how many.
        rows: [R] int32 by state slot: the row of the step; written by `plan_decode`.
        out: [E, Hq, D] float32; lse: [E, Hq] float32, base 2.
    """

    items: torch.Tensor
    num_items: torch.Tensor
    members: torch.Tensor
    skipped: torch.Tensor
    entries: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def make_shared_buffers(
    items: int, members: int, entries: int, slots: int, num_heads: int, head_dim: int, device: torch.device
) -> SharedBuffers:
    """Buffers for so many of each."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return SharedBuffers(
        ints(items, 6),
        ints(1),
        ints(members),
        ints(slots),
        ints(slots),
        ints(slots),
        ints(slots),
        torch.empty(entries, num_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(entries, num_heads, dtype=torch.float32, device=device),
    )


def members_of_tile(group: int, rows: int = ROWS) -> int:
    """Members that an item has at most: `group` query heads share a KV head."""
    return max(1, rows // group)


def attend_shared_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    buffers: SharedBuffers,
    scale: float,
    softcap: float = 0.0,
    scales: torch.Tensor | None = None,
) -> None:
    """Attend every member of every item to its part of the shared tokens.

    Args:
        q: [B, Hq, D]; k_cache, v_cache: [N, P, Hkv, D]; block_tables: [R, W].
        buffers: `out` and `lse` are written at the members' results.
        softcap: see `paged_attention.softcapped`; 0: none.
        scales: [N, Hkv, P, 2] of a cache in eight bits, see `fp8_cache`.
    """
    group = q.shape[1] // k_cache.shape[2]
    for slot, start, end, first, count, number in buffers.items[: int(buffers.num_items)].tolist():
        members = buffers.members[first : first + count].long()
        tokens = context_slots(block_tables[slot : slot + 1].long(), k_cache.shape[1], end, start)
        gathered = gather_kv(k_cache, v_cache, scales, tokens, torch.float32)
        k, v = (rows[0].repeat_interleave(group, 1) for rows in gathered)
        scores = torch.einsum("bhd,nhd->bhn", q[buffers.rows[members].long()].float(), k) * scale
        if softcap:
            scores = softcapped(scores, softcap)
        entries = buffers.entries[members].long() + number
        buffers.out[entries] = torch.einsum("bhn,nhd->bhd", scores.softmax(-1), v)
        buffers.lse[entries] = scores.logsumexp(-1) * 1.4426950408889634


def attend_shared(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    buffers: SharedBuffers,
    scale: float,
    softcap: float = 0.0,
    scales: torch.Tensor | None = None,
    *,
    programs: int,
    rows: int = ROWS,
    tile: int = TILE,
    num_stages: int = NUM_STAGES,
    num_warps: int = NUM_WARPS,
    other_kernel_between: bool = False,
) -> None:
    """See `attend_shared_torch`.

    Args:
        programs: that run at a time, of each KV head.
        rows: of an item's product, as many as `members_of_tile` was asked for; tile: tokens read at a time.
        other_kernel_between: another kernel was launched between the plan and this, whose end is waited for.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    assert k_cache.stride() == v_cache.stride() and q.is_contiguous()
    pdl = other_kernel_between and use_pdl(q)
    _shared_kernel[(num_kv_heads, programs)](
        q,
        k_cache,
        v_cache,
        block_tables,
        buffers.items,
        buffers.num_items,
        buffers.members,
        buffers.entries,
        buffers.rows,
        buffers.out,
        buffers.lse,
        scale_words(scales),
        len(q),
        scale * 1.4426950408889634,
        block_tables.stride(0),
        *k_cache.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        ROWS=max(16, triton.next_power_of_2(members_of_tile(group, rows) * group)),
        TILE=tile,
        STAGES=num_stages,
        SOFTCAP=softcap * 1.4426950408889634,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=num_warps,
    )


@triton.jit(do_not_specialize=["batch"])
def _shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_tables,
    items,
    num_items,
    members,
    entries,
    rows,
    out_ptr,
    lse_ptr,
    scales,
    batch,
    scale_log2,
    stride_table,
    stride_block,
    stride_token,
    stride_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    for item in range(tl.program_id(1), tl.load(num_items), tl.num_programs(1)):
        _attend_item(
            q_ptr,
            k_ptr,
            v_ptr,
            block_tables,
            items + item * 6,
            members,
            entries,
            rows,
            out_ptr,
            lse_ptr,
            scales,
            batch,
            scale_log2,
            stride_table,
            stride_block,
            stride_token,
            stride_head,
            NUM_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_SIZE,
            ROWS,
            TILE,
            STAGES,
            SOFTCAP,
            PRECISION,
        )


@triton.jit
def _attend_item(
    q_ptr,
    k_ptr,
    v_ptr,
    block_tables,
    item,
    members,
    entries,
    rows,
    out_ptr,
    lse_ptr,
    scales,
    batch,
    scale_log2,
    stride_table,
    stride_block,
    stride_token,
    stride_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    FP8: tl.constexpr = scales is not None
    OPERAND: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    head = tl.program_id(0)
    slot, start, end = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first, count, number = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    table = block_tables + slot.to(tl.int64) * stride_table
    m = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    live = m // GROUP < count
    member = tl.load(members + first + m // GROUP, mask=live, other=0)
    row = tl.load(rows + member, mask=live, other=0).to(tl.int64)
    live = live & (row < batch)  # while a graph is captured, rows are those of an earlier step
    entry = tl.load(entries + member, mask=live, other=0).to(tl.int64) + number
    heads = head * GROUP + m % GROUP
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (row * NUM_HEADS + heads)[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    if FP8:
        q = (q.to(tl.float32) * scale_log2).to(OPERAND)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in tl.range(0, (end - start + TILE - 1) // TILE, num_stages=STAGES):
        tokens = start + i * TILE + tl.arange(0, TILE)
        inside = tokens < end
        block = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offsets = (block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token)[:, None]
        offsets = offsets + head * stride_head + dim[None, :]
        within = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=within, other=0.0)
        if FP8:
            k_scale, v_exponent, v_inverse = load_scales(
                scales, block, head, tokens % BLOCK_SIZE, inside, NUM_KV_HEADS, BLOCK_SIZE
            )
            scores = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision=PRECISION) * k_scale[None, :]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if SOFTCAP > 0:
            scores = softcap_scores(scores, SOFTCAP)
        if FP8:
            scores += v_exponent[None, :]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        v = tl.load(v_ptr + offsets, mask=within, other=0.0)
        if FP8:
            total = total * rescale + tl.sum(weights * v_inverse[None, :], axis=1)
            v = v.to(OPERAND)
        else:
            total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        best = new_best
    place = entry * NUM_HEADS + heads
    tl.store(out_ptr + place[:, None] * HEAD_DIM + dim[None, :], acc / total[:, None], mask=mask)
    tl.store(lse_ptr + place, best + tl.log2(total), mask=live)
