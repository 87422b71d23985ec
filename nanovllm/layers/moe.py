"""Mixture of experts: a router, and the experts' weights stacked so that one launch runs them all.

The ranks share every expert (each has a part of its features), or with expert parallelism the experts (each has some whole ones).
Either way all ranks route all tokens alike, and a rank's result is its partial sum, which `RMSNorm.add_norm` adds up.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from nanovllm.kernels.fused_moe import ExpertScales, fused_experts, fused_experts_torch, route, route_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.quantized import Numbers, QuantizedWeight, some_columns, some_rows
from nanovllm.models.config import MoeConfig
from nanovllm.models.quantization import WeightFormat, WeightScheme


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
        self.hidden_size = hidden_size
        self.gate_up = nn.Parameter(torch.empty(self.num_experts, 2 * self.size, hidden_size), requires_grad=False)
        self.down = nn.Parameter(torch.empty(self.num_experts, hidden_size, self.size), requires_grad=False)
        self.gate_up.weight_loader = self.load
        self.down.weight_loader = self.load
        # By the names above, the rows of all experts one after the other.
        self.quantized: nn.ModuleDict | None = None

    def holds(self, part: str | None) -> bool:
        """Whether this rank has any of the expert's matrix `part`."""
        return self.first <= int((part or "").split(".")[0]) < self.first + self.num_experts

    def load(self, param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
        """Copy this rank's part of one expert's matrix, which it `holds`."""
        index, name = self._split(part)
        if name == "down":
            param.data[index].copy_(tensor[:, self._shard])
        else:
            start = self.size if name == "up" else 0
            param.data[index, start : start + self.size].copy_(tensor[self._shard])

    def load_quantized(self, weight: Numbers | torch.Tensor, part: str | None) -> None:
        """As `load`, into the quantised weights; a plain `weight` is quantised."""
        assert self.quantized is not None
        index, name = self._split(part)
        gate_up, down = self.quantized["gate_up"], self.quantized["down"]
        if name == "down":
            down.put(index * self.hidden_size, some_columns(weight, self._shard))
        else:
            start = (2 * index + (name == "up")) * self.size
            gate_up.put(start, some_rows(weight, lambda tensor: tensor[self._shard]))

    def _split(self, part: str | None) -> tuple[int, str]:
        """Which of this rank's experts, and its matrix."""
        expert, name = (part or "").split(".")
        return int(expert) - self.first, name

    @property
    def _shard(self) -> slice:
        """This rank's features of an expert."""
        return slice(self.shard_index * self.size, (self.shard_index + 1) * self.size)

    def keep(self, scheme: WeightScheme) -> None:
        """Have the weights quantised in place of the plain ones, where `scheme` has a form for both whose products are of 8 bits."""
        gate_up, down = scheme.kept(2 * self.size, self.hidden_size), scheme.kept(self.hidden_size, self.size)
        if gate_up is None or down is None or not (gate_up.activations and down.activations):
            return
        with self.down.device:
            weights = {
                "gate_up": QuantizedWeight(self.num_experts * 2 * self.size, self.hidden_size, gate_up),
                "down": QuantizedWeight(self.num_experts * self.hidden_size, self.size, down),
            }
        self.quantized = nn.ModuleDict(weights)
        del self.gate_up, self.down

    def part_shape(self, part: str | None) -> tuple[int, int]:
        """The unsharded shape of an expert's matrix."""
        hidden = self.hidden_size
        return (hidden, self.total_size) if (part or "").endswith("down") else (self.total_size, hidden)

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Each token's experts that are here, weighted and added up, see `fused_experts_torch`: [T, H]."""
        run = fused_experts if use_triton(hidden) else fused_experts_torch
        if self.quantized is None:
            return run(hidden, self.gate_up, self.down, ids, weights, self.first, out)
        kept = self.quantized["gate_up"], self.quantized["down"]
        gate_up, down = (weight.numbers.unflatten(0, (self.num_experts, -1)) for weight in kept)
        scales = ExpertScales(*(weight.scale.unflatten(1, (self.num_experts, -1)) for weight in kept))
        return run(hidden, gate_up, down, ids, weights, self.first, out, scales=scales)


class SparseMoe(nn.Module):
    """The feed-forward block of a layer that is a mixture of experts.

    Args:
        slot: as in `RowParallelLinear`.

    Attributes:
        takes_rounded: as of `MLP`: never, as the router reads the hidden states unrounded.
    """

    takes_rounded: ClassVar[WeightFormat | None] = None

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
        summed: torch.Tensor = experts(hidden, ids, weights, out)
        return summed
