"""Lookup in one rank's rows of the embedding, zeros for the other ranks' tokens. Called by `layers.embed_head`."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanovllm.kernels.triton_compat import tl, triton


def embedding_shard_torch(token_ids: torch.Tensor, weight: torch.Tensor, start: int) -> torch.Tensor:
    """Rows [T, H] of `weight` [rows, H], which begins at vocabulary id `start`; zeros for ids [T] it does not hold."""
    local = token_ids - start
    mine = (local >= 0) & (local < len(weight))
    return F.embedding(local.clamp(0, len(weight) - 1), weight) * mine.unsqueeze(-1)


def embedding_shard(token_ids: torch.Tensor, weight: torch.Tensor, start: int) -> torch.Tensor:
    """See `embedding_shard_torch`."""
    tokens, (rows, size) = len(token_ids), weight.shape
    assert token_ids.is_contiguous() and weight.is_contiguous()
    out = torch.empty(tokens, size, dtype=weight.dtype, device=weight.device)
    grid = (tokens, triton.cdiv(size, 1024))
    _embedding_shard_kernel[grid](token_ids, weight, out, start, rows, size, BLOCK=1024, num_warps=4)
    return out


@triton.jit
def _embedding_shard_kernel(ids_ptr, weight_ptr, out_ptr, start, rows, size, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    local = tl.load(ids_ptr + token).to(tl.int64) - start
    mine = (local >= 0) & (local < rows)
    hidden = tl.load(weight_ptr + local * size + column, mask=inside & mine, other=0.0)
    tl.store(out_ptr + token * size + column, hidden, mask=inside)
