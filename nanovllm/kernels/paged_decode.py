"""Decode attention over the paged KV cache: one query token a sequence, keys and values read once, at the memory's speed.

The work of a step is cut into items of equal length (flash decoding, Dao et al. 2023): a kernel of one program plans them on the
device from the live lengths, so no length travels to the host and the same launch serves every step of a CUDA graph. The query
heads that share a KV head are the rows of one small matrix product. Where a sequence has several items, the program that
finishes last joins their partial results, so a layer's attention is one launch. Reference: `paged_attention.paged_decode_torch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Tokens a program reads at a time, and how many such reads are in flight (bench/NOTES.md).
TILE = 32
NUM_STAGES = 6
NUM_WARPS = 2
# Programs a step's tokens are cut for, beyond one a sequence and KV head.
TARGET_PROGRAMS = 2112
# Joining partial results costs more than shorter items gain.
MIN_ITEM_TOKENS = 256
MAX_SPLITS = 64


def decode_items(batch: int, num_kv_heads: int, target_programs: int = TARGET_PROGRAMS) -> int:
    """Items to plan `batch` sequences for: one each, for its last tokens, and as many more as fill the GPU several times."""
    return batch + -(-target_programs // num_kv_heads)


class DecodeBuffers(NamedTuple):
    """What a decode step of up to B sequences and I items writes and reads besides the cache; reused by every layer and step.

    Attributes:
        items: [I, 8] int32: sequence (-1: none), row of the block tables, first token, end, the sequence's first item and how
            many it has; the last two are not used.
        partial_out: [I, Hq, D] float32; partial_lse: [I, Hq] float32, base 2: results of items of split sequences.
        arrived: [B, Hkv] how many items of a sequence are done; 0 between launches.
    """

    items: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrived: torch.Tensor


def make_decode_buffers(
    batch: int, max_items: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeBuffers:
    """Buffers for `batch` sequences and `max_items` items (at least one a sequence)."""
    return DecodeBuffers(
        items=torch.zeros(max_items, 8, dtype=torch.int32, device=device),
        partial_out=torch.empty(max_items, num_heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(max_items, num_heads, dtype=torch.float32, device=device),
        arrived=torch.zeros(batch, num_kv_heads, dtype=torch.int32, device=device),
    )


def plan_decode(
    slots: torch.Tensor, context_lens: torch.Tensor, max_items: int, buffers: DecodeBuffers, tile: int = TILE
) -> None:
    """Cut contexts of `context_lens` [B] tokens into at most `max_items` items of equal length, the shortest that fit.

    No item is shorter than `MIN_ITEM_TOKENS`, the last of a sequence excepted, and no sequence has more than `MAX_SPLITS`. One
    of length 0 (padding of a CUDA graph's batch) gets one empty item, which writes zeros.

    Args:
        slots: [B] the row of the block tables of each sequence.
    """
    batch = len(context_lens)
    _plan_kernel[(1,)](
        slots,
        context_lens,
        buffers.items,
        batch,
        max_items,
        TILE=tile,
        MIN_TILES=max(1, MIN_ITEM_TOKENS // tile),
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_B=max(256, triton.next_power_of_2(batch)),  # few variants to compile
        BLOCK_I=1024,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["batch", "max_items"])
def _plan_kernel(
    slots,
    context_lens,
    items,
    batch,
    max_items,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_B)
    live = rows < batch
    lens = tl.load(context_lens + rows, mask=live, other=0).to(tl.int32)
    slot = tl.load(slots + rows, mask=live, other=0).to(tl.int32)
    tiles = tl.maximum((lens + TILE - 1) // TILE, 1)
    # Bisection for the shortest chunk, in tiles, whose items fit.
    longest = tl.max(tiles, axis=0)
    low = tl.maximum((longest + MAX_SPLITS - 1) // MAX_SPLITS, MIN_TILES)
    high = tl.maximum(longest, low)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(tl.where(live, (tiles + middle - 1) // middle, 0), axis=0) <= max_items
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    count = tl.where(live, (tiles + low - 1) // low, 0)
    first = tl.cumsum(count, axis=0) - count
    for j in range(tl.max(count, axis=0)):
        item = items + (first + j) * 8
        here = j < count
        start = j * low * TILE
        tl.store(item, rows, mask=here)
        tl.store(item + 1, slot, mask=here)
        tl.store(item + 2, tl.zeros_like(first) + start, mask=here)
        tl.store(item + 3, tl.minimum(start + low * TILE, lens), mask=here)
        tl.store(item + 4, first, mask=here)
        tl.store(item + 5, count, mask=here)
    total = tl.sum(count, axis=0)
    for base in range(0, max_items, BLOCK_I):
        rest = base + tl.arange(0, BLOCK_I)
        tl.store(items + rest * 8, tl.full((BLOCK_I,), -1, tl.int32), mask=(rest >= total) & (rest < max_items))


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    max_items: int,
    buffers: DecodeBuffers,
    scale: float,
    out: torch.Tensor,
    *,
    tile: int = TILE,
    num_stages: int = NUM_STAGES,
    num_warps: int = NUM_WARPS,
    other_kernel_between: bool = False,
) -> None:
    """Attend one query token a sequence over its whole context, planned by `plan_decode` with the same arguments.

    Args:
        q: [B, Hq, D]; out: [B, Hq, D], written.
        k_cache, v_cache: [N, P, Hkv, D], any strides with the last dimension contiguous.
        block_tables: [R, W].
        other_kernel_between: another kernel was launched between the plan and this: its end is waited for only after the
            plan has been read.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    block_d, merge_g = triton.next_power_of_2(head_dim), triton.next_power_of_2(group)
    assert k_cache.stride() == v_cache.stride() and q.is_contiguous() and out.is_contiguous()
    pdl = other_kernel_between and use_pdl(q)
    # Heads vary fastest, so programs that run together read neighbouring parts of the same tokens.
    _decode_kernel[(num_kv_heads, max_items)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        *buffers,
        scale * 1.4426950408889634,
        block_tables.stride(0),
        *k_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=block_size,
        TILE=tile,
        MERGE_G=merge_g,
        MERGE_J=max(2, 4096 // (merge_g * block_d)),
        STAGES=num_stages,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=num_warps,
    )


@triton.jit
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_tables,
    items,
    partial_out,
    partial_lse,
    arrived,
    scale_log2,
    stride_table,
    stride_block,
    stride_token,
    stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MERGE_G: tl.constexpr,
    MERGE_J: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    item = tl.program_id(1)
    row = tl.load(items + item * 8)
    slot = tl.load(items + item * 8 + 1)
    start = tl.load(items + item * 8 + 2)
    end = tl.load(items + item * 8 + 3)
    first = tl.load(items + item * 8 + 4)
    count = tl.load(items + item * 8 + 5)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if row < 0:
        return
    table = block_tables + slot.to(tl.int64) * stride_table

    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    heads = head * GROUP + group
    out_mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    out_offsets = heads[:, None] * HEAD_DIM + dim[None, :]
    row_offset = row.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    q = tl.load(q_ptr + row_offset + out_offsets, mask=out_mask, other=0.0)

    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for n in tl.range(start, end, TILE, num_stages=STAGES):
        tokens = n + tl.arange(0, TILE)
        inside = tokens < end
        if BLOCK_SIZE >= TILE:  # a tile lies in one block: both begin at multiples of TILE
            block = tl.load(table + n // BLOCK_SIZE).to(tl.int64)
            token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
        else:
            block = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
        offsets = token_offsets[:, None] + head * stride_head + dim[None, :]
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = new_best

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    if count == 1:
        tl.store(out_ptr + row_offset + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
        return
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    lse = best + tl.log2(total)
    tl.store(partial_out + item.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + out_offsets, acc, mask=out_mask)
    tl.store(partial_lse + item * NUM_HEADS + heads, lse, mask=group < GROUP)
    # All of this program's writes come before its arrival, and the last arrival before the reads of the others' results.
    tl.debug_barrier()
    counter = arrived + row * NUM_KV_HEADS + head
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == count - 1:
        tl.debug_barrier()
        # Every partial result of these heads, [MERGE_J, MERGE_G, D] at a time, so that few loads follow one another.
        part_index = tl.arange(0, MERGE_J)
        part_head = head * GROUP + tl.arange(0, MERGE_G)
        head_mask = tl.arange(0, MERGE_G) < GROUP
        best_of = tl.full((MERGE_G,), float("-inf"), tl.float32)
        total_of = tl.zeros((MERGE_G,), tl.float32)
        merged = tl.zeros((MERGE_G, BLOCK_D), tl.float32)
        for base in range(0, count, MERGE_J):
            mask = (base + part_index < count)[:, None] & head_mask[None, :]
            index = (first + base + part_index).to(tl.int64)
            at = index[:, None] * NUM_HEADS + part_head[None, :]
            # .cg: the other programs' writes are in the L2 cache, this one's L1 may hold older lines.
            lses = tl.load(partial_lse + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
            parts = tl.load(
                partial_out + at[:, :, None] * HEAD_DIM + dim[None, None, :],
                mask=mask[:, :, None] & (dim < HEAD_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_best_of = tl.maximum(best_of, tl.max(lses, axis=0))
            weights_of = tl.exp2(lses - new_best_of[None, :])
            rescale_of = tl.exp2(best_of - new_best_of)
            merged = merged * rescale_of[:, None] + tl.sum(parts * weights_of[:, :, None], axis=0)
            total_of = total_of * rescale_of + tl.sum(weights_of, axis=0)
            best_of = new_best_of
        merged = merged / total_of[:, None]
        tl.store(
            out_ptr + row_offset + part_head[:, None] * HEAD_DIM + dim[None, :],
            merged.to(out_ptr.dtype.element_ty),
            mask=head_mask[:, None] & (dim < HEAD_DIM)[None, :],
        )
        tl.store(counter, 0)
