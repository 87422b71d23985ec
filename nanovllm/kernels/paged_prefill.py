"""Prefill attention over the paged KV cache: chunks of prompts whose earlier tokens may be cached, causal within the chunk.

A program takes a tile of one chunk's query tokens with all the query heads of one KV head, so keys are read once a group
(flash attention, Dao 2022). The host knows every length of a prefill step, so it lists the tiles. Reference:
`paged_attention.paged_prefill_torch`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.kernels.fp8_cache import load_scales, scale_words
from nanovllm.kernels.paged_decode import softcap_scores
from nanovllm.kernels.triton_compat import tl, triton

BLOCK_M = 64
BLOCK_N = 64
NUM_STAGES = 3
NUM_WARPS = 4


def prefill_tiles(
    slots: npt.NDArray[np.int64],
    query_lens: npt.NDArray[np.int64],
    context_lens: npt.NDArray[np.int64],
    first_row: int,
    group: int,
    block_m: int = BLOCK_M,
) -> npt.NDArray[np.int32]:
    """The tiles of one step's chunks, those with the longest contexts first, so that no long one starts last.

    Args:
        slots, query_lens, context_lens: [C] of the chunks; context_lens include the chunk.
        first_row: row of the first chunk's first token; group: query heads a KV head; block_m: rows of a tile.

    Returns:
        [tiles, 4]: slot, row of the tile's first token, its tokens, position of its first token.
    """
    tokens = block_m // group
    counts = -(-query_lens // tokens)
    chunk = np.repeat(np.arange(len(slots)), counts)
    index = np.arange(len(chunk)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first_row + np.cumsum(query_lens) - query_lens
    lengths = np.minimum(tokens, query_lens[chunk] - index * tokens)
    positions = (context_lens - query_lens)[chunk] + index * tokens
    tiles = np.stack((slots[chunk], starts[chunk] + index * tokens, lengths, positions), axis=1)
    return tiles[np.argsort(-positions, kind="stable")].astype(np.int32)


def most_prefill_tiles(tokens: int, chunks: int, group: int, block_m: int = BLOCK_M) -> int:
    """Most tiles of `chunks` chunks with `tokens` tokens in all."""
    return tokens // (block_m // group) + chunks


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
    num_stages: int = NUM_STAGES,
    num_warps: int = NUM_WARPS,
    window: int = 0,
    softcap: float = 0.0,
    scales: torch.Tensor | None = None,
) -> None:
    """Attend every token of the chunks in `tiles` to its context.

    Args:
        q: [T, Hq, D]; out: [T, Hq, D], written at the tiles' rows.
        k_cache, v_cache: [N, P, Hkv, D], any strides with the last dimension contiguous; block_tables: [R, W].
        tiles: [tiles, 4] from `prefill_tiles` with the same `block_m`.
        window: tokens a query sees, its own among them, 0: all; softcap: see `paged_attention.softcapped`, 0: none.
        scales: [N, Hkv, P, 2] of a cache in eight bits, see `fp8_cache`.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    assert k_cache.stride() == v_cache.stride() and q.is_contiguous() and out.is_contiguous()
    _prefill_kernel[(len(tiles), num_kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        tiles,
        scale_words(scales),
        scale * 1.4426950408889634,
        block_tables.stride(0),
        *k_cache.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=num_stages,
        WINDOW=window,
        SOFTCAP=softcap * 1.4426950408889634,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=num_warps,
    )


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_tables,
    tiles,
    scales,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    FP8: tl.constexpr = scales is not None
    OPERAND: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    NUM_KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    tile = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(tiles + tile * 4)
    first_row = tl.load(tiles + tile * 4 + 1)
    length = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    table = block_tables + slot.to(tl.int64) * stride_table

    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    token = m // GROUP
    q_position = position + token
    heads = head * GROUP + m % GROUP
    q_mask = (token < length)[:, None] & (dim < HEAD_DIM)[None, :]
    q_offsets = ((first_row + token).to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
    if FP8:
        q = (q.to(tl.float32) * scale_log2).to(OPERAND)

    if WINDOW:  # finite: a query may see no key of the first ones read
        best = tl.full((BLOCK_M,), -1e38, tl.float32)
    else:
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    context_end = position + length
    # Keys before this are seen by every query of the tile; the rest need the causal mask.
    unmasked_end = (position + 1) // BLOCK_N * BLOCK_N
    unmasked_start, masked_start = 0, unmasked_end
    if WINDOW:
        # Only keys from here on are in the window of every query; those before are masked too, from the first query's first key on.
        unmasked_start = (tl.maximum(context_end - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        unmasked_start = tl.minimum(unmasked_start, unmasked_end)
        masked_start -= unmasked_start - tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    for n in tl.range(unmasked_start, unmasked_end, BLOCK_N, num_stages=STAGES):
        tokens = n + tl.arange(0, BLOCK_N)
        if BLOCK_SIZE >= BLOCK_N:
            block = tl.load(table + n // BLOCK_SIZE).to(tl.int64)
            token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
        else:
            block = tl.load(table + tokens // BLOCK_SIZE).to(tl.int64)
            token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
        offsets = token_offsets[:, None] + head * stride_head + dim[None, :]
        if BLOCK_D == HEAD_DIM:
            k = tl.load(k_ptr + offsets)
        else:
            k = tl.load(k_ptr + offsets, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        if FP8:
            k = k.to(OPERAND)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if FP8:
            k_scale, v_exponent, v_inverse = load_scales(
                scales, block, head, tokens % BLOCK_SIZE, None, NUM_KV_HEADS, BLOCK_SIZE
            )
            scores = scores * k_scale[None, :]
            if SOFTCAP > 0:
                scores = softcap_scores(scores, SOFTCAP)
            scores += v_exponent[None, :]
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_best[:, None])
        elif SOFTCAP > 0:
            scores = softcap_scores(scores * scale_log2, SOFTCAP)
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_best[:, None])
        else:
            new_best = tl.maximum(best, tl.max(scores, axis=1) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        if FP8:
            total = total * rescale + tl.sum(weights * v_inverse[None, :], axis=1)
        else:
            total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        if BLOCK_D == HEAD_DIM:
            v = tl.load(v_ptr + offsets)
        else:
            v = tl.load(v_ptr + offsets, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        if FP8:
            v = v.to(OPERAND)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        best = new_best
    for n in tl.range(masked_start, context_end, BLOCK_N, num_stages=1):
        tokens = n + tl.arange(0, BLOCK_N)
        if WINDOW:  # the blocks at the window's start come first, counted as if they ended where the last ones begin
            tokens -= tl.where(n < unmasked_end, unmasked_end - unmasked_start, 0)
        inside = tokens < context_end
        block = tl.load(table + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        token_offsets = block * stride_block + (tokens % BLOCK_SIZE).to(tl.int64) * stride_token
        offsets = token_offsets[:, None] + head * stride_head + dim[None, :]
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
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
        # Key 0 is seen by every query, so no row is masked as a whole; with a window `best` is finite.
        seen = tokens[None, :] <= q_position[:, None]
        if WINDOW:
            seen = seen & (tokens[None, :] > q_position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        if FP8:
            total = total * rescale + tl.sum(weights * v_inverse[None, :], axis=1)
            v = v.to(OPERAND)
        else:
            total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        best = new_best
    acc = acc / total[:, None]
    tl.store(out_ptr + q_offsets, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
