"""The gated activation of the feed-forward block."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU's gate: [T, 2 * I] holding gate and up side by side -> silu(gate) * up, [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
