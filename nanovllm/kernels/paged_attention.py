"""Attention over the paged KV cache in plain torch: the CPU path, and the reference every faster kernel is compared with.

Shapes: T new tokens, Hq query heads, Hkv KV heads, D head dim, N blocks of P tokens. A cache is [N, P, Hkv, D]; a slot is
block * P + offset.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanovllm.kernels.fp8_cache import gather_scales


def context_slots(block_tables: torch.Tensor, block_size: int, length: int, start: int = 0) -> torch.Tensor:
    """Slots [B, length - start] of tokens `start` to `length` of sequences with `block_tables` [B, W]."""
    positions = torch.arange(start, length, device=block_tables.device)
    return block_tables[:, positions // block_size] * block_size + positions % block_size


def gather_slots(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, Hkv, D] of a cache at slots [B, S]."""
    heads, dim = cache.shape[2:]
    rows = cache.view(-1, heads * dim).index_select(0, slots.flatten())
    return rows.view(*slots.shape, heads, dim)


def gather_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, S, Hkv, D] at slots [B, S] in `dtype`; `scales`: of a cache in eight bits, see `fp8_cache`."""
    if scales is None:
        return gather_slots(k_cache, slots).to(dtype), gather_slots(v_cache, slots).to(dtype)
    k_scales, v_scales = gather_scales(scales, slots).to(dtype).unbind(-1)
    # torch moves eight-bit floats as bytes, or not at all.
    k, v = (gather_slots(cache.view(torch.uint8), slots).view(cache.dtype).to(dtype) for cache in (k_cache, v_cache))
    return k * k_scales[..., None], v * v_scales[..., None]


def paged_decode_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query token a sequence: `q` [B, Hq, D], `slots` [B, S], `mask` [B, S] true where a slot is in the context -> [B, Hq, D].

    `softcap`: see `softcapped`; 0: none. `scales`: see `gather_kv`. The query heads that share a KV head are packed as the rows of one small matrix, so each key is read once a group.
    """
    batch, q_heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    k, v = (rows.transpose(1, 2) for rows in gather_kv(k_cache, v_cache, scales, slots, q.dtype))
    attn_mask = None if mask is None else mask[:, None, None, :]
    q = q.view(batch, kv_heads, -1, dim)
    if softcap:
        out = _softcapped_attention(q, k, v, attn_mask, scale, softcap)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
    return out.reshape(batch, q_heads, dim)


def paged_prefill_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """A chunk of one sequence: `q` [C, Hq, D] are the last C of the S tokens at `slots` [S], causal -> [C, Hq, D].

    Args:
        window: tokens a query sees, its own among them; 0: all. softcap: see `softcapped`; 0: none. scales: see `gather_kv`.
    """
    chunk, context = len(q), len(slots)
    k, v = (rows.transpose(1, 2) for rows in gather_kv(k_cache, v_cache, scales, slots[None], q.dtype))
    mask = None
    if chunk != context or window or softcap:
        mask = torch.ones(chunk, context, dtype=torch.bool, device=q.device).tril(context - chunk)
        if window:
            mask = mask.triu(context - chunk - window + 1)
    q = q.transpose(0, 1)[None]
    if softcap:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = _softcapped_attention(q, k, v, mask, scale, softcap)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    return out[0].transpose(0, 1)


def softcapped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Scores kept between -softcap and softcap (Gemma 2): softcap * tanh(x / softcap)."""
    return torch.tanh(scores / softcap) * softcap


def _softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """`scaled_dot_product_attention` with a softcap, in float32."""
    scores = softcapped(q.float() @ k.float().transpose(-1, -2) * scale, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
