"""Engines whose weights stay quantised on a GPU, against the CPU's, which are widened. Skipped where there is none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.quantize import quantize_rows, quantize_rows_torch
from nanovllm.kernels.scaled_linear import scaled_linear, scaled_linear_torch
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.quantized import QuantizedWeight
from nanovllm.models.quantization import WeightFormat
from tests.models import make_model
from tests.unit.test_quantized_layers import FORMATS, SIZES, store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RNG = random.Random(0)
# Short prompts and one whose products have more rows than the kernels for few take.
PROMPTS = [[RNG.randrange(257) for _ in range(length)] for length in (3, 40, 70, 300, 5)]


def logprobs(directory: Path, **options: Any) -> torch.Tensor:
    """Of all prompts' tokens, and of some generated after them in decode steps."""
    defaults = {"kvcache_block_size": 16, "max_model_len": 512, "gpu_memory_utilization": 0.3}
    llm = LLM(str(directory), **(defaults | options))
    params = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(PROMPTS)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    # Decodes of tokens that are the same whatever the weights say: one token may come.
    fixed = [SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[9], logprobs=0, ignore_eos=True)] * 5
    decoded = llm.generate(PROMPTS, fixed, use_tqdm=False)
    llm.exit()
    assert [output["error"] for output in [*outputs, *decoded]] == [None] * 10
    found = [p for output in outputs for p in (output["prompt_logprobs"] or []) if p]
    found += [p for output in decoded for p in (output["logprobs"] or []) if p]
    return torch.tensor([next(iter(position.values())).logprob for position in found])


def soften(directory: Path) -> None:
    """Smaller weights of the blocks, which exaggerate less what rounding does."""
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] = tensors[name] * 0.3
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_says_what_its_widened_weights_say(name: str, dtype: str, tmp_path: Path) -> None:
    write, config, form = FORMATS[name]
    store(tmp_path, write, config)
    expected = logprobs(tmp_path, device="cpu")
    found = logprobs(tmp_path, device="cuda", dtype=dtype)
    bound = 0.2 if form.activations else 0.1 if dtype == "bfloat16" else 1e-3
    assert (found - expected).abs().mean() < bound * expected.std()


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
def test_fp8_of_plain_weights(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path, family, **SIZES, **({"moe_intermediate_size": 256} if family == "qwen3_moe" else {}))
    soften(tmp_path)
    expected = logprobs(tmp_path, device="cpu", quantization="fp8")
    found = logprobs(tmp_path, device="cuda", dtype="bfloat16", quantization="fp8", **options)
    assert (found - expected).abs().mean() < 0.1 * expected.std()


def test_fp8_takes_half_the_memory(tmp_path: Path) -> None:
    """The largest layers come one after the other, so that both copies never exist."""
    make_model(tmp_path, **SIZES)
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    config = json.loads(file.read_text()) | sizes
    file.write_text(json.dumps(config))
    heads = 2 * (config["num_attention_heads"] + config["num_key_value_heads"]) * config["head_dim"]
    linear = 16 * 2048 * (3 * 8192 + heads)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 64,
        "num_kvcache_blocks": 8,
    }
    llm = LLM(str(tmp_path), quantization="fp8", max_num_seqs=2, max_num_batched_tokens=64, **options)
    peak = torch.cuda.max_memory_allocated() - before
    llm.exit()
    assert linear < peak < 1.5 * linear


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("rows", [1, 63, 65, 300, 1000])
def test_products_of_the_sizes_that_engines_have(dtype: torch.dtype, group: int, rows: int) -> None:
    """Whatever does them: cuBLAS, wide tiles and narrow ones, whole sums and partial ones, into a buffer or not."""
    n, k = 1536, 2048
    x, weight = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (rows, n))
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    numbers, scale = quantize_rows(weight, dtype, group)
    x8, x_scale = quantize_rows(x, dtype, group)
    again, again_scale = quantize_rows_torch(x, dtype, group)
    torch.testing.assert_close(x_scale, again_scale)
    # But for values half way between two.
    assert (x8.float() - again.float()).norm() < 2e-3 * again.float().norm()
    expected = scaled_linear_torch(x8, x_scale, numbers, scale, torch.float32, bias)
    for partial in (False, True):
        got = scaled_linear(x8, x_scale, numbers, scale, torch.bfloat16, bias, partial=partial).float()
        got = got.sum(0) if got.dim() == 3 else got
        assert (got - expected).norm() < 5e-3 * expected.norm()
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    assert scaled_linear(x8, x_scale, numbers, scale, torch.bfloat16, bias, out) is out
    assert (out.float() - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("rows", [1, 64, 65, 300, 512, 580, 1024])
def test_a_product_without_its_scales_is_the_product(rows: int) -> None:
    """Where cuBLAS is faster so: the norm that applies the scales gives the same."""
    weight = QuantizedWeight(4096, 2048, WeightFormat("fp8", 0, activations=True)).cuda()
    weight.put(0, torch.randn(4096, 2048, device="cuda"))
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    unscaled, norm = weight.unscaled(x), RMSNorm(4096, 1e-6).cuda().bfloat16()
    assert (unscaled is not None) == (rows in (65, 300, 580))
    if unscaled is not None:
        residual = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        wanted_both = norm.add_norm(weight.linear(x), residual)
        for got, wanted in zip(norm.add_norm(unscaled, residual), wanted_both, strict=True):
            assert (got.float() - wanted.float()).norm() < 5e-3 * wanted.float().norm()
