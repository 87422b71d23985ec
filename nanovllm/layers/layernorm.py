"""RMSNorm, alone or joined with what comes before it in a layer: the ranks' sum and the residual addition."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels.layernorm import add_rms_norm, add_rms_norm_rounded, add_rms_norm_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.quantized import DTYPES, RoundedRows, UnscaledSums
from nanovllm.models.quantization import WeightFormat


class RMSNorm(nn.Module):
    """Root-mean-square layer norm over the last dimension, computed in float32 (Zhang and Sennrich 2019).

    Args:
        size: of the last dimension; tp: the ranks whose partial sums `add_norm` is given.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.tp = tp or TensorParallel()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size] in the type of `x`."""
        return self.add_norm(x, None)[0]

    def add_norm_rounded(
        self, x: torch.Tensor | UnscaledSums, residual: torch.Tensor | None, form: WeightFormat | None
    ) -> tuple[torch.Tensor | RoundedRows, torch.Tensor]:
        """`add_norm`, the norm being rounded for a product with a weight in `form`; as it is where that is None, or cannot be done at once."""
        sums, scales = (x.sums, x.scales) if isinstance(x, UnscaledSums) else (x, None)
        if form is None or self.tp.size > 1 or not use_triton(sums):
            return self.add_norm(x, residual)
        numbers, scale, total = add_rms_norm_rounded(
            sums, residual, self.weight, self.eps, DTYPES[form.kind], form.group, scales
        )
        return RoundedRows(numbers, scale, total.dtype), total

    def add_norm(
        self, x: torch.Tensor | UnscaledSums, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a block's output to the residual; the sum's norm and the sum, [T, size] each.

        Args:
            x: what `RowParallelLinear` returns, partial sums of [T, size]; without a residual [..., size] itself.
            residual: [T, size]; None for none.
        """
        sums, scales = (x.sums, x.scales) if isinstance(x, UnscaledSums) else (x, None)
        if residual is not None and self.tp.size > 1:
            return self.tp.all_reduce_add_norm(sums, residual, self.weight, self.eps)
        kernel = add_rms_norm if use_triton(sums) else add_rms_norm_torch
        return kernel(sums, residual, self.weight, self.eps, scales)

    def reduce_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of what a `RowParallelLinear` without split sums returns, added up over the ranks: [T, size] -> [T, size]."""
        if self.tp.size > 1:
            return self.tp.all_reduce_add_norm(x, None, self.weight, self.eps)[0]
        return self(x)


class UnitOffsetRMSNorm(RMSNorm):
    """Gemma's: the checkpoint holds the weight less one. The sum is kept in float32, where it loses nothing."""

    def __init__(self, size: int, eps: float, tp: TensorParallel | None = None) -> None:
        super().__init__(size, eps, tp)
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32), requires_grad=False)
        self.weight.weight_loader = self.load

    @staticmethod
    def load(param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """One more than the checkpoint's."""
        param.data.copy_(tensor)
        param.data.add_(1.0)
