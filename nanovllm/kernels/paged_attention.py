"""Attention over the paged KV cache in plain torch: the CPU path, and the reference every faster kernel is compared with.

Shapes: T new tokens, Hq query heads, Hkv KV heads, D head dim, N blocks of P tokens. A cache is [N, P, Hkv, D]; a slot is
block * P + offset.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def context_slots(block_tables: torch.Tensor, block_size: int, length: int) -> torch.Tensor:
    """Slots [B, length] of the first `length` tokens of sequences with `block_tables` [B, W]."""
    positions = torch.arange(length, device=block_tables.device)
    return block_tables[:, positions // block_size] * block_size + positions % block_size


def gather_slots(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, Hkv, D] of a cache at slots [B, S]."""
    heads, dim = cache.shape[2:]
    rows = cache.view(-1, heads * dim).index_select(0, slots.flatten())
    return rows.view(*slots.shape, heads, dim)


def paged_decode_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One query token a sequence: `q` [B, Hq, D], `slots` [B, S], `mask` [B, S] true where a slot is in the context -> [B, Hq, D].

    The query heads that share a KV head are packed as the rows of one small matrix, so each key is read once a group.
    """
    batch, q_heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    k = gather_slots(k_cache, slots).transpose(1, 2)
    v = gather_slots(v_cache, slots).transpose(1, 2)
    attn_mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q.view(batch, kv_heads, -1, dim), k, v, attn_mask=attn_mask, scale=scale)
    return out.reshape(batch, q_heads, dim)


def paged_prefill_torch(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, scale: float
) -> torch.Tensor:
    """A chunk of one sequence: `q` [C, Hq, D] are the last C of the S tokens at `slots` [S], causal -> [C, Hq, D]."""
    chunk, context = len(q), len(slots)
    k = gather_slots(k_cache, slots[None]).transpose(1, 2)
    v = gather_slots(v_cache, slots[None]).transpose(1, 2)
    mask = None
    if chunk != context:
        mask = torch.ones(chunk, context, dtype=torch.bool, device=q.device).tril(context - chunk)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)
