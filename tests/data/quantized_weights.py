"""Writes quantized_weights.safetensors beside this file: small weights as compressed-tensors 0.20.1 stores them, each with what that
library reads of it as `expected`; AWQ's layout as its converter reads it. Needs that package, which the tests do not:
`python tests/data/quantized_weights.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 24, 32
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    ),
    "int8-channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4-group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}),
    "int4-group-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int8-group": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16}),
}
AWQ = {"bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}


def limits(weight: torch.Tensor, strategy: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest number of what shares a scale."""
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "group":
        groups = weight.view(ROWS, -1, group)
        return groups.amin(-1), groups.amax(-1)
    blocks = weight.new_zeros(32, 32)
    blocks[:ROWS] = weight
    blocks = blocks.view(2, 16, 2, 16)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def main() -> None:
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    compressors = {
        "pack-quantized": PackedQuantizationCompressor,
        "float-quantized": FloatQuantizationCompressor,
        "int-quantized": IntQuantizationCompressor,
    }
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, str] = {}
    for name, (layout, weights) in CASES.items():
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = torch.randn(ROWS, COLUMNS)
        scale, zero = calculate_qparams(*limits(weight, weights["strategy"], weights.get("group_size", 0)), args)
        state = {"weight": weight, "weight_scale": scale.float()}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        stored = compressors[layout].compress(state, scheme)
        expected = compressors[layout].decompress(stored, scheme)["weight"]
        tensors |= {f"{name}.{own}": tensor.contiguous() for own, tensor in stored.items()}
        tensors[f"{name}.expected"] = expected.float().contiguous()
        group = {"targets": ["Linear"], "weights": weights}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}
        configs[name] = json.dumps(config)

    words = (-(2**31), 2**31 - 1)
    tensors["awq.qweight"] = torch.randint(*words, (COLUMNS, ROWS // 8), dtype=torch.int32)
    tensors["awq.qzeros"] = torch.randint(*words, (COLUMNS // 8, ROWS // 8), dtype=torch.int32)
    tensors["awq.scales"] = torch.rand(COLUMNS // 8, ROWS).half()
    stored = AutoAWQConverter.from_autoawq_config(AWQ).process(
        {f"m.{own}": tensors[f"awq.{own}"].clone() for own in ("qweight", "qzeros", "scales")}
    )
    state = {name.removeprefix("m."): tensor for name, tensor in stored.items()}
    state["weight_scale"] = state["weight_scale"].float()
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=8, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors["awq.expected"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].float().contiguous()
    configs["awq"] = json.dumps({"quant_method": "awq", **AWQ})
    save_file(tensors, Path(__file__).with_suffix(".safetensors"), metadata=configs)


if __name__ == "__main__":
    main()
