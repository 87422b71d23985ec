"""Safetensors in, parameters filled. The loader knows no model: each parameter's `weight_loader` takes its own shard, and the
model's `packed_modules` maps checkpoint names to fused parameters. Preflight checks use the headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from nanovllm.errors import UserError
from nanovllm.layers.linear import ColumnParallelLinear
from nanovllm.models.decoder import CausalLM


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: the file that holds it and its shape."""

    file: Path
    shape: tuple[int, ...]


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The checkpoint's safetensors files, by its index where it has one.

    Raises:
        UserError: no weights, or a file the index names is missing.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is not a safetensors index; download the model again") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"{model_dir} lacks the weight file {missing[0]} that its index names; download the model again"
            )
        return files
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{model_dir} holds no *.safetensors weights; download them, or set load_format=dummy for random ones"
        )
    return files


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names and shapes of a safetensors file's tensors, read from its header.

    Raises:
        UserError: the file is not safetensors, or shorter than its header promises.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: TensorInfo(file, tuple(entry["shape"])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(
            f"{file} is truncated or not safetensors: its header cannot be read; download it again"
        ) from None
    if size < 8 + length + end:
        raise UserError(
            f"{file} is truncated: it has {size} bytes, its header promises {8 + length + end}; download it again"
        )
    return tensors


def check_checkpoint(model_dir: Path, model: CausalLM) -> None:
    """Compare the checkpoint's headers with an unsharded `model` (it may be on the meta device).

    Raises:
        UserError: files or tensors missing, left over, or of another shape.
    """
    found: dict[str, TensorInfo] = {}
    for file in checkpoint_files(model_dir):
        found.update(read_header(file))
    expected = _expected_tensors(model)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UserError(
            f"{model_dir} lacks the tensor {_some(missing)}; download the model again or mend its config.json"
        )
    extra = sorted(name for name in found.keys() - expected.keys() if not _ignored(name, model))
    if extra:
        raise UserError(
            f"{model_dir} holds the tensor {_some(extra)}, which {type(model).__name__} with this config.json does not "
            "have; config and weights must belong together"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{model_dir}: tensor {name} has shape {list(found[name].shape)}, config.json asks for {list(shape)}; "
                "config and weights must belong together"
            )


def load_model(model: CausalLM, model_dir: Path) -> None:
    """Fill `model`'s parameters with this rank's shards of the checkpoint in `model_dir`."""
    params = dict(model.named_parameters(remove_duplicate=False))
    for file in checkpoint_files(model_dir):
        with safe_open(str(file), framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                if _ignored(name, model):
                    continue
                target, part = _parameter_name(name, model)
                param = params[target]
                loader = getattr(param, "weight_loader", _copy)
                loader(param, tensors.get_tensor(name), part)


def init_dummy(model: nn.Module, seed: int = 0) -> None:
    """Small random weights (std 0.02; norms stay one), for benchmarks that only need true shapes."""
    for param in model.parameters():
        if param.dim() > 1:
            generator = torch.Generator(device=param.device).manual_seed(seed)
            param.data.normal_(0.0, 0.02, generator=generator)
        elif not bool((param.data == 1).all()):
            param.data.zero_()


def _copy(param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
    param.data.copy_(tensor)


def _parameter_name(name: str, model: CausalLM) -> tuple[str, str | None]:
    """Checkpoint name -> parameter name and, where it is part of a fused parameter, the part."""
    pieces = name.split(".")
    if len(pieces) > 1 and pieces[-2] in model.packed_modules:
        pieces[-2], part = model.packed_modules[pieces[-2]]
        return ".".join(pieces), part
    return name, None


def _expected_tensors(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes that fill an unsharded `model`."""
    names_of_parts = {packed: name for name, packed in model.packed_modules.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for name, param in model.named_parameters():
        module_name, _, kind = name.rpartition(".")
        parent, _, fused = module_name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, ColumnParallelLinear):
            for part, (_, rows, _) in module.offsets.items():
                expected[f"{parent}.{names_of_parts[fused, part]}.{kind}"] = (rows, *param.shape[1:])
        else:
            expected[name] = tuple(param.shape)
    return expected


def _ignored(name: str, model: CausalLM) -> bool:
    """Tensors that old checkpoints carry although they are computed or shared."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
