"""Weights that stay quantised: kernels against their references, as compiled or interpreted, and what checkpoints become."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams, UserError
from nanovllm.engine import model_runner
from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.layernorm import add_rms_norm_rounded
from nanovllm.kernels.packed_linear import (
    PackedTiles,
    pack_columns,
    packed_linear_torch,
    triton_packed_linear,
    unpack_weight,
    unpack_weight_torch,
)
from nanovllm.kernels.quantize import quantize_rows, quantize_rows_torch
from nanovllm.kernels.scaled_linear import ScaledTiles, scaled_linear_torch, scaled_tiles, triton_scaled_linear
from nanovllm.kernels.triton_compat import HAS_TRITON
from nanovllm.layers import layernorm, quantized
from nanovllm.layers.backends.torch_backend import TorchBackend
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ParallelLinear
from nanovllm.layers.lora import AdapterTokens, LoraWeights
from nanovllm.layers.moe import FusedExperts
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.quantized import Numbers, QuantizedWeight, quantize, some_columns
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import MLP, CausalLM
from nanovllm.models.quantization import ONLINE_FP8, Quantization, WeightFormat, read_quantization
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.dequantize import read_numbers
from nanovllm.utils.keep_quantized import keep_quantized, materialize
from nanovllm.utils.loader import init_dummy, load_model
from tests.models import make_model
from tests.unit.test_quantization import Tensors, awq, compressed, gptq, pack

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = torch.float8_e4m3fn


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize(("group", "gated"), [(0, False), (128, False), (0, True), (128, True)])
def test_quantize_rows(dtype: torch.dtype, group: int, gated: bool) -> None:
    whole = randn(5, 384 * 2)  # of which the first halves of rows lie apart
    whole[2] = 0
    x = whole if gated else whole[:, :384]
    numbers, scale = quantize_rows(x, dtype, group, gated=gated)
    expected, expected_scale = quantize_rows_torch(x, dtype, group, gated=gated)
    torch.testing.assert_close(scale, expected_scale)
    same = numbers.float() == expected.float()
    x = silu_and_mul_torch(x) if gated else x
    if DEVICE.type == "cpu":  # the interpreter forgets the carry where a rounded number reaches the next power of two
        same |= expected.float().abs().log2() % 1 == 0
    assert same.all()
    meant = expected.float() * expected_scale.t().repeat_interleave(group or 384, 1)
    torch.testing.assert_close(
        meant, x, atol=0.02 if dtype == torch.int8 else 1e-3, rtol=0 if dtype == torch.int8 else 0.07
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("tiles", [ScaledTiles(64, 64, 1, 2, 4), ScaledTiles(64, 32, 2, 2, 4)])
def test_scaled_linear(dtype: torch.dtype, group: int, tiles: ScaledTiles) -> None:
    rows, n, k = 69, 160, 512
    x, x_scale = quantize_rows_torch(randn(rows, k), dtype, group)
    weight, scale = quantize_rows_torch(randn(n, k, seed=1), dtype, group)
    bias, out = randn(n), None if tiles.splits > 1 else randn(rows, n + 7)[:, :n]
    got = triton_scaled_linear(x, x_scale, weight, scale, torch.float32, tiles, bias, out)
    assert got.shape == ((2, rows, n) if tiles.splits > 1 else (rows, n))
    assert out is None or got is out
    expected = scaled_linear_torch(x, x_scale, weight, scale, torch.float32, bias)
    torch.testing.assert_close(got if out is not None else got.sum(0), expected, atol=1e-3, rtol=1e-4)


def test_tiles_cut_a_product_evenly() -> None:
    for rows in (1, 64, 65, 200, 257, 5000):
        for n, k in ((32, 128), (6144, 4096), (4096, 14336), (28672, 4096)):
            for grouped in (False, True):
                tiles = scaled_tiles(rows, n, k, 132, grouped=grouped, partial=True)
                assert k % (128 * tiles.splits) == 0
                assert tiles.splits == 1 or rows <= 256


@needs_triton
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("group", "zeros", "splits"), [(32, True, 1), (128, False, 2), (256, True, 2)])
def test_packed_linear(kind: str, group: int, zeros: bool, splits: int) -> None:
    rows, n, k = 21, 96, 256
    generator = torch.Generator().manual_seed(0)
    if kind == "int4":
        numbers = pack_columns(torch.randint(0, 16, (n, k), generator=generator))
    else:
        numbers = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8 if kind == "int8" else FP8)
    zero = torch.randint(0, 16, (k // group, n), generator=generator).short().to(DEVICE) if zeros else None
    numbers, scale, bias, x = numbers.to(DEVICE), randn(k // group, n).abs(), randn(n), randn(rows, k)
    meant = unpack_weight_torch(numbers, scale, zero, torch.float32)
    assert torch.equal(unpack_weight(numbers, scale, zero, torch.float32), meant)
    got = triton_packed_linear(x, numbers, scale, zero, PackedTiles(16, 64, 32, splits, 2, 4), bias)
    expected = packed_linear_torch(x, numbers, scale, zero, bias)
    torch.testing.assert_close(got if splits == 1 else got.sum(0), expected, atol=1e-2, rtol=1e-4)


# Writers of checkpoints whose shapes have kernels: of a weight [N, K], the tensors to store and what they mean.


def fp8_block(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """In blocks of 128 rows, which a fused matrix or a rank may end within."""
    rows, columns = weight.shape
    blocks = torch.zeros(-(-rows // 128) * 128, columns)
    blocks[:rows] = weight
    scale = blocks.view(len(blocks) // 128, 128, -1, 128).abs().amax((1, 3)) / 448
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    stored = (weight / spread).to(FP8)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread


def fp8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / scale).to(FP8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def fp8_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored = (weight * (448 / weight.abs().max())).to(FP8)
    scale = weight.abs().max() / 448
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def int8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def int4_group(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As compressed-tensors packs them, without zero points."""
    scale = weight.view(len(weight), -1, 64).abs().amax(-1) / 7
    spread = scale.repeat_interleave(64, 1)
    numbers = (weight / spread).round().clamp(-8, 7)
    words = pack(numbers + 8, tuple(range(8)))
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, numbers * spread


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
CHANNEL = {"num_bits": 8, "strategy": "channel"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
FORMATS: dict[str, tuple[Writer, dict[str, Any], WeightFormat]] = {
    "fp8 block": (
        fp8_block, {"quant_method": "fp8", "weight_block_size": [128, 128]}, WeightFormat("fp8", 128, activations=True)
    ),
    "fp8 channel": (
        fp8_channel, compressed(CHANNEL | {"type": "float"}, "float-quantized"), WeightFormat("fp8", activations=True)
    ),
    "fp8 tensor": (fp8_tensor, {"quant_method": "fp8"}, WeightFormat("fp8", activations=True)),
    "int8 channel": (
        int8_channel, compressed(CHANNEL | {"type": "int"}, "int-quantized"), WeightFormat("int8", activations=True)
    ),
    "int4 group": (
        int4_group,
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"0": {"weights": INT4}},
            "ignore": ["lm_head"],
        },
        WeightFormat("int4", 64),
    ),
}  # fmt: skip


def plain_model(directory: Path, tp: TensorParallel | None = None, parallel: bool = False) -> CausalLM:
    config = ModelConfig.from_dir(directory, ARCHITECTURES)
    if config.moe is not None:
        config = replace(config, moe=config.moe._replace(parallel=parallel))
    return ARCHITECTURES[config.architecture].load()(config, tp or TensorParallel(), TorchBackend(1, 1, 1), 64)


def kept(
    directory: Path, quantization: Quantization, tp: TensorParallel | None = None, parallel: bool = False
) -> CausalLM:
    with torch.device("meta"):
        model = plain_model(directory, tp, parallel)
        keep_quantized(model, quantization)
    materialize(model, DEVICE)
    return model.to(DEVICE)


def quantized_layers(model: CausalLM) -> dict[str, ParallelLinear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParallelLinear) and module.quantized
    }


SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8, "num_hidden_layers": 1}


def store(path: Path, write: Writer, config: dict[str, Any], family: str = "qwen3") -> Path:
    """A tiny model in a format."""
    make_model(path, family, **SIZES, **({"moe_intermediate_size": 256} if family == "qwen3_moe" else {}))
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    quantization = read_quantization({"quantization_config": config}, file)
    assert quantization is not None
    stored: Tensors = {}
    for full, tensor in load_file(path / "model.safetensors").items():
        layer, _, kind = full.rpartition(".")
        if kind == "weight" and layer.endswith("_proj") and quantization.scheme_of(layer):
            stored |= {f"{layer}.{own}": part.contiguous() for own, part in write(tensor)[0].items()}
        else:
            stored[full] = tensor
    save_file(stored, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_kept_weights_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """On one rank and on each of two, whose borders lie where they may."""
    write, config, form = FORMATS[name]
    store(tmp_path, write, config)
    quantization = read_quantization({"quantization_config": config}, tmp_path)
    assert quantization is not None
    for size in (1, 2):
        for rank in range(size):
            plain, model = (
                plain_model(tmp_path, TensorParallel(rank, size)),
                kept(tmp_path, quantization, TensorParallel(rank, size)),
            )
            for loaded in (plain, model):
                load_model(loaded, tmp_path, quantization)
            layers = quantized_layers(model)
            assert len(layers) == 4
            for layer, module in layers.items():
                assert module.quantized is not None
                # A rank may have one group a row.
                assert module.quantized.form == form._replace(
                    group=form.group if module.in_features > form.group else 0
                )
                torch.testing.assert_close(module.quantized.dequantize(), plain.get_submodule(layer).weight.to(DEVICE))
                # And a product with it, to what rounded activations leave of it.
                x = randn(9, module.in_features)
                got, expected = module.product(x, None), x @ module.quantized.dequantize().t()
                assert (got - expected).norm() < (0.05 if form.activations else 1e-4) * expected.norm()


@pytest.mark.parametrize("name", ["fp8 block", "int8 channel"])
def test_kept_experts_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """Experts whose features two ranks share, and whole ones."""
    write, config, _ = FORMATS[name]
    store(tmp_path, write, config, "qwen3_moe")
    quantization = read_quantization({"quantization_config": config}, tmp_path)
    assert quantization is not None
    for tp in (TensorParallel(), TensorParallel(1, 2)):
        for parallel in (False, True):
            plain, model = plain_model(tmp_path, tp, parallel), kept(tmp_path, quantization, tp, parallel)
            for loaded in (plain, model):
                load_model(loaded, tmp_path, quantization)
            experts, expected = (
                next(m for m in one.modules() if isinstance(m, FusedExperts)) for one in (model, plain)
            )
            assert experts.quantized is not None
            for own, weight in experts.quantized.items():
                assert isinstance(weight, QuantizedWeight)
                torch.testing.assert_close(weight.dequantize().cpu(), getattr(expected, own).flatten(0, 1))
            hidden, ids = randn(5, 256), torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 0]], dtype=torch.int32)
            weights = torch.ones(5, 2)
            got = experts(hidden, ids.to(DEVICE), weights.to(DEVICE), None).cpu()
            exact = expected(hidden.cpu(), ids, weights, None)
            assert (got - exact).norm() < 0.08 * exact.norm()


@pytest.mark.parametrize("write", [awq, gptq])
def test_packed_layouts_become_one(write: Writer) -> None:
    """AWQ's and GPTQ's groups of 16 have no kernel; what is kept of them is the same with any."""
    weight = randn(64, 256).cpu()
    tensors, meant = write(weight)
    scheme_config = {"quant_method": "awq", "group_size": 16} if write is awq else GPTQ
    quantization = read_quantization({"quantization_config": scheme_config}, Path("config.json"))
    assert quantization is not None
    scheme = quantization.scheme_of("up_proj")
    assert scheme is not None and scheme.kept(64, 256) is None
    numbers = read_numbers(scheme, tensors, 256)
    torch.testing.assert_close(numbers.dequantize(), meant)


def test_fp8_is_made_of_plain_weights(tmp_path: Path) -> None:
    """What a GPU keeps and what a CPU widens again are the same weights; random ones too; other parameters stay."""
    make_model(tmp_path, **SIZES)
    rounded, plain, model = plain_model(tmp_path), plain_model(tmp_path), kept(tmp_path, ONLINE_FP8)
    for loaded, online in ((plain, None), (rounded, ONLINE_FP8), (model, ONLINE_FP8)):
        load_model(loaded, tmp_path, None, online)
    for layer, module in quantized_layers(model).items():
        assert module.quantized is not None and module.quantized.numbers.dtype == FP8
        exact, close = plain.get_submodule(layer).weight, rounded.get_submodule(layer).weight
        assert 0 < (close - exact).norm() < 0.04 * exact.norm()
        torch.testing.assert_close(module.quantized.dequantize().cpu(), close)
    assert torch.equal(model.lm_head.weight.cpu(), plain.lm_head.weight)
    for loaded in (plain, model):
        init_dummy(loaded)
    for layer, module in quantized_layers(model).items():
        assert module.quantized is not None
        exact = plain.get_submodule(layer).weight
        if DEVICE.type == "cpu":  # random numbers of a GPU are others
            assert (module.quantized.dequantize() - exact).norm() < 0.04 * exact.norm()


def logprobs(directory: Path, **options: Any) -> list[float]:
    llm = LLM(str(directory), kvcache_block_size=16, max_model_len=64, **options)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([list(range(3, 40))], params, use_tqdm=False)
    llm.exit()
    assert output["error"] is None
    return [next(iter(position.values())).logprob for position in output["prompt_logprobs"] or [] if position]


def test_an_engine_in_fp8_says_nearly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, **SIZES)
    plain, rounded = logprobs(tmp_path), logprobs(tmp_path, quantization="fp8")
    monkeypatch.setattr(model_runner, "can_keep_quantized", lambda device: True)
    held = logprobs(tmp_path, quantization="fp8")
    assert len(plain) == 36
    for found in (rounded, held):
        errors = torch.tensor(found) - torch.tensor(plain)
        assert 0 < errors.abs().mean() < 0.15 * torch.tensor(plain).std()  # such models exaggerate


@needs_triton
def test_norms_round_what_products_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one launch where there are kernels: the same numbers as in two."""
    make_model(tmp_path, **SIZES)
    monkeypatch.setattr(model_runner, "can_keep_quantized", lambda device: True)
    # Kernels for the norms and what rounds rows, for nothing else.
    monkeypatch.setattr(layernorm, "use_triton", lambda x: x.dim() == 2)
    monkeypatch.setattr(quantized, "use_triton", lambda x: x.dtype == torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(RMSNorm, "add_norm_rounded", lambda self, x, residual, form: self.add_norm(x, residual))
        apart = logprobs(tmp_path, quantization="fp8")
    rounded: list[torch.Size] = []

    def note(x: torch.Tensor, *others: Any) -> Any:
        rounded.append(x.shape)
        return add_rms_norm_rounded(x, *others)

    monkeypatch.setattr(layernorm, "add_rms_norm_rounded", note)
    together = logprobs(tmp_path, quantization="fp8")
    assert set(rounded) == {(37, 256)}  # before the attention's product and the feed-forward's
    assert len(rounded) % 2 == 0
    assert together == apart


def test_adapters_are_added_to_quantized_products(tmp_path: Path) -> None:
    """An adapter takes activations as they are, so nothing rounds them before; a step without adapters rounds them on the way."""
    make_model(tmp_path, **SIZES)
    model = kept(tmp_path, ONLINE_FP8)
    load_model(model, tmp_path, None, ONLINE_FP8)
    mlp = next(module for module in model.modules() if isinstance(module, MLP))
    assert mlp.down_proj.quantized is not None
    hidden, tokens = randn(6, 256), AdapterTokens(1)
    plain = mlp(hidden)
    inner = mlp.gate_up_proj(hidden)
    torch.testing.assert_close(plain, mlp.down_proj(inner))
    a, b = randn(1, 16, 512, seed=1), randn(1, 256, 16, seed=2)
    mlp.down_proj.lora = LoraWeights(a, b, [0, 256], tokens)
    torch.testing.assert_close(mlp(hidden), plain)
    tokens.assign(torch.zeros(6, dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(mlp(hidden), plain + inner @ a[0].t() @ b[0].t(), rtol=1e-3, atol=1e-2)


def test_what_is_quantized_otherwise_cannot_become_fp8(tmp_path: Path) -> None:
    write, config, _ = FORMATS["int4 group"]
    store(tmp_path, write, config)
    with pytest.raises(UserError, match=r"quantized already \(compressed-tensors\).*leave the option out"):
        LLM(str(tmp_path), quantization="fp8")


def test_quantize_leaves_numbers_where_they_are() -> None:
    weight = randn(32, 256)
    for kind, largest in (("fp8", 448), ("int8", 127), ("int4", 7)):
        for group in (0, 64):
            numbers = quantize(weight, WeightFormat(kind, group))  # type: ignore[arg-type]
            assert numbers.values.float().abs().amax() == largest
            again = quantize(numbers.dequantize(), WeightFormat(kind, group))  # type: ignore[arg-type]
            torch.testing.assert_close(again.dequantize(), numbers.dequantize())


def test_activations_are_rounded_where_the_checkpoint_means_it() -> None:
    """Tools write weights of 8 bits for activations of 8 bits, and for activations that stay as they are."""
    config = FORMATS["int8 channel"][1]
    for activations in (True, False):
        group = config["config_groups"]["group_0"]
        group = group if activations else {name: value for name, value in group.items() if name != "input_activations"}
        quantization = read_quantization({"quantization_config": config | {"config_groups": {"0": group}}}, Path("c"))
        assert quantization is not None
        scheme = quantization.scheme_of("up_proj")
        assert scheme is not None and scheme.kept(64, 256) == WeightFormat("int8", activations=activations)


def test_columns_of_grouped_numbers() -> None:
    whole = quantize(randn(32, 256), WeightFormat("int4", 64))
    part = some_columns(whole, slice(128, 256))
    assert isinstance(part, Numbers)
    torch.testing.assert_close(part.dequantize(), whole.dequantize()[:, 128:])
