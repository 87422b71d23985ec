"""Sampling over a vocabulary that is sharded over ranks: each takes the best of its own ids, an integer maximum joins them."""

from __future__ import annotations

import torch

from nanovllm.kernels.sampling import RowMasks, sample_keys, sample_keys_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.embed_head import ParallelLMHead


def sample(
    head: ParallelLMHead,
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    out: torch.Tensor,
    masks: RowMasks | None = None,
) -> torch.Tensor:
    """Draw one token a row of `logits` [S, V], which `head` made; the same on every rank.

    Args:
        rows, temperatures, seeds, steps, masks: as in `kernels.sampling.sample_keys_torch`.
        out: [S] int64 holding `LEAST_KEY`, written.

    Returns:
        `out`: keys that `keys_to_tokens` reads.
    """
    kernel = sample_keys if use_triton(logits) else sample_keys_torch
    keys = kernel(logits, rows, temperatures, seeds, steps, head.start, head.vocab_size, out, masks)
    return head.tp.all_reduce_max(keys)
