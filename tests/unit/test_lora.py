"""Low-rank adapters: each row's own, several in one batch, as if their weights had been merged into the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams, UserError
from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.lora import (
    LowRank,
    column_tiles,
    group_adapters,
    lora_add,
    lora_add_torch,
    part_columns,
    shrink,
)
from nanovllm.kernels.skinny_linear import SkinnyTiles, skinny_linear, skinny_linear_torch
from nanovllm.kernels.triton_compat import HAS_TRITON
from tests.models import make_model, needs_two_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = list(range(5, 45))
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def write_adapter(path: Path, model: Path, seed: int, layers: str = "", **config: Any) -> Path:
    """A PEFT adapter for the layers whose names contain `layers`, strong enough to change what is generated."""
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 20, "bias": "none", "target_modules": ["q_proj"], **config}
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj") and layers in layer:
            rank = settings["r"]
            a, b = (
                torch.randn(shape, generator=generator) / 7
                for shape in ((rank, weight.shape[1]), (weight.shape[0], rank))
            )
            tensors |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def merged(path: Path, model: Path, adapter: Path) -> Path:
    """The model with an adapter added to its weights."""
    path.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    matrices = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        a, b = (matrices.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{m}.weight") for m in "AB")
        if a is not None and b is not None:
            weights[name] = weights[name] + scaling * b @ a
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text((model / "config.json").read_text())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, two adapters for it (one of some layers only), and the models they make of it."""
    root = tmp_path_factory.mktemp("lora")
    base = make_model(root / "base", "qwen3", num_hidden_layers=2)
    first = write_adapter(root / "first", base, 1, use_rslora=True)
    second = write_adapter(root / "second", base, 2, "layers.1.mlp", r=17)
    return {
        "base": base,
        "first": first,
        "second": second,
        "merged first": merged(root / "merged_first", base, first),
        "merged second": merged(root / "merged_second", base, second),
    }


def generate(model: Path, adapters: list[str | None], **options: Any) -> list[dict[str, Any]]:
    llm = LLM(str(model), kvcache_block_size=16, max_model_len=128, **options)
    params = [dataclasses.replace(PARAMS, lora_adapter=name) for name in adapters]
    outputs = llm.generate([PROMPT] * len(adapters), params, use_tqdm=False)
    llm.exit()
    return [dict(output) for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"tensor_parallel_size": 2}, marks=needs_two_ranks),
        {"max_num_seqs": 2, "max_num_batched_tokens": 16},
    ],
    ids=["one", "ranks", "chunks"],
)
def test_each_row_has_its_own_model(models: dict[str, Path], options: dict[str, Any]) -> None:
    expected = {
        name: generate(models[model], [None])[0]["token_ids"]
        for name, model in ((None, "base"), ("first", "merged first"), ("second", "merged second"))
    }
    assert len({tuple(ids) for ids in expected.values()}) == 3, "the adapters change nothing"
    rows: list[str | None] = ["first", None, "second", "second", None, "first", "first"]
    adapters = {name: str(models[name]) for name in ("second", "first")}
    outputs = generate(models["base"], rows, lora_adapters=adapters, **options)
    for name, output in zip(rows, outputs, strict=True):
        assert output["error"] is None
        assert output["token_ids"] == expected[name], name
    if not options:
        # Prompts are the same: what one adapter computed is for rows with that one.
        again = generate(models["base"], ["first"], lora_adapters=adapters, enable_prefix_caching=False)
        assert again[0]["token_ids"] == expected["first"]
        assert [output["num_cached_tokens"] for output in outputs] == [0, 0, 0, 32, 32, 32, 32]


def test_a_wrong_name_is_the_rows_own_error(models: dict[str, Path]) -> None:
    rows: list[Any] = ["third", None, 7]
    outputs = generate(models["base"], rows, lora_adapters={"first": str(models["first"])})
    assert "lora_adapter='third'" in outputs[0]["error"] and "'first'" in outputs[0]["error"]
    assert outputs[1]["error"] is None
    assert "lora_adapter=7" in outputs[2]["error"]
    assert "(none)" in generate(models["base"], ["first"])[0]["error"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": 0}, "rank 0"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"r": 4}, r"has shape \[5, 88\], the model asks for \[4, 88\]"),
        ("adapter_config.json", "lacks adapter_config.json"),
        ("adapter_model.safetensors", "lacks adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any] | str, expected: str
) -> None:
    path = write_adapter(tmp_path / "adapter", models["base"], 3)
    if isinstance(change, str):
        (path / change).unlink()
    else:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=expected) as caught:
        LLM(str(models["base"]), lora_adapters={"mine": str(path)})
    assert "'mine'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_of_no_layer_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", models["base"], 3)
    tensors = load_file(path / "adapter_model.safetensors")
    head = "base_model.model.lm_head.lora_A.weight"
    save_file({**tensors, head: torch.zeros(5, 48)}, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"holds the tensor {head}"):
        LLM(str(models["base"]), lora_adapters={"mine": str(path)})
    first = next(name for name in sorted(tensors) if "lora_A" in name)
    del tensors[first]
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lacks lora_A of"):
        LLM(str(models["base"]), lora_adapters={"mine": str(path)})


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("tokens", "features", "starts", "rank", "count"),
    [
        (1, 48, [0, 20], 16, 1),
        (37, 130, [0, 70, 90, 133], 16, 3),
        (20, 1100, [0, 64], 32, 4),
        (16, 64, [0, 64, 128], 16, 2),
    ],
)
def test_the_kernel_equals_its_reference(tokens: int, features: int, starts: list[int], rank: int, count: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, out = randn(tokens, features), randn(tokens, starts[-1])
    a, b = randn(count, (len(starts) - 1) * rank, features), randn(count, starts[-1], rank)
    for adapters in (torch.randint(-1, count, (tokens,), generator=generator), torch.full((tokens,), -1)):
        index = adapters.int().to(DEVICE)
        expected = lora_add_torch(x, out.clone(), a, b, index, starts)
        found = lora_add(x, out.clone(), a, b, group_adapters(index, count), column_tiles(starts, index.device))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(found[index < 0], out[index < 0])


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("tokens", "features", "starts", "rank", "count", "splits", "gated"),
    [
        (70, 128, [0, 64, 96, 160], 16, 3, 1, False),
        (5, 1100, [0, 64], 32, 5, 1, False),  # the low rank in parts, more columns than are taken at a time
        (33, 128, [0, 64], 16, 2, 2, False),
        (20, 64, [0, 64, 128], 16, 8, 1, True),
    ],
)
def test_a_product_can_end_in_the_adapters(
    tokens: int, features: int, starts: list[int], rank: int, count: int, splits: int, gated: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    features = -(-features // 64) * 64
    x, weight, bias = randn(tokens, features), randn(starts[-1], features) / features**0.5, randn(starts[-1])
    a, b = randn(count, (len(starts) - 1) * rank, features) / features**0.5, randn(count, starts[-1], rank)
    index = torch.randint(-1, count, (tokens,), generator=generator).int().to(DEVICE)
    groups = group_adapters(index, count)
    torch.zeros(1, device=DEVICE)  # in a model, too, something is launched between
    low = shrink(x, a, rank, groups, x_is_old=False)
    low[:, index < 0] = float("nan")
    added = LowRank(low, b, index, part_columns(starts, index.device))
    tiles = SkinnyTiles(32, 32, splits, 2, 4)
    found = skinny_linear(x, weight, tiles, bias, gated=gated, low_rank=added)
    torch.testing.assert_close(
        found, skinny_linear_torch(x, weight, tiles, bias, gated=gated, low_rank=added), rtol=1e-4, atol=1e-4
    )
    whole = lora_add_torch(x, torch.nn.functional.linear(x, weight, bias), a, b, index, starts)
    if gated:
        whole = silu_and_mul_torch(whole)
    torch.testing.assert_close(found.sum(0) if splits > 1 else found, whole, rtol=1e-4, atol=1e-3)
