"""Checkpoints with quantised weights, as people publish them: read right, and refused by name where not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams, UserError
from nanovllm.models.quantization import WeightScheme, read_quantization
from nanovllm.utils.dequantize import AWQ_ORDER, read_numbers
from tests.models import TWO_RANKS, make_model

GOLDEN = Path(__file__).parent.parent / "data" / "quantized_weights.safetensors"
Tensors = dict[str, torch.Tensor]


def golden_cases() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        return sorted(file.metadata())


def scheme_of(config: dict[str, Any]) -> WeightScheme:
    quantization = read_quantization({"quantization_config": config}, Path("config.json"))
    assert quantization is not None
    scheme = quantization.scheme_of("model.layers.0.mlp.up_proj")
    assert scheme is not None
    return scheme


@pytest.mark.parametrize("case", golden_cases())
def test_weights_are_read_as_the_library_that_wrote_them_reads_them(case: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()[case])
        names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118 - no mapping
        tensors = {name.removeprefix(f"{case}."): file.get_tensor(name) for name in names}
    expected = tensors.pop("expected")
    scheme = scheme_of(config)
    shapes = scheme.shapes(*expected.shape)
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    assert tensors.keys() - shapes.keys() <= {*scheme.names}
    torch.testing.assert_close(
        read_numbers(scheme, tensors, expected.shape[1]).dequantize(), expected, rtol=1e-6, atol=1e-7
    )


# Writers of the other layouts: of a weight [N, K], the tensors to store and what they mean.


def fp8_block(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As Qwen3 and DeepSeek publish, in blocks of 16."""
    rows, columns = weight.shape
    blocks = torch.zeros(-(-rows // 16) * 16, -(-columns // 16) * 16)
    blocks[:rows, :columns] = weight
    scale = blocks.view(len(blocks) // 16, 16, -1, 16).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
    stored = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread


def fp8_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """With a scale for activations, which are not quantised here."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.3)}, stored.float() * scale


def int8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale.bfloat16()}, stored.float() * scale.bfloat16().float()


def pack(numbers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[R, C] numbers of four bits as [R, C / 8] words, number `order[j]` of each eight at bit 4 j."""
    words = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for place, number in enumerate(order):
        words |= numbers[:, number::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def grouped(weight: torch.Tensor, group: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Numbers [K, N] from 0 to 15, zero points and half-precision scales [groups, N], and what they mean [N, K]."""
    rows = weight.shape[0]
    least, most = torch.full((count, rows), 1e9), torch.full((count, rows), -1e9)
    index = group.unsqueeze(1).expand(-1, rows)
    least = least.scatter_reduce(0, index, weight.t(), "amin").clamp(max=0)
    most = most.scatter_reduce(0, index, weight.t(), "amax")
    scale = ((most - least) / 15).half()
    zero = (-least / scale.float()).round().clamp(0, 15)
    numbers = (weight.t() / scale.float()[group] + zero[group]).round().clamp(0, 15)
    return numbers, zero, scale, ((numbers - zero[group]) * scale.float()[group]).t()


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    columns = weight.shape[1]
    group = torch.arange(columns) // 16
    numbers, zero, scale, meant = grouped(weight, group, columns // 16)
    return {"qweight": pack(numbers, AWQ_ORDER), "qzeros": pack(zero, AWQ_ORDER), "scales": scale}, meant


def gptq(weight: torch.Tensor, shift: int = 1) -> tuple[Tensors, torch.Tensor]:
    """With columns in an order of their own (desc_act)."""
    columns, straight = weight.shape[1], tuple(range(8))
    group = (torch.arange(columns) // 16)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    numbers, zero, scale, meant = grouped(weight, group, columns // 16)
    qweight = pack(numbers.t(), straight).t().contiguous()
    qzeros = pack((zero - shift) % 16, straight)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scale, "g_idx": group.int()}, meant


def gptq_v2(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return gptq(weight, 0)


def compressed(weights: dict[str, Any], layout: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*layers.1.mlp.*"],
    }


FORMATS: dict[str, tuple[Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]], dict[str, Any]]] = {
    "fp8 blocks": (
        fp8_block,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [16, 16],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
        },
    ),
    "fp8 tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["down_proj"]}),
    "int8": (int8_channel, compressed({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized")),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 16,
            "zero_point": True,
            "version": "GEMM",
            "modules_to_not_convert": None,
        },
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}),
    "gptq v2": (
        gptq_v2,
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
}


def quantized(path: Path, name: str, family: str = "qwen3") -> tuple[Path, Path]:
    """Two directories: a tiny model in a format, and the same with what that means as plain weights."""
    write, config = FORMATS[name]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    sizes |= {"moe_intermediate_size": 32} if family == "qwen3_moe" else {}
    directories = [make_model(path / kind, family, **sizes) for kind in ("stored", "plain")]
    stored: Tensors = {}
    plain: Tensors = {}
    quantization = read_quantization({"quantization_config": config}, path)
    assert quantization is not None
    for full, tensor in load_file(directories[0] / "model.safetensors").items():
        layer, _, kind = full.rpartition(".")
        if (
            kind != "weight"
            or not layer.endswith(("_proj", ".w1", ".w2", ".w3"))
            or quantization.scheme_of(layer) is None
        ):
            stored[full] = plain[full] = tensor
            continue
        parts, meant = write(tensor)
        stored |= {f"{layer}.{own}": part for own, part in parts.items()}
        plain[full] = meant.contiguous()
        if name == "gptq":  # as its tool does
            stored[f"{layer}.bias"] = torch.zeros(len(tensor))
    assert len(stored) > len(plain)
    for directory, tensors in zip(directories, (stored, plain), strict=True):
        save_file(tensors, directory / "model.safetensors")
    file = directories[0] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return directories[0], directories[1]


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "qwen3") for name in FORMATS), ("fp8 blocks", "qwen3_moe"), ("awq", "mixtral")]
)
def test_a_quantized_model_is_the_model_its_weights_mean(name: str, family: str, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
    prompts = [[1, 2, 3, 4], [200, 7]]
    found = []
    stored, plain = quantized(tmp_path, name, family)
    for directory, ranks in ((plain, 1), (stored, 1), *([(stored, 2)] if name == "fp8 blocks" and TWO_RANKS else [])):
        llm = LLM(str(directory), kvcache_block_size=16, max_model_len=64, tensor_parallel_size=ranks)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.exit()
        assert [output["error"] for output in outputs] == [None, None]
        found.append(
            [
                (
                    output["token_ids"],
                    [
                        position[token].logprob
                        for position, token in zip(output["logprobs"] or [], output["token_ids"], strict=True)
                    ],
                )
                for output in outputs
            ]
        )
    for other in found[1:]:
        for (ids, logprobs), (expected_ids, expected) in zip(other, found[0], strict=True):
            assert ids == expected_ids
            assert logprobs == pytest.approx(expected, abs=1e-4)


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    stored, plain = quantized(tmp_path, "fp8 blocks")
    tensors = load_file(stored / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    for change, expected in (
        ({scale: None}, f"lacks the tensor {scale}"),
        ({scale: torch.ones(1, 1)}, rf"{scale} has shape \[1, 1\], config.json asks for \[6, 4\]"),
        ({"model.layers.0.mlp.up_proj.qzeros": torch.ones(1)}, r"holds the tensor model.layers.0.mlp.up_proj.qzeros"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, stored / "model.safetensors")
        with pytest.raises(UserError, match=expected):
            LLM(str(stored))
    # Plain weights under a config that says otherwise.
    (plain / "config.json").write_text((stored / "config.json").read_text())
    with pytest.raises(UserError, match="weight_scale_inv"):
        LLM(str(plain))
