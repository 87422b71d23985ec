"""Low-rank adapters on linear layers. A layer without one, and a step in which no sequence has one, pay nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.lora import lora_add, lora_add_torch
from nanovllm.kernels.triton_compat import use_triton


@dataclass
class AdapterTokens:
    """Whose adapter each token of the step has that is being computed. One for a model; its layers look here.

    Attributes:
        index: [T] int32, -1 for none; None where no token has any.
    """

    index: torch.Tensor | None = None


class LoraWeights:
    """The adapters of one layer on this rank.

    Args:
        a: [L, P * R, in_features]; b: [L, out_features, R], scaled already. L adapters, P fused matrices, see `kernels.lora`.
        starts: [P + 1] first row of each matrix among the output features, and their number.
        tokens: of the model.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, starts: list[int], tokens: AdapterTokens) -> None:
        self.a, self.b, self.starts, self.tokens = a, b, starts, tokens

    @property
    def active(self) -> bool:
        """Whether any token of the step has an adapter."""
        return self.tokens.index is not None

    def add(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add to `out` [T, out_features], the layer's of `x` [T, in_features], what each token's adapter adds; returns it."""
        assert self.tokens.index is not None
        kernel = lora_add if use_triton(x) else lora_add_torch
        return kernel(x, out, self.a, self.b, self.tokens.index, self.starts)
