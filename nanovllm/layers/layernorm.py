"""RMSNorm, alone or joined with the residual addition before it."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels.layernorm import add_rms_norm, add_rms_norm_torch
from nanovllm.kernels.triton_compat import use_triton


class RMSNorm(nn.Module):
    """Root-mean-square layer norm over the last dimension, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size] in the type of `x`."""
        return self.add_norm(x, None)[0]

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `residual` (where there is one) to `x`; return the sum's norm and the sum, both shaped as `x`."""
        kernel = add_rms_norm if use_triton(x) else add_rms_norm_torch
        return kernel(x, residual, self.weight, self.eps)
