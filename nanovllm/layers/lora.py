"""Low-rank adapters on linear layers. A layer without one, and a step in which no sequence has one, pay nothing."""

from __future__ import annotations

import math

import torch

from nanovllm.kernels.lora import (
    MOST_APPENDED,
    PART_COLUMNS,
    AdapterGroups,
    LowRank,
    column_tiles,
    group_adapters,
    lora_add,
    lora_add_torch,
    part_columns,
    shrink,
)
from nanovllm.kernels.triton_compat import use_triton


class AdapterTokens:
    """Whose adapter each token of the step has that is being computed. One for a model; its layers look here.

    Args:
        count: adapters.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.index: torch.Tensor | None = None
        self.groups: AdapterGroups | None = None

    def assign(self, index: torch.Tensor | None) -> None:
        """The step's adapters [T] int32, -1 for none; None where no token has any."""
        self.index = index
        self.groups = group_adapters(index, self.count) if index is not None and use_triton(index) else None


class LoraWeights:
    """The adapters of one layer on this rank.

    Args:
        a: [L, P * R, in_features]; b: [L, out_features, R], scaled already. L adapters, P fused matrices, see `kernels.lora`.
        starts: [P + 1] first row of each matrix among the output features, and their number.
        tokens: of the model.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, starts: list[int], tokens: AdapterTokens) -> None:
        self.a, self.b, self.starts, self.tokens = a, b, starts, tokens
        self.columns = column_tiles(starts, a.device)
        self.parts = part_columns(starts, a.device)

    @property
    def active(self) -> bool:
        """Whether any token of the step has an adapter."""
        return self.tokens.index is not None

    def low_rank(self, x: torch.Tensor, block_n: int) -> LowRank | None:
        """What the layer's product of `x` [T, in_features] in tiles of `block_n` columns can add by itself; None: `add` must.

        Nothing may be launched between this and the product.
        """
        count, rows, rank = self.b.shape
        groups, index = self.tokens.groups, self.tokens.index
        if groups is None or index is None or count * rank > MOST_APPENDED:
            return None
        # A tile's columns are of one matrix.
        if rows % PART_COLUMNS or math.gcd(*self.starts) % block_n:
            return None
        return LowRank(shrink(x, self.a, rank, groups, x_is_old=False), self.b, index, self.parts)

    def add(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add to `out`, the layer's of `x` [T, in_features], what each token's adapter adds; returns it.

        `out` is [T, out_features], or partial sums [S, T, out_features] in float32, of which the first are added to.
        """
        first = out if out.dim() == x.dim() else out[0]
        if self.tokens.groups is not None:
            lora_add(x, first, self.a, self.b, self.tokens.groups, self.columns)
        else:
            assert self.tokens.index is not None
            lora_add_torch(x, first, self.a, self.b, self.tokens.index, self.starts)
        return out
