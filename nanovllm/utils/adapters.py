"""Low-rank adapters in PEFT's format: checked against the model from their headers alone, and loaded onto its layers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nanovllm.errors import UserError
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.lora import AdapterTokens, LoraWeights
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.decoder import CausalLM
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.loader import LinearLayer, linear_layers, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LEAST_RANK = 16  # of a matrix product's tile
MOST_RANK = 256
_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<matrix>[AB])\.(?:default\.)?weight")
# What would change the result and is not done here, with the values that do nothing.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


@dataclass(frozen=True)
class Adapter:
    """One adapter on disk: its rank, what its product is multiplied with, and the layers it changes, by checkpoint name."""

    name: str
    file: Path
    rank: int
    scaling: float
    tensors: Mapping[str, dict[str, str]]  # layer -> {"A": tensor's name, "B": ...}


def read_adapters(adapters: Mapping[str, str], model: CausalLM) -> list[Adapter]:
    """The adapters of an engine in the order of their names, checked against an unsharded `model` (it may be on the meta device).

    Args:
        adapters: name -> directory or hub id.

    Raises:
        UserError: files missing, not PEFT's, or not made for this model; one line.
    """
    layers = linear_layers(model)
    return [_read(name, adapters[name], layers) for name in sorted(adapters)]


def _read(name: str, given: str, layers: Mapping[str, LinearLayer]) -> Adapter:
    directory = resolve_model(given)
    what = f"lora adapter {name!r} ({directory})"
    config = _config(directory, what)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise UserError(f"{what} has the rank {rank!r}; it must be a whole number from 1 to {MOST_RANK}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise UserError(f"{what} has lora_alpha={alpha!r}; it must be a number")
    file = directory / WEIGHTS
    if not file.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code: convert it)" if list(directory.glob("*.bin")) else ""
        )
        raise UserError(f"{what} lacks {WEIGHTS}{pickled}; save it with PEFT's save_pretrained")
    tensors: dict[str, dict[str, str]] = {}
    for stored, info in read_header(file).items():
        match = _NAME.fullmatch(stored)
        layer = None if match is None else layers.get(match["layer"])
        if match is None or layer is None:
            raise UserError(f"{what} holds the tensor {stored}, which changes no linear layer of this model")
        rows, columns = layer.module.out_features, layer.module.in_features
        if layer.part is not None:
            rows = layer.module.offsets[layer.part][1]
        shape = (rank, columns) if match["matrix"] == "A" else (rows, rank)
        if info.shape != shape:
            raise UserError(f"{what}: tensor {stored} has shape {list(info.shape)}, the model asks for {list(shape)}")
        tensors.setdefault(match["layer"], {})[match["matrix"]] = stored
    for changed, matrices in tensors.items():
        if len(matrices) < 2:
            raise UserError(f"{what} lacks lora_{'B' if 'A' in matrices else 'A'} of {changed}; save it again")
    scaling = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return Adapter(name, file, rank, scaling, tensors)


def _config(directory: Path, what: str) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{what} lacks {CONFIG}; give a directory that PEFT's save_pretrained wrote") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{what}: {CONFIG} is no JSON object; save the adapter again")
    for key, allowed in _MUST_BE.items():
        if config.get(key) not in allowed:
            raise UserError(f"{what} has {key}={config.get(key)!r}, which is not supported; it must be {allowed[-1]!r}")
    return config


def load_adapters(model: CausalLM, adapters: list[Adapter], tp: TensorParallel, tokens: AdapterTokens) -> None:
    """Put this rank's shards of all adapters onto the layers they change."""
    rank = LEAST_RANK
    while rank < max(adapter.rank for adapter in adapters):
        rank *= 2
    layers = linear_layers(model)
    changed = {layer for adapter in adapters for layer in adapter.tensors}
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    for module, part in {layers[name].module: layers[name].part for name in changed}.items():
        rows, columns = module.out_features, module.in_features
        starts = [0, rows]
        if part is not None:
            starts = [*(start for start, _, _ in module.offsets.values()), rows]
        a = torch.zeros(len(adapters), (len(starts) - 1) * rank, columns, dtype=dtype, device=device)
        b = torch.zeros(len(adapters), rows, rank, dtype=dtype, device=device)
        module.lora = LoraWeights(a, b, starts, tokens)
    for index, adapter in enumerate(adapters):
        with safe_open(str(adapter.file), framework="pt", device="cpu") as file:
            for name, matrices in adapter.tensors.items():
                a_part, b_part = (file.get_tensor(matrices[matrix]).float() for matrix in ("A", "B"))
                _load(layers[name], index, a_part, b_part * adapter.scaling, rank, tp)


def _load(layer: LinearLayer, index: int, a: torch.Tensor, b: torch.Tensor, rank: int, tp: TensorParallel) -> None:
    module, part = layer
    assert module.lora is not None
    own, first, start = len(a), 0, 0
    if isinstance(module, RowParallelLinear):
        columns = module.in_features
        a = a[:, tp.rank * columns : (tp.rank + 1) * columns]
    elif part is None:
        b = module.rows_of_rank(b)
    else:
        first = list(module.offsets).index(part) * rank
        start, rows, shard = module.offsets[part]
        b = b[shard * rows : (shard + 1) * rows]
    module.lora.a[index, first : first + own].copy_(a)
    module.lora.b[index, start : start + len(b), :own].copy_(b)
