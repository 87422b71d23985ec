"""Sampling on the device: greedy, or temperature by the Gumbel-max trick with random numbers that belong to the sequence.

The noise of a token is a hash of (sequence seed, index of the generated token, vocabulary id). It does not depend on the batch,
the step or a generator's state, so a row's tokens are the same whatever ran beside it.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.sampling import gumbel_noise


def sample(logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Draw one token a row.

    Args:
        logits: [S, V].
        temperatures: [S] float32, 0 for greedy rows.
        seeds: [S] int64, below 2**63; steps: [S] int64, how many tokens the sequence has generated before.

    Returns:
        [S] int64 token ids: argmax(logits / temperature + Gumbel noise), distributed as softmax(logits / temperature).
    """
    greedy = (temperatures == 0).unsqueeze(1)
    # So low that it is greedy already; a lower one would overflow to several infinities.
    scaled = logits.float() / torch.where(greedy, 1.0, temperatures.clamp(min=1e-20).unsqueeze(1))
    noise = gumbel_noise(seeds, steps, logits.shape[1])
    return torch.where(greedy, scaled, scaled + noise).argmax(dim=-1)
