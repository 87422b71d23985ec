"""`quantization_config` of published checkpoints: which weights are quantised, and how their tensors are laid out. No torch.

Read from the forms that Hugging Face's `config.json` has: `fp8` (as Qwen and DeepSeek publish), `compressed-tensors` (llm-compressor),
`awq` and `gptq`. `utils.dequantize` makes weights of what they describe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanovllm.errors import UserError

METHODS = ("fp8", "compressed-tensors", "awq", "gptq")
Packing = Literal["plain", "int32", "awq", "gptq"]
Strategy = Literal["tensor", "channel", "group", "block"]
Shapes = dict[str, tuple[int, ...]]


class WeightFormat(NamedTuple):
    """How a weight [N, K] stays quantised on a GPU.

    Attributes:
        kind: of its numbers.
        group: neighbouring columns that share a scale, 0 for all of a row's.
        zeros: whether scales come with zero points.
        activations: whether they are made 8 bits too, for a product of two such numbers; else the weight is widened.
    """

    kind: Literal["fp8", "int8", "int4"]
    group: int = 0
    zeros: bool = False
    activations: bool = False


# Inner tile of the products, and the scales of two numbers in 8 bits.
TILE = 128
# Least columns of a group, and what an outer tile is a multiple of.
NARROW = 32


@dataclass(frozen=True)
class WeightScheme:
    """How one weight [N, K] is stored.

    Attributes:
        packing: "plain": a tensor of 8-bit numbers [N, K] and its scales; "int32": numbers of `bits` bits in 32-bit words along K;
            "awq", "gptq": the layouts of those tools, transposed.
        bits: of a number; float: it is a float8_e4m3fn, else an integer.
        strategy: what shares a scale: the tensor, an output feature, `group` neighbouring columns of one, or a `block` of rows and columns.
        symmetric: without zero points.
        scale: name of the scales beside the weight.
        zero_shift: added to stored zero points: GPTQ's first format has them less one.
        shuffled: whether the columns of a group may be anywhere (GPTQ's desc_act).
        activations: whether they are meant to be quantised as well.
    """

    packing: Packing
    bits: int
    float: bool
    strategy: Strategy
    group: int = 0
    block: tuple[int, int] = (0, 0)
    symmetric: bool = True
    scale: str = "weight_scale"
    zero_shift: int = 0
    shuffled: bool = False
    activations: bool = False

    def kept(self, rows: int, columns: int) -> WeightFormat | None:
        """How a rank's part [rows, columns] of such a weight stays quantised; None where its shape or layout has no kernel."""
        group = self.block[1] if self.strategy == "block" else self.group
        if group and columns == group:
            group = 0
        if rows % NARROW or columns % TILE or self.shuffled or (group and (group % NARROW or columns % group)):
            return None
        kind: Literal["fp8", "int8", "int4"] = "fp8" if self.float else "int8" if self.bits == 8 else "int4"
        activations = self.activations and self.symmetric and group in (0, TILE)
        return WeightFormat(kind, group, not self.symmetric, activations)

    @property
    def main(self) -> str:
        """Name of the tensor that holds the numbers."""
        return {"plain": "weight", "int32": "weight_packed"}.get(self.packing, "qweight")

    def shapes(self, rows: int, columns: int) -> Shapes:
        """Name and shape of each tensor that there must be for a weight [rows, columns]."""
        words = -(-columns * self.bits // 32)
        if self.packing == "awq":
            narrow, groups = rows * self.bits // 32, columns // (self.group or columns)
            shapes: Shapes = {"qweight": (columns, narrow), "scales": (groups, rows)}
            return shapes if self.symmetric else {**shapes, "qzeros": (groups, narrow)}
        if self.packing == "gptq":
            groups = -(-columns // (self.group or columns))
            zeros = (groups, rows * self.bits // 32)
            return {"qweight": (words, rows), "scales": (groups, rows), "qzeros": zeros}
        shapes = {self.main: (rows, words) if self.packing == "int32" else (rows, columns)}
        scales = {
            "tensor": (1,),
            "channel": (rows, 1),
            "group": (rows, columns // (self.group or columns)),
            "block": (-(-rows // (self.block[0] or 1)), -(-columns // (self.block[1] or 1))),
        }[self.strategy]
        shapes[self.scale] = scales
        if not self.symmetric:
            zero = (-(-rows * self.bits // 32), scales[-1]) if self.packing == "int32" else scales
            shapes["weight_zero_point"] = zero
        return shapes

    def problem(self, rows: int, columns: int) -> str | None:
        """Why no weight [rows, columns] can be stored so, or None."""
        if self.strategy == "group" and self.packing != "gptq" and columns % (self.group or columns):
            return f"its {columns} columns are no multiple of the group size {self.group}"
        if self.packing in ("awq", "gptq") and rows * self.bits % 32:
            return f"its {rows} rows of {self.bits} bits do not fill 32-bit words"
        return None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors that may belong to a weight; of activations, which are not quantised here, and what shapes say already, too."""
        own = ("qzeros", "g_idx") if self.main == "qweight" else ("weight_zero_point", "weight_shape")
        return (self.main, self.scale, *own, "input_scale", "input_zero_point")


@dataclass(frozen=True)
class Quantization:
    """What is quantised how: the first of `schemes` whose targets name a layer, unless `ignored` does.

    Targets are "Linear" (all), a name's end, or "re:" and a pattern, as compressed-tensors has them.
    """

    method: str
    schemes: tuple[tuple[tuple[str, ...], WeightScheme], ...]
    ignored: tuple[str, ...]

    @property
    def is_fp8(self) -> bool:
        """Whether all that is quantised is 8-bit floats."""
        return all(scheme.float for _, scheme in self.schemes)

    def scheme_of(self, layer: str) -> WeightScheme | None:
        """How the weight of `layer` is stored; None where it is plain. The layer's name is that of the checkpoint."""
        if any(_names(pattern, layer) for pattern in self.ignored):
            return None
        return next((scheme for targets, scheme in self.schemes if any(_names(t, layer) for t in targets)), None)


# What `quantization="fp8"` makes of plain weights: linear layers and experts, an output feature at a time.
ONLINE_FP8 = Quantization(
    "fp8", ((("Linear",), WeightScheme("plain", 8, True, "channel", activations=True)),), ("lm_head",)
)


def _names(pattern: str, layer: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return pattern == "Linear" or layer == pattern or layer.endswith("." + pattern) or layer.startswith(pattern + ".")


def read_quantization(config: Mapping[str, Any], where: Path) -> Quantization | None:
    """The quantisation of a checkpoint from its `config.json`; None where it has none.

    Raises:
        UserError: a method or layout that is not known.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"{where} gives a quantization_config that is no object; take the model's original file")
    method = str(given.get("quant_method", "")).replace("_", "-")
    readers = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq}
    if method not in readers:
        raise UserError(
            f"{where} asks for the quantization method {given.get('quant_method')!r}, which is not known; "
            f"known: {', '.join(METHODS)}; use a checkpoint of one of these, or the unquantized one"
        )
    try:
        return readers[method](given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where} gives a quantization_config of {method} that cannot be read: {_reason(error)}; "
            "use another checkpoint, or the unquantized one"
        ) from None


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _only(given: Mapping[str, Any], key: str, *allowed: Any) -> Any:
    """A value that must be one of `allowed`, of which the first is the default."""
    value = given.get(key)
    value = allowed[0] if value is None else value
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}, and must be {' or '.join(repr(one) for one in allowed)}")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is no list of names")
    return tuple(str(one) for one in value)


def _fp8(given: Mapping[str, Any]) -> Quantization:
    _only(given, "fmt", "e4m3")
    block = given.get("weight_block_size")
    if block is None:
        scheme = WeightScheme("plain", 8, True, "tensor", activations=True)
    else:
        rows, columns = (int(size) for size in block)
        if min(rows, columns) < 1:
            raise ValueError(f"weight_block_size is {block!r}, and must be two sizes of 1 or more")
        scheme = WeightScheme(
            "plain", 8, True, "block", block=(rows, columns), scale="weight_scale_inv", activations=True
        )
    ignored = _strings(given.get("modules_to_not_convert") or given.get("ignored_layers"))
    return Quantization("fp8", ((("Linear",), scheme),), (*ignored, "lm_head"))


def _compressed_tensors(given: Mapping[str, Any]) -> Quantization:
    schemes = []
    for group in given["config_groups"].values():
        weights = group["weights"]
        layout = group.get("format") or given.get("format")
        if layout not in ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized"):
            raise ValueError(
                f"format is {layout!r}, and must be float-quantized, int-quantized, naive-quantized or pack-quantized"
            )
        is_float = _only(weights, "type", "int", "float") == "float"
        packed = layout == "pack-quantized"
        bits = _only(weights, "num_bits", 8, 4) if packed else _only(weights, "num_bits", 8)
        strategy = _only(weights, "strategy", "tensor", "channel", "group", "block")
        if packed and (is_float or strategy == "block"):
            raise ValueError("pack-quantized weights must be integers with a scale for a tensor, a channel or a group")
        block = tuple(weights["block_structure"]) if strategy == "block" else (0, 0)
        schemes.append(
            (
                _strings(group.get("targets") or ["Linear"]),
                WeightScheme(
                    "int32" if packed else "plain",
                    bits,
                    is_float,
                    strategy,
                    group=int(weights["group_size"]) if strategy == "group" else 0,
                    block=(int(block[0]), int(block[1])),
                    symmetric=bool(weights.get("symmetric", True)),
                    activations=bool(group.get("input_activations")),
                ),
            )
        )
        if _only(weights, "actorder", "none", "weight", "static", "group", "dynamic", True, False) in (
            "group",
            "dynamic",
            True,
        ):
            raise ValueError("actorder is 'group', whose order of columns is not supported")
    return Quantization("compressed-tensors", tuple(schemes), _strings(given.get("ignore")))


def _awq(given: Mapping[str, Any]) -> Quantization:
    bits = _only({"bits": given.get("bits", given.get("w_bit"))}, "bits", 4)
    _only({"version": str(given.get("version") or "gemm").lower()}, "version", "gemm")
    group = int(given.get("group_size", given.get("q_group_size", 128)))
    scheme = WeightScheme(
        "awq", bits, False, "group", group=max(group, 0), symmetric=not given.get("zero_point", True), scale="scales"
    )
    ignored = tuple(f"re:.*{re.escape(name)}" for name in _strings(given.get("modules_to_not_convert")))
    return Quantization("awq", ((("Linear",), scheme),), (*ignored, "lm_head"))


def _gptq(given: Mapping[str, Any]) -> Quantization:
    bits = _only(given, "bits", 4, 8)
    if given.get("dynamic"):
        raise ValueError("it has rules of their own for some layers (dynamic), which are not supported")
    kind = _only(given, "checkpoint_format", "gptq", "gptq_v2")
    group = int(given["group_size"])
    scheme = WeightScheme(
        "gptq",
        bits,
        False,
        "group",
        group=max(group, 0),
        symmetric=False,
        scale="scales",
        zero_shift=1 if kind == "gptq" else 0,
        shuffled=bool(given.get("desc_act")),
    )
    ignored = () if given.get("lm_head") else ("lm_head",)
    return Quantization("gptq", ((("Linear",), scheme),), ignored)
