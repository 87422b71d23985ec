"""Safetensors in, parameters filled. The loader knows no model: each parameter's `weight_loader` takes its own shard, and the
model's `packed_modules` maps checkpoint names to fused parameters. Preflight checks use the headers alone.

The files are memory-mapped and several threads read them, so the host holds the checkpoint once, as reclaimable page cache.
On a GPU a reader's copies go through two small pinned buffers of its own, and only this rank's shards are copied.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from nanovllm.errors import UserError
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear
from nanovllm.layers.moe import FusedExperts
from nanovllm.layers.quantized import Numbers, QuantizedWeight, moved, quantize
from nanovllm.models.decoder import CausalLM
from nanovllm.models.quantization import Quantization, WeightFormat, WeightScheme
from nanovllm.utils.dequantize import read_numbers

# Readers of one checkpoint: more do not fill a PCIe bus faster.
MAX_READERS = 8
# One of a reader's two staging buffers: long against the start of a copy, small against the host's memory.
STAGING_BYTES = 8 << 20


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: the file that holds it, its shape and its size in bytes."""

    file: Path
    shape: tuple[int, ...]
    nbytes: int


class LoadReport(NamedTuple):
    """What a load took: bytes of the parameters filled (this rank's), and seconds."""

    bytes: int
    seconds: float


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
        tensors = {
            name: TensorInfo(file, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(
            f"{file} is truncated or not safetensors: its header cannot be read; download it again"
        ) from None
    if size < 8 + length + end:
        raise UserError(
            f"{file} is truncated: it has {size} bytes, its header promises {8 + length + end}; download it again"
        )
    return tensors


def check_checkpoint(model_dir: Path, model: CausalLM, quantization: Quantization | None = None) -> None:
    """Compare the checkpoint's headers with an unsharded `model` (it may be on the meta device).

    Args:
        quantization: of the checkpoint.

    Raises:
        UserError: files or tensors missing, left over, or of another shape.
    """
    found: dict[str, TensorInfo] = {}
    for file in checkpoint_files(model_dir):
        found.update(read_header(file))
    expected, optional = _stored_tensors(model, quantization, model_dir)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UserError(
            f"{model_dir} lacks the tensor {_some(missing)}; download the model again or mend its config.json"
        )
    extra = sorted(
        name for name in found.keys() - expected.keys() - optional if not _ignored(name, model, quantization)
    )
    if extra:
        raise UserError(
            f"{model_dir} holds the tensor {_some(extra)}, which {type(model).__name__} with this config.json does not "
            "have; config and weights must belong together"
        )
    for name, shape in expected.items():
        if found[name].shape != shape and not (shape == (1,) and found[name].shape == ()):
            raise UserError(
                f"{model_dir}: tensor {name} has shape {list(found[name].shape)}, config.json asks for {list(shape)}; "
                "config and weights must belong together"
            )


def load_model(
    model: CausalLM, model_dir: Path, quantization: Quantization | None = None, online: Quantization | None = None
) -> LoadReport:
    """Fill `model`'s parameters, on whatever device they are, with this rank's shards of the checkpoint in `model_dir`.

    Args:
        quantization: of the checkpoint; quantised weights become plain ones, of the type that the parameters have, where their
            layer does not keep them quantised.
        online: what to make of plain weights; where a layer does not keep them, they are quantised and widened again.

    Raises:
        UserError: files missing or broken. What is in them, `check_checkpoint` has compared before.
    """
    started = time.perf_counter()
    params = dict(model.named_parameters(remove_duplicate=False))
    device = model.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the parameters were made on another stream than the readers'
    with ExitStack() as stack:
        stored: dict[str, _Stored] = {}
        for file in checkpoint_files(model_dir):
            header = read_header(file)
            tensors = _open(file, stack)
            for name, info in header.items():
                if not _ignored(name, model, quantization):
                    stored[name] = _Stored(tensors, name, info.nbytes)
        schemes = stored_schemes(model, quantization)
        rounded = stored_schemes(model, online)
        jobs = []
        for name, tensor in stored.items():
            layer, _, kind = name.rpartition(".")
            scheme = None if kind == "bias" else schemes.get(layer)
            if scheme is not None and kind != scheme.main:
                continue  # read with the numbers it belongs to
            target, part = _parameter_name(name if scheme is None else f"{layer}.weight", model)
            module = model.get_submodule(target.rpartition(".")[0])
            if isinstance(module, FusedExperts) and not module.holds(part):
                continue
            keeps = isinstance(module, (ParallelLinear, FusedExperts)) and module.quantized is not None
            into = module if keeps and kind != "bias" else params[target]
            if scheme is None:
                jobs.append(_Job([tensor], into, part, device, rounded=kind == "weight" and layer in rounded))
                continue
            parts = [stored[f"{layer}.{own}"] for own in scheme.names if f"{layer}.{own}" in stored]
            if isinstance(module, FusedExperts):
                columns = module.part_shape(part)[1]
            else:
                columns = module.in_features * (module.tp.size if isinstance(module, RowParallelLinear) else 1)
            jobs.append(_Job(parts, into, part, device, scheme, columns))
        # The largest first, so that no reader is left alone with one at the end.
        todo = deque(sorted(jobs, key=lambda job: sum(tensor.nbytes for tensor in job.stored), reverse=True))
        readers = _num_readers(device)
        with ThreadPoolExecutor(readers, thread_name_prefix="nanovllm-load") as pool:
            try:
                for done in [pool.submit(_read, todo, device) for _ in range(readers)]:
                    done.result()
            finally:
                todo.clear()  # one failed, or Ctrl-C: the others end with the tensor they are at
    return LoadReport(sum(param.nbytes for param in set(params.values())), time.perf_counter() - started)


def init_dummy(model: nn.Module, seed: int = 0) -> None:
    """Small random weights (std 0.02; norms one, biases zero), for benchmarks that only need true shapes.

    A parameter's values follow from `seed` and its name, whatever the others are; nothing waits for the device. A weight that
    stays quantised is made of those that it would have.
    """
    kept = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    for name, module in kept.items():
        shape = len(module.numbers), module.columns
        weight = torch.empty(shape, dtype=torch.get_default_dtype(), device=module.numbers.device)
        layer, _, own = name.rpartition("quantized.")
        plain = layer + (own.removesuffix(".") or "weight")
        module.put(0, weight.normal_(0.0, 0.02, generator=_generator(plain, seed, weight.device)))
    for name, param in model.named_parameters():
        if name.startswith(tuple(kept)):
            continue
        if param.dim() > 1:
            param.data.normal_(0.0, 0.02, generator=_generator(name, seed, param.device))
        else:
            param.data.fill_(0.0 if name.endswith("bias") else 1.0)


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(xxhash.xxh64_intdigest(name.encode(), seed=seed) >> 1)


class _Stored(NamedTuple):
    """One tensor of the checkpoint."""

    tensors: Any  # safe_open's handle, which threads may share
    name: str
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor, in mapped memory."""
        tensor: torch.Tensor = self.tensors.get_tensor(self.name)
        return tensor


class _Job(NamedTuple):
    """What to read into a parameter (`part` of it, where it is fused), or into a layer that keeps its weight quantised.

    Attributes:
        stored: a tensor, or those of a weight of `columns` columns that is quantised by `scheme`.
        rounded: whether a plain weight is rounded to what 8 bits hold.
    """

    stored: list[_Stored]
    into: nn.Parameter | ParallelLinear | FusedExperts
    part: str | None
    device: torch.device
    scheme: WeightScheme | None = None
    columns: int = 0
    rounded: bool = False

    def run(self) -> None:
        """Read it, and have this rank's part of it taken."""
        numbers = None if self.scheme is None else self._numbers(self.scheme)
        if not isinstance(self.into, nn.Parameter):
            self.into.load_quantized(self.stored[0].read() if numbers is None else numbers, self.part)
            return
        tensor = self.stored[0].read() if numbers is None else numbers.dequantize()
        if self.rounded:
            tensor = quantize(tensor.to(self.device), WeightFormat("fp8")).dequantize()
        loader = getattr(self.into, "weight_loader", _copy)
        loader(self.into, tensor if numbers is None else tensor.to(self.into.dtype), self.part)

    def _numbers(self, scheme: WeightScheme) -> Numbers:
        parts = {stored.name.rpartition(".")[2]: moved(stored.read(), self.device) for stored in self.stored}
        numbers = read_numbers(scheme, parts, self.columns)
        if numbers.groups is not None and not isinstance(self.into, nn.Parameter):
            raise UserError(
                f"{self.stored[0].name} has columns in an order of its own (g_idx), which quantization_config does not announce "
                "(desc_act); set it to true there"
            )
        return numbers


class _StagedCopies(TorchFunctionMode):
    """In its context `param.copy_(host_tensor)` onto `device` goes through pinned buffers, on a stream of this reader.

    A copy straight from mapped memory would keep the reader in the driver until it is done, one reader at a time, and
    would convert types on the host. Here one buffer is filled while the other's copy runs, and the device converts.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers = itertools.cycle([(_pinned(STAGING_BYTES), torch.cuda.Event()) for _ in range(2)])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Copies that can be staged are; everything else runs as it is."""
        if func is torch.Tensor.copy_ and len(args) == 2 and self._can_stage(*args):
            return self._copy(*args)
        return func(*args, **(kwargs or {}))

    def _can_stage(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        if target.device != self.device or source.device.type != "cpu" or target.shape != source.shape:
            return False
        return source.dim() > 0 and source.stride(-1) == 1 and _row_bytes(source) <= STAGING_BYTES

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        rows = STAGING_BYTES // max(1, _row_bytes(source))
        for start in range(0, len(source), rows):
            piece = source[start : start + rows]
            buffer, sent = next(self.buffers)
            sent.synchronize()  # its last copy
            staged = buffer[: piece.nbytes].view(piece.dtype).view(piece.shape)
            # NumPy copies in this thread and without the GIL; torch would start a team of threads for every reader.
            np.copyto(staged.view(torch.uint8).numpy(), piece.view(torch.uint8).numpy())
            if piece.dtype != target.dtype:
                staged = staged.to(self.device, non_blocking=True)
            target[start : start + rows].copy_(staged, non_blocking=True)
            sent.record(self.stream)
        return target


def _read(todo: deque[_Job], device: torch.device) -> None:
    """One reader: takes tensors off `todo` until there are none, and returns when its copies are done."""
    # Inference mode is a thread's own, and parameters made in it may be written in it alone.
    with torch.inference_mode(), _copies_to(device):
        while True:
            try:
                job = todo.popleft()
            except IndexError:
                return
            try:
                job.run()
            except BaseException:
                todo.clear()
                raise


@contextmanager
def _copies_to(device: torch.device) -> Iterator[None]:
    """Staged copies where `device` is a GPU; plain ones, straight from the mapped file, on the CPU."""
    if device.type != "cuda":
        yield
        return
    copies = _StagedCopies(device)
    try:
        with torch.cuda.device(device), torch.cuda.stream(copies.stream), copies:
            yield
    finally:
        copies.stream.synchronize()  # before the buffers go


def _num_readers(device: torch.device) -> int:
    """Readers that have a core each. On the CPU torch's own threads copy, as many a reader as it is set to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = 1 if device.type == "cuda" else torch.get_num_threads()
    return max(1, min(MAX_READERS, cores // each))


def _open(file: Path, stack: ExitStack) -> Any:
    """Map a safetensors file; `stack` closes it."""
    try:
        return stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
    except SafetensorError as error:
        raise UserError(f"{file} is not a valid safetensors file ({error}); download it again") from None


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _row_bytes(tensor: torch.Tensor) -> int:
    size: int = math.prod(tensor.shape[1:]) * tensor.element_size()
    return size


def _copy(param: nn.Parameter, tensor: torch.Tensor, part: str | None) -> None:
    param.data.copy_(tensor)


def _parameter_name(name: str, model: CausalLM) -> tuple[str, str | None]:
    """Checkpoint name -> parameter name and, where it is part of a fused parameter, the part."""
    module_names = {there: here for here, there in model.renamed.items()}
    pieces = [module_names.get(piece, piece) for piece in name.split(".")]
    if len(pieces) > 3 and pieces[-4] == "experts" and pieces[-2] in model.expert_parts:
        param, part = model.expert_parts[pieces[-2]]
        return ".".join([*pieces[:-3], param]), f"{pieces[-3]}.{part}"
    if len(pieces) > 1 and pieces[-2] in model.packed_modules:
        pieces[-2], part = model.packed_modules[pieces[-2]]
        return ".".join(pieces), part
    return ".".join(pieces), None


def _expected_tensors(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes that fill an unsharded `model`."""
    names_of_parts = {packed: name for name, packed in model.packed_modules.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for name, param in model.named_parameters():
        module_name, _, kind = name.rpartition(".")
        parent, _, fused = module_name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, ColumnParallelLinear) and (fused, next(iter(module.offsets))) in names_of_parts:
            for part, (_, rows, _) in module.offsets.items():
                expected[f"{parent}.{names_of_parts[fused, part]}.{kind}"] = (rows, *param.shape[1:])
        elif isinstance(module, FusedExperts):
            for part_name, (fused, part) in model.expert_parts.items():
                if fused == kind:
                    shape = module.part_shape(part)
                    expected |= {f"{module_name}.{i}.{part_name}.weight": shape for i in range(module.total)}
        else:
            expected[name] = tuple(param.shape)
    return {_checkpoint_name(name, model): shape for name, shape in expected.items()}


def _checkpoint_name(name: str, model: CausalLM) -> str:
    """What the checkpoint calls the module or parameter `name`, parts of fused ones aside."""
    return ".".join(model.renamed.get(piece, piece) for piece in name.split(".")) if model.renamed else name


class LinearLayer(NamedTuple):
    """A linear layer of the checkpoint: its module here, and which of its fused parts it is; None where it is all of it."""

    module: ColumnParallelLinear | RowParallelLinear
    part: str | None


def linear_layers(model: CausalLM) -> dict[str, LinearLayer]:
    """The linear layers of the blocks, experts aside, by their names in the checkpoint."""
    names_of_parts = {packed: name for name, packed in model.packed_modules.items()}
    layers: dict[str, LinearLayer] = {}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if isinstance(module, ColumnParallelLinear) and (own, next(iter(module.offsets))) in names_of_parts:
            layers |= {f"{parent}.{names_of_parts[own, part]}": LinearLayer(module, part) for part in module.offsets}
        elif isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            layers[name] = LinearLayer(module, None)
    return {_checkpoint_name(name, model): layer for name, layer in layers.items()}


def expert_layers(model: CausalLM) -> dict[str, FusedExperts]:
    """The matrices of experts by their names in the checkpoint."""
    return {
        _checkpoint_name(f"{name}.{i}.{part}", model): module
        for name, module in model.named_modules()
        if isinstance(module, FusedExperts)
        for i in range(module.total)
        for part in model.expert_parts
    }


def stored_schemes(model: CausalLM, quantization: Quantization | None) -> dict[str, WeightScheme]:
    """How the quantised weights are stored, by the layer's name in the checkpoint."""
    if quantization is None:
        return {}
    heads = (name for name, module in model.named_modules() if isinstance(module, ParallelLMHead))
    layers = [*linear_layers(model), *expert_layers(model), *(_checkpoint_name(name, model) for name in heads)]
    found = {layer: quantization.scheme_of(layer) for layer in layers}
    return {layer: scheme for layer, scheme in found.items() if scheme is not None}


def _stored_tensors(
    model: CausalLM, quantization: Quantization | None, model_dir: Path
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Checkpoint names and shapes that fill an unsharded `model`, and names of what may be there beside them.

    Raises:
        UserError: a weight's shape does not go with the way it is quantised.
    """
    schemes = stored_schemes(model, quantization)
    expected: dict[str, tuple[int, ...]] = {}
    optional: set[str] = set()
    for name, shape in _expected_tensors(model).items():
        layer, _, kind = name.rpartition(".")
        scheme = schemes.get(layer) if kind == "weight" else None
        if scheme is None:
            expected[name] = shape
            continue
        rows, columns = shape
        if problem := scheme.problem(rows, columns):
            raise UserError(
                f"{model_dir}: {layer} cannot be quantized as config.json says: {problem}; config and weights must belong together"
            )
        expected |= {f"{layer}.{own}": size for own, size in scheme.shapes(rows, columns).items()}
        optional |= {f"{layer}.{own}" for own in scheme.names}
    return expected, optional


def _ignored(name: str, model: CausalLM, quantization: Quantization | None) -> bool:
    """Tensors that checkpoints carry although they are computed or shared, or mean nothing here."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
        return True
    if quantization is None:
        return False
    kind = name.rpartition(".")[2]
    # GPTQ's tools give every layer a bias, of zeros where the model has none.
    if kind == "bias" and quantization.method == "gptq":
        return not isinstance(getattr(*_owner(name, model), None), nn.Parameter)
    return kind in ("k_scale", "v_scale", "q_scale")  # of a quantised KV cache


def _owner(name: str, model: CausalLM) -> tuple[nn.Module | None, str]:
    """The module that a checkpoint's tensor would belong to, and the parameter's name there."""
    layer, _, kind = _parameter_name(name, model)[0].rpartition(".")
    try:
        return model.get_submodule(layer), kind
    except AttributeError:
        return None, kind


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
