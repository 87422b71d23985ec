"""Decode attention over the paged KV cache: one query token a sequence, keys and values read once, at the memory's speed.

The contexts of a step, laid end to end, are cut into equal parts, one a program (flash decoding, Dao et al. 2023, and the equal
split of Stream-K, Osama et al. 2023): a kernel of one program plans them on the device from the live lengths, so no length
travels to the host and the same launch serves every step of a CUDA graph. The query heads that share a KV head are the rows of
one small matrix product. Where a sequence lies in several parts, the program that finishes last joins their partial results, so
a layer's attention is one launch. Reference: `paged_attention.paged_decode_torch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from nanovllm.kernels.fp8_cache import FP8, load_scales, scale_words, split_rows, unpack_pairs
from nanovllm.kernels.triton_compat import HAS_NARROW_PRODUCTS, multiprocessors, tl, triton, use_pdl

if TYPE_CHECKING:
    from nanovllm.kernels.shared_prefix import SharedBuffers

# Joining partial results costs more than shorter parts gain.
MIN_PART_TOKENS = 256
# Values of partial results that a program joins at a time: half of it doubles what a single long sequence waits for its join.
MERGE_VALUES = 8192
# And of those over shared prefixes, which wait in registers while its own tokens are read.
SHARED_VALUES = 2048
# Query heads of scores in eight bits: their high and low parts fill the 16 rows of the smallest product.
NARROW_HEADS = 8
# What a program loses between two sequences, in tiles.
ITEM_TILES = 2


class DecodeLaunch(NamedTuple):
    """How the kernel is launched (bench/NOTES.md).

    Attributes:
        programs_per_sm: programs a multiprocessor.
        num_stages: how deep the pipeline is that reads the tiles; num_warps: of a program.
        tile_bytes: most bytes of keys that a program reads at a time, within tile_tokens: the least and the most tokens.
        max_registers: of a thread, so that as many programs find room; None: as many as it takes, which is room for two.
        narrow_scores: with a cache in eight bits, up to 8 query heads a KV head and Triton 3.5: scores are products of eight bits,
            so that keys are not widened. For four warps and tiles of 64 tokens or more: a smaller product widens both on Hopper.
    """

    programs_per_sm: int = 2
    num_stages: int = 6
    num_warps: int = 4
    tile_bytes: int = 1 << 14
    tile_tokens: tuple[int, int] = (16, 64)
    max_registers: int | None = None
    narrow_scores: bool = False


LAUNCH = DecodeLaunch()
# Widening takes as long as reading: more programs work at a time, each on less (bench/NOTES.md).
FP8_LAUNCH = DecodeLaunch(programs_per_sm=4, num_stages=8, num_warps=2, tile_bytes=1 << 12)
NARROW_LAUNCH = DecodeLaunch(
    programs_per_sm=3, num_stages=5, tile_tokens=(64, 64), max_registers=168, narrow_scores=True
)
# Found with two query heads a KV head, and this with four.
GROUPED_NARROW_LAUNCH = NARROW_LAUNCH._replace(num_stages=6)


def decode_launch(dtype: torch.dtype, query_dtype: torch.dtype, group: int) -> DecodeLaunch:
    """The launch for a cache of `dtype` and queries of `query_dtype`, `group` of which share a KV head."""
    if dtype != FP8:
        return LAUNCH
    # Two parts in eight bits are all of a bfloat16.
    narrow = query_dtype == torch.bfloat16 and group <= NARROW_HEADS and HAS_NARROW_PRODUCTS
    if not narrow:
        return FP8_LAUNCH
    return GROUPED_NARROW_LAUNCH if group >= 4 else NARROW_LAUNCH


def decode_tile(head_dim: int, dtype: torch.dtype, launch: DecodeLaunch = LAUNCH) -> int:
    """Tokens a program reads at a time of a cache of `dtype`, a power of two."""
    least, most = launch.tile_tokens
    return int(max(least, min(most, launch.tile_bytes // (triton.next_power_of_2(head_dim) * dtype.itemsize))))


def decode_programs(num_kv_heads: int, device: torch.device, per_sm: int) -> int:
    """Programs a KV head, all of which run at the same time."""
    return max(1, multiprocessors(device) * per_sm // num_kv_heads)


class DecodeBuffers(NamedTuple):
    """What a decode step of up to B sequences and I items writes and reads besides the cache; reused by every layer and step.

    Attributes:
        starts: [P + 1] int32: the items of each program; the heads' programs are alike.
        items: [I, 8] int32: sequence, row of the block tables, first token, end, the sequence's first item and how many it has;
            with a window the first token that is seen; where prefixes are shared, the first partial result over the sequence's, and how
            many its first item joins.
        partial_out: [I, Hq, D] float32; partial_lse: [I, Hq] float32, base 2: results of items of split sequences.
        arrived: [B, Hkv] how many items of a sequence are done; 0 between launches.
    """

    starts: torch.Tensor
    items: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrived: torch.Tensor


def make_decode_buffers(
    batch: int, programs: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeBuffers:
    """Buffers for up to `batch` sequences and `programs` programs a KV head."""
    items = batch + programs
    return DecodeBuffers(
        starts=torch.zeros(programs + 1, dtype=torch.int32, device=device),
        items=torch.zeros(items, 8, dtype=torch.int32, device=device),
        partial_out=torch.empty(items, num_heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(items, num_heads, dtype=torch.float32, device=device),
        arrived=torch.zeros(batch, num_kv_heads, dtype=torch.int32, device=device),
    )


def split_buffers(buffers: DecodeBuffers) -> DecodeBuffers:
    """Buffers for another split of the same sequences, whose launches take turns with those of `buffers`."""
    return buffers._replace(starts=torch.zeros_like(buffers.starts), items=torch.zeros_like(buffers.items))


def plan_decode(
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    programs: int,
    buffers: DecodeBuffers,
    tile: int,
    item_tiles: int = ITEM_TILES,
    window: int = 0,
    shared: SharedBuffers | None = None,
) -> None:
    """Cut the contexts of `context_lens` [B] tokens, laid end to end, into `programs` equal parts.

    An item is what a part has of one sequence. No part is shorter than `MIN_PART_TOKENS`, so there may be fewer. A sequence of
    length 0 (padding of a CUDA graph's batch) gets one empty item, which writes zeros.

    Args:
        slots: [B] the row of the block tables of each sequence.
        tile: tokens read at a time, the unit of the cut; item_tiles: what a sequence costs beside its tiles.
        window: last tokens of a context that are seen, so that tiles before them are left out; 0: all.
        shared: leading tokens that are left out too, as `attend_shared` attends to them; its `rows` are written. Not with a window.
    """
    batch = len(context_lens)
    _plan_kernel[(1,)](
        slots,
        context_lens,
        buffers.starts,
        buffers.items,
        *((slots,) * 4 if shared is None else (shared.skipped, shared.entries, shared.counts, shared.rows)),
        batch,
        programs,
        TILE=tile,
        MIN_TILES=max(1, MIN_PART_TOKENS // tile),
        ITEM_TILES=item_tiles,
        WINDOW=window,
        SHARED=shared is not None,
        BLOCK_B=max(256, triton.next_power_of_2(batch)),  # few variants to compile
        BLOCK_P=256,
        num_warps=4,
    )


@triton.jit(
    do_not_specialize=["batch", "programs"],
    do_not_specialize_on_alignment=["slots", "skipped", "entries", "entry_counts", "row_of"],
)
def _plan_kernel(
    slots,
    context_lens,
    starts,
    items,
    skipped,
    entries,
    entry_counts,
    row_of,
    batch,
    programs,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    ITEM_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_B)
    live = rows < batch
    lens = tl.load(context_lens + rows, mask=live, other=0).to(tl.int32)
    slot = tl.load(slots + rows, mask=live, other=0).to(tl.int32)
    if SHARED:
        skip = tl.load(skipped + slot, mask=live, other=0)
        entry = tl.load(entries + slot, mask=live, other=0)
        entry_count = tl.load(entry_counts + slot, mask=live, other=0)
        tl.store(row_of + slot, rows, mask=live)
        tiles = (lens - skip + TILE - 1) // TILE
    else:
        tiles = (lens + TILE - 1) // TILE
    if WINDOW:
        seen = tl.maximum(lens - WINDOW, 0)
        tiles -= seen // TILE
    tiles = tl.where(live, tl.maximum(tiles, 1), 0)
    # Each sequence costs `ITEM_TILES` more than its tiles: they stand before them. What lies before it, and in which part it begins.
    cost = tl.where(live, tiles + ITEM_TILES, 0)
    before = tl.cumsum(cost, axis=0) - cost
    part_tiles = tl.maximum((tl.sum(cost, axis=0) + programs - 1) // programs, MIN_TILES)
    part = before // part_tiles
    count = tl.where(live, (before + cost - 1) // part_tiles - part + 1, 0)
    first = tl.cumsum(count, axis=0) - count
    total = tl.sum(count, axis=0)
    for base in range(0, programs + 1, BLOCK_P):
        index = base + tl.arange(0, BLOCK_P)
        tl.store(starts + index, tl.zeros((BLOCK_P,), tl.int32) + total, mask=index <= programs)
    tl.debug_barrier()
    for j in range(tl.max(count, axis=0)):
        here = j < count
        begin = tl.maximum(before, (part + j) * part_tiles)
        end = tl.minimum(before + cost, (part + j + 1) * part_tiles)
        tl.store(starts + part + j, first + j, mask=here & (begin == (part + j) * part_tiles))
        begin = tl.maximum(begin - before - ITEM_TILES, 0) * TILE
        end = tl.maximum(end - before - ITEM_TILES, 0) * TILE
        if WINDOW:
            begin += seen // TILE * TILE
            end += seen // TILE * TILE
        if SHARED:
            begin += skip
            end += skip
        item = items + (first + j) * 8
        tl.store(item, rows, mask=here)
        tl.store(item + 1, slot, mask=here)
        tl.store(item + 2, begin, mask=here)
        tl.store(item + 3, tl.minimum(end, lens), mask=here)
        tl.store(item + 4, first, mask=here)
        tl.store(item + 5, count, mask=here)
        if WINDOW:
            tl.store(item + 6, seen, mask=here)
        if SHARED:
            tl.store(item + 6, entry, mask=here)
            tl.store(item + 7, tl.where(j == 0, entry_count, 0), mask=here)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    programs: int,
    buffers: DecodeBuffers,
    scale: float,
    out: torch.Tensor,
    *,
    tile: int,
    launch: DecodeLaunch = LAUNCH,
    other_kernel_between: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    shared: SharedBuffers | None = None,
    scales: torch.Tensor | None = None,
) -> None:
    """Attend one query token a sequence over its whole context, planned by `plan_decode` with the same arguments.

    Args:
        q: [B, Hq, D]; out: [B, Hq, D], written.
        k_cache, v_cache: [N, P, Hkv, D], any strides with the last dimension contiguous.
        block_tables: [R, W].
        tile: as planned; launch: `decode_launch` of the types and heads.
        other_kernel_between: another kernel was launched between the plan and this: its end is waited for only after the
            plan has been read.
        window: as planned; softcap: see `paged_attention.softcapped`, 0: none.
        shared: as planned; `attend_shared` has attended to those tokens.
        scales: [N, Hkv, P, 2] of a cache in eight bits, see `fp8_cache`.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    # Words of two values are the inner dimension of a product, whose least is 16.
    block_d = max(16 if scales is None else 32, triton.next_power_of_2(head_dim))
    merge_g = triton.next_power_of_2(group)
    assert k_cache.stride() == v_cache.stride() and q.is_contiguous() and out.is_contiguous()
    pdl = other_kernel_between and use_pdl(q)
    narrow_scores = launch.narrow_scores and scales is not None and group <= NARROW_HEADS and HAS_NARROW_PRODUCTS
    if scales is not None:
        k_cache, v_cache = k_cache if narrow_scores else k_cache.view(torch.int16), v_cache.view(torch.int16)
    # Heads vary fastest, so programs that run together read neighbouring parts of the same tokens.
    _decode_kernel[(num_kv_heads, programs)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        *buffers,
        *((q, q) if shared is None else (shared.out, shared.lse)),
        scale_words(scales),
        scale * 1.4426950408889634,
        block_tables.stride(0),
        *v_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_G=NARROW_HEADS if narrow_scores else max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=block_size,
        TILE=tile,
        MERGE_G=merge_g,
        MERGE_J=max(2, MERGE_VALUES // (merge_g * block_d)),
        SHARED_J=max(1, SHARED_VALUES // (merge_g * block_d)),
        STAGES=launch.num_stages,
        WINDOWED=window > 0,
        SHARED=shared is not None,
        SOFTCAP=softcap * 1.4426950408889634,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        NARROW_SCORES=narrow_scores,
        ASM=q.is_cuda,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=launch.num_warps,
        maxnreg=launch.max_registers,
    )


@triton.jit
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_tables,
    starts,
    items,
    partial_out,
    partial_lse,
    arrived,
    shared_out,
    shared_lse,
    scales,
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
    SHARED_J: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROW_SCORES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    # Eight-bit values come in words of two neighbours: those of even and of odd dimensions have a product each. Not so keys whose
    # scores are products of eight bits, with queries split in two parts. Those products want 64 rows, so their rows are tokens,
    # and those with the values are turned like them.
    FP8: tl.constexpr = scales is not None
    PACK: tl.constexpr = 2 if FP8 else 1
    OPERAND: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    TOKENS: tl.constexpr = 0 if NARROW_SCORES else 1  # the axis of scores that is tokens; the other is heads
    head = tl.program_id(0)
    program = tl.program_id(1)
    first_item = tl.load(starts + program)
    last_item = tl.load(starts + program + 1)
    group = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    word = tl.arange(0, BLOCK_D // PACK)
    heads = head * GROUP + group
    out_mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    out_offsets = heads[:, None] * HEAD_DIM + dim[None, :]
    if NARROW_SCORES:  # the two parts of a head follow one another: a thread has the scores of both
        part = tl.arange(0, 2 * BLOCK_G)
        q_mask = (part // 2 < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        q_offsets = (head * GROUP + part // 2)[:, None] * HEAD_DIM + dim[None, :]
    else:
        q_mask = (group < GROUP)[:, None] & (word < HEAD_DIM // PACK)[None, :]
        q_offsets = heads[:, None] * HEAD_DIM + word[None, :] * PACK
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    ROW: tl.constexpr = NUM_HEADS * HEAD_DIM
    # Partial results are joined without the rows that fill up `group`.
    part_head = tl.arange(0, MERGE_G)
    part_mask = (part_head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    part_offsets = (head * GROUP + part_head)[:, None] * HEAD_DIM + dim[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    if first_item == last_item:
        return
    row, slot, start, end, first, count = _load_item(items, first_item)
    q = tl.load(q_ptr + row.to(tl.int64) * ROW + q_offsets, mask=q_mask, other=0.0)
    if NARROW_SCORES:
        q, q_scale = split_rows(q, (part % 2 == 0)[:, None])
        q = tl.trans(q)
    elif FP8:
        q = (q.to(tl.float32) * scale_log2).to(OPERAND)
        q_odd = tl.load(q_ptr + row.to(tl.int64) * ROW + q_offsets + 1, mask=q_mask, other=0.0)
        q_odd = (q_odd.to(tl.float32) * scale_log2).to(OPERAND)
    for item in range(first_item, last_item):
        # The next item is on its way while this one is computed.
        next_item = tl.minimum(item + 1, last_item - 1)
        next_row, next_slot, next_start, next_end, next_first, next_count = _load_item(items, next_item)
        table = block_tables + slot.to(tl.int64) * stride_table
        best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        # Added up over the tokens of a tile at the end: a sum over warps in every tile would stop them all.
        if NARROW_SCORES:
            totals = tl.zeros((TILE, BLOCK_G), tl.float32)
            acc = tl.zeros((BLOCK_D // 2, BLOCK_G), tl.float32)
        else:
            totals = tl.zeros((BLOCK_G, TILE), tl.float32)
            acc = tl.zeros((BLOCK_G, BLOCK_D // PACK), tl.float32)
        if FP8:
            acc_odd = tl.zeros_like(acc)
        if WINDOWED:
            seen = tl.load(items + item * 8 + 6)
        if SHARED:  # on their way while the sequence's own tokens are read
            entry, entry_count = tl.load(items + item * 8 + 6), tl.load(items + item * 8 + 7)
            shared_lses, shared_parts = _load_results(
                shared_out, shared_lse, entry, entry_count, head, GROUP, HEAD_DIM, BLOCK_D, NUM_HEADS, MERGE_G, SHARED_J
            )
        # Counted from 0: Triton 3.6 takes a carried value that is only a loop's lower bound for dead.
        for i in tl.range(0, (end - start + TILE - 1) // TILE, num_stages=STAGES):
            n = start + i * TILE
            tokens = n + tl.arange(0, TILE)
            inside = tokens < end
            if WINDOWED:  # every tile holds at least one token that is seen
                inside = inside & (tokens >= seen)
            if BLOCK_SIZE >= TILE:  # a tile lies in one block: both begin at multiples of TILE
                block = tl.load(table + n // BLOCK_SIZE).to(tl.int64)
                token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
            else:
                block = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
                token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
            if NARROW_SCORES:
                row_offsets = token_offsets + head * stride_head
                k_mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
                k = tl.load(k_ptr + (row_offsets * PACK)[:, None] + dim[None, :], mask=k_mask, other=0.0)
                # Of the values: the pipeline takes them turned as they are loaded, not a load that is turned.
                offsets = row_offsets[None, :] + word[:, None]
                mask = inside[None, :] & (word < HEAD_DIM // PACK)[:, None]
            else:
                offsets = token_offsets[:, None] + head * stride_head + word[None, :]
                mask = inside[:, None] & (word < HEAD_DIM // PACK)[None, :]
                k = tl.load(k_ptr + offsets, mask=mask, other=0)
            if FP8:
                k_scale, v_exponent, v_inverse = load_scales(
                    scales, block, head, tokens % BLOCK_SIZE, inside, NUM_KV_HEADS, BLOCK_SIZE
                )
                if NARROW_SCORES:
                    high, low = tl.split(tl.reshape(tl.dot(k, q), (TILE, BLOCK_G, 2)))
                    scores = (high + low) * (q_scale * scale_log2)[None, :]
                else:
                    k, k_odd = unpack_pairs(k, ASM)
                    scores = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision=PRECISION)
                    scores = tl.dot(q_odd, tl.trans(k_odd.to(OPERAND)), scores, input_precision=PRECISION)
                scores = scores * tl.expand_dims(k_scale, 1 - TOKENS)
            else:
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
            if SOFTCAP > 0:
                scores = softcap_scores(scores, SOFTCAP)
            if FP8:
                scores += tl.expand_dims(v_exponent, 1 - TOKENS)
            scores = tl.where(tl.expand_dims(inside, 1 - TOKENS), scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=TOKENS))
            weights = tl.exp2(scores - tl.expand_dims(new_best, TOKENS))
            rescale = tl.exp2(best - new_best)
            v = tl.load(v_ptr + offsets, mask=mask, other=0)
            if FP8:
                totals = totals * tl.expand_dims(rescale, TOKENS) + weights * tl.expand_dims(v_inverse, 1 - TOKENS)
                v, v_odd = unpack_pairs(v, ASM)
                weights = weights.to(OPERAND)
                if NARROW_SCORES:
                    acc = acc * rescale[None, :] + tl.dot(v.to(OPERAND), weights, input_precision=PRECISION)
                    acc_odd = acc_odd * rescale[None, :] + tl.dot(v_odd.to(OPERAND), weights, input_precision=PRECISION)
                else:
                    acc = acc * rescale[:, None] + tl.dot(weights, v.to(OPERAND), input_precision=PRECISION)
                    acc_odd = acc_odd * rescale[:, None] + tl.dot(weights, v_odd.to(OPERAND), input_precision=PRECISION)
            else:
                totals = totals * rescale[:, None] + weights
                acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = new_best

        total = tl.sum(totals, axis=TOKENS)
        q = tl.load(q_ptr + next_row.to(tl.int64) * ROW + q_offsets, mask=q_mask, other=0.0)
        if NARROW_SCORES:
            q, q_scale = split_rows(q, (part % 2 == 0)[:, None])
            q = tl.trans(q)
        elif FP8:
            q = (q.to(tl.float32) * scale_log2).to(OPERAND)
            q_odd = tl.load(q_ptr + next_row.to(tl.int64) * ROW + q_offsets + 1, mask=q_mask, other=0.0)
            q_odd = (q_odd.to(tl.float32) * scale_log2).to(OPERAND)
        if FP8:
            if NARROW_SCORES:
                acc, acc_odd = tl.trans(acc), tl.trans(acc_odd)
            acc = tl.reshape(tl.join(acc, acc_odd), (BLOCK_G, BLOCK_D))
        if SHARED:
            shared_best, shared_total, shared_acc = _join_results(
                tl.full((MERGE_G,), -1e38, tl.float32),
                tl.zeros((MERGE_G,), tl.float32),
                tl.zeros((MERGE_G, BLOCK_D), tl.float32),
                shared_lses,
                shared_parts,
            )
            for base in range(SHARED_J, entry_count, SHARED_J):
                shared_lses, shared_parts = _load_results(
                    shared_out,
                    shared_lse,
                    entry + base,
                    entry_count - base,
                    head,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_D,
                    NUM_HEADS,
                    MERGE_G,
                    SHARED_J,
                )
                shared_best, shared_total, shared_acc = _join_results(
                    shared_best, shared_total, shared_acc, shared_lses, shared_parts
                )
            shared_best = _repeat_rows(shared_best[:, None], BLOCK_G // MERGE_G).reshape(BLOCK_G)
            shared_total = _repeat_rows(shared_total[:, None], BLOCK_G // MERGE_G).reshape(BLOCK_G)
            new_best = tl.maximum(best, shared_best)
            rescale, weight = tl.exp2(best - new_best), tl.exp2(shared_best - new_best)
            total = total * rescale + shared_total * weight
            acc = acc * rescale[:, None] + _repeat_rows(shared_acc, BLOCK_G // MERGE_G) * weight[:, None]
            best = new_best
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        row_offset = row.to(tl.int64) * ROW
        if count == 1:
            tl.store(out_ptr + row_offset + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
        else:
            lse = best + tl.log2(total)
            tl.store(partial_out + tl.cast(item, tl.int64) * ROW + out_offsets, acc, mask=out_mask)
            tl.store(partial_lse + item * NUM_HEADS + heads, lse, mask=group < GROUP)
            # All of this program's writes come before its arrival, and the last arrival before the reads of the others' results.
            tl.debug_barrier()
            counter = arrived + row * NUM_KV_HEADS + head
            before = tl.atomic_add(counter, 1, sem="acq_rel")
            if before == count - 1:
                tl.debug_barrier()
                # Every partial result of these heads, `MERGE_J` at a time, so that few loads follow one another.
                # Finite: items without tokens have -inf, and may come first or, of padding, be all there are.
                best_of = tl.full((MERGE_G,), -1e38, tl.float32)
                total_of = tl.zeros((MERGE_G,), tl.float32)
                joined = tl.zeros((MERGE_G, BLOCK_D), tl.float32)
                for base in range(0, count, MERGE_J):
                    lses, parts = _load_results(
                        partial_out,
                        partial_lse,
                        first + base,
                        count - base,
                        head,
                        GROUP,
                        HEAD_DIM,
                        BLOCK_D,
                        NUM_HEADS,
                        MERGE_G,
                        MERGE_J,
                    )
                    best_of, total_of, joined = _join_results(best_of, total_of, joined, lses, parts)
                joined = joined / tl.where(total_of == 0, 1.0, total_of)[:, None]
                tl.store(out_ptr + row_offset + part_offsets, joined.to(out_ptr.dtype.element_ty), mask=part_mask)
                tl.store(counter, 0)
        row, slot, start, end, first, count = next_row, next_slot, next_start, next_end, next_first, next_count


@triton.jit
def _load_item(items, item):
    at = items + item * 8
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def _load_results(
    out_ptr,
    lse_ptr,
    first,
    count,
    head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    MERGE_G: tl.constexpr,
    J: tl.constexpr,
):
    """The first J of the `count` partial results from `first` on, of one KV head: lse [J, MERGE_G] and out [J, MERGE_G, BLOCK_D]."""
    number, part_head, dim = tl.arange(0, J), tl.arange(0, MERGE_G), tl.arange(0, BLOCK_D)
    mask = (number < count)[:, None] & (part_head < GROUP)[None, :]
    at = (first + number).to(tl.int64)[:, None] * NUM_HEADS + (head * GROUP + part_head)[None, :]
    # .cg: other programs' writes are in the L2 cache, this one's L1 may hold older lines.
    lses = tl.load(lse_ptr + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    parts = tl.load(
        out_ptr + at[:, :, None] * HEAD_DIM + dim[None, None, :],
        mask=mask[:, :, None] & (dim < HEAD_DIM)[None, None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    return lses, parts


@triton.jit
def _join_results(best, total, joined, lses, parts):
    """`best` [G], `total` [G] and `joined` [G, D] of more results: lses [J, G], parts [J, G, D]."""
    new_best = tl.maximum(best, tl.max(lses, axis=0))
    weights = tl.exp2(lses - new_best[None, :])
    rescale = tl.exp2(best - new_best)
    joined = joined * rescale[:, None] + tl.sum(parts * weights[:, :, None], axis=0)
    return new_best, total * rescale + tl.sum(weights, axis=0), joined


@triton.jit
def _repeat_rows(x, times: tl.constexpr):
    """`x` [G, D] so many times, one under the other."""
    wide = tl.broadcast_to(x[None, :, :], (times, x.shape[0], x.shape[1]))
    return tl.reshape(wide, (times * x.shape[0], x.shape[1]))


@triton.jit
def softcap_scores(scores, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(scores / SOFTCAP), where both are in units of log2(e): 2.885 is 2 * log2(e)."""
    return SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.8853900817779268 / SOFTCAP))))
