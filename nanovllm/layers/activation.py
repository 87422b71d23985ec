"""The gated activation of the feed-forward block."""

from __future__ import annotations

import torch

from nanovllm.kernels import activation
from nanovllm.kernels.triton_compat import use_triton


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU's gate: [T, 2 * I] holding gate and up side by side -> silu(gate) * up, [T, I]."""
    return activation.silu_and_mul(x) if use_triton(x) else activation.silu_and_mul_torch(x)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """GeGLU's gate: [T, 2 * I] holding gate and up side by side -> gelu(gate) * up with tanh's approximation, [T, I]."""
    return activation.gelu_and_mul(x) if use_triton(x) else activation.gelu_and_mul_torch(x)
