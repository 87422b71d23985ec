"""Sampling on the device: greedy, or temperature by the Gumbel-max trick with random numbers that belong to the sequence.

The noise of a token is a hash of (sequence seed, index of the generated token, vocabulary id). It does not depend on the batch,
the step or a generator's state, so a row's tokens are the same whatever ran beside it.
"""

from __future__ import annotations

import torch


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


def gumbel_noise(seeds: torch.Tensor, steps: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise [S, vocab_size] in float32; row i is a function of `seeds[i]` and `steps[i]` alone."""
    high, low = (seeds >> 32).to(torch.int32), (seeds & 0xFFFFFFFF).to(torch.int32)
    # One is added to the step as to the ids: zero is the hash's fixed point, and would make a small seed its own key.
    key = _mix(low ^ _mix(high ^ _mix(steps.to(torch.int32) + 1)))
    ids = _mix(torch.arange(1, vocab_size + 1, dtype=torch.int32, device=seeds.device))
    bits = _mix(key.unsqueeze(1) ^ ids)
    # 23 random bits, centred in their interval: exact in float32 and never 0 or 1, so both logarithms are finite.
    uniform = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit integer hash "lowbias32" (C. Wellons, hash-prospector); int32 products wrap as unsigned ones do."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
