"""Mixture of experts: a router, and the experts' weights stacked so that one launch runs them all.

The ranks share every expert (each has a part of its features), or with expert parallelism the experts (each has some whole ones).
Either way all ranks route all tokens alike, and a rank's result is its partial sum, which `RMSNorm.add_norm` adds up.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nanovllm.kernels.fused_moe import fused_experts, fused_experts_torch, route, route_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import MoeConfig


class Router(nn.Module):
    """Logits of all experts; whole on every rank."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, experts]."""
        return F.linear(hidden, self.weight)


class FusedExperts(nn.Module):
    """This rank's part of all experts: `gate_up` [E, 2 * I, H] and `down` [E, H, I].

    The checkpoint has three matrices an expert; a weight loader's `part` is "EXPERT.gate", "EXPERT.up" or "EXPERT.down".
    """

    def __init__(self, hidden_size: int, config: MoeConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.total, self.total_size = config.num_experts, config.intermediate_size
        self.first = self.shard_index = 0
        self.num_experts, self.size = self.total, self.total_size
        if config.parallel:
            self.num_experts = tp.shard(config.num_experts)
            self.first = self.num_experts * tp.rank
        else:
            self.size, self.shard_index = tp.shard(config.intermediate_size), tp.rank
        self.gate_up = nn.Parameter(torch.empty(self.num_experts, 2 * self.size, hidden_size), requires_grad=False)
        self.down = nn.Parameter(torch.empty(self.num_experts, hidden_size, self.size), requires_grad=False)
        self.gate_up.weight_loader = self.load
        self.down.weight_loader = self.load

    def holds(self, part: str | None) -> bool:
        """Whether this rank has any of the expert's matrix `part`."""
        return self.first <= int((part or "").split(".")[0]) < self.first + self.num_experts

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's part of one expert's matrix, which it `holds`."""
        expert, name = (part or "").split(".")
        index = int(expert) - self.first
        shard = slice(self.shard_index * self.size, (self.shard_index + 1) * self.size)
        if name == "down":
            param.data[index].copy_(tensor[:, shard])
        else:
            start = self.size if name == "up" else 0
            param.data[index, start : start + self.size].copy_(tensor[shard])

    def part_shape(self, part: str | None) -> tuple[int, int]:
        """The unsharded shape of an expert's matrix."""
        hidden = self.down.shape[1]
        return (hidden, self.total_size) if (part or "").endswith("down") else (self.total_size, hidden)


class SparseMoe(nn.Module):
    """The feed-forward block of a layer that is a mixture of experts.

    Args:
        slot: as in `RowParallelLinear`.
    """

    def __init__(self, hidden_size: int, config: MoeConfig, tp: TensorParallel, slot: int) -> None:
        super().__init__()
        self.tp = tp
        self.slot = slot
        self.top_k = config.experts_per_token
        self.normalize = config.normalize
        self.gate = Router(hidden_size, config.num_experts)
        self.experts = FusedExperts(hidden_size, config, tp)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> this rank's partial sums [T, H]."""
        logits, experts = self.gate(hidden), self.experts
        triton = use_triton(hidden)
        ids, weights = (route if triton else route_torch)(logits, self.top_k, self.normalize)
        out = self.tp.partial_buffer(self.slot, len(hidden), hidden.shape[1], hidden.dtype)
        run = fused_experts if triton else fused_experts_torch
        return run(hidden, experts.gate_up, experts.down, ids, weights, experts.first, out)
