"""Which weights of a model stay quantised on its device, decided before there is memory for any. Called by the model runner.

A model made on the meta device has shapes alone: its layers are told what to keep, and only then is it given memory.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from nanovllm.kernels.triton_compat import FP8_CAPABILITY, HAS_TRITON
from nanovllm.layers.linear import ParallelLinear
from nanovllm.layers.moe import FusedExperts
from nanovllm.models.decoder import CausalLM
from nanovllm.models.quantization import Quantization, WeightScheme
from nanovllm.utils.loader import expert_layers, linear_layers, stored_schemes


def can_keep_quantized(device: torch.device) -> bool:
    """Whether `device` computes with weights that stay quantised, 8-bit floats too; elsewhere they become plain ones."""
    return device.type == "cuda" and HAS_TRITON and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def keep_quantized(model: CausalLM, quantization: Quantization) -> None:
    """Have those weights of `model`, which is on the meta device, stay quantised whose shape allows it; the others stay plain."""
    schemes = stored_schemes(model, quantization)
    matrices: list[tuple[str, ParallelLinear | FusedExperts]] = [
        *((name, layer.module) for name, layer in linear_layers(model).items()),
        *expert_layers(model).items(),
    ]
    found: dict[ParallelLinear | FusedExperts, set[WeightScheme | None]] = defaultdict(set)
    for name, module in matrices:
        found[module].add(schemes.get(name))
    for module, kinds in found.items():
        # Matrices that are fused into one have one format.
        if len(kinds) == 1 and (scheme := kinds.pop()) is not None:
            module.keep(scheme)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of `model` that are on the meta device memory on `device`, zeroed."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # shared parameters stay shared
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if param not in made:
                made[param] = nn.Parameter(torch.zeros_like(param, device=device), requires_grad=False)
                made[param].__dict__.update(param.__dict__)  # their loaders
            setattr(module, name, made[param])
