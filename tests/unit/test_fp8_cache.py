"""The engine with keys and values in eight bits, on the CPU; its kernels are in `test_kernels_attention.py` and `test_kernels_small.py`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, UserError
from nanovllm.config import EngineConfig
from nanovllm.engine import model_runner
from nanovllm.engine.model_runner import resolve_cache_dtype
from nanovllm.outputs import RequestOutput
from tests.models import TWO_RANKS, make_model

RNG = random.Random(0)
SHARED = [RNG.randrange(257) for _ in range(50)]
PROMPTS = [SHARED * (i % 2) + [RNG.randrange(257) for _ in range(RNG.randrange(2, 90))] for i in range(16)]
PARAMS = [SamplingParams(temperature=0.8 * (i % 2), max_tokens=20 + i, seed=i) for i in range(len(PROMPTS))]


def run(model: Path, turns: int = 1, params: Any = PARAMS, **options: Any) -> list[list[RequestOutput]]:
    defaults: dict[str, Any] = {"kv_cache_dtype": "fp8", "max_model_len": 256, "kvcache_block_size": 16}
    llm = LLM(str(model), **(defaults | options))
    outputs = [llm.generate(PROMPTS, params, use_tqdm=False) for _ in range(turns)]
    llm.exit()
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def prompt_logprobs(outputs: list[RequestOutput]) -> torch.Tensor:
    return torch.tensor(
        [
            position[token].logprob
            for prompt, output in zip(PROMPTS, outputs, strict=True)
            for token, position in zip(prompt[1:], (output["prompt_logprobs"] or [])[1:], strict=True)
            if position is not None
        ]
    )


def test_log_probabilities_are_near_those_of_the_full_cache(tmp_path: Path) -> None:
    """Some four times what a model in 16 bits loses, with windows and soft caps too: this family has both."""
    model = make_model(tmp_path, "gemma2")
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    exact, rounded, ours = (
        prompt_logprobs(run(model, params=params, kv_cache_dtype=kind, dtype=dtype, max_num_batched_tokens=64)[0])
        for kind, dtype in (("auto", "float32"), ("auto", "bfloat16"), ("fp8", "float32"))
    )
    assert len(exact) == sum(map(len, PROMPTS)) - len(PROMPTS)
    error, usual = (ours - exact).abs(), (rounded - exact).abs()
    assert usual.mean() < error.mean() < 6 * usual.mean()
    assert error.max() < 6 * usual.max()


def test_tokens_are_the_same_however_they_come_about(model_dir: Path) -> None:
    """From cached prefixes, in small chunks, with few sequences at a time, by two ranks with half of the heads each."""
    first, second = run(model_dir, turns=2)
    assert sum(output["num_cached_tokens"] for output in second) > 0
    assert tokens(second) == tokens(first)
    ways: tuple[dict[str, Any], ...] = (
        {"enable_prefix_caching": False, "max_num_batched_tokens": 40},
        {"max_num_seqs": 3, "async_scheduling": False},
        *([{"tensor_parallel_size": 2}] if TWO_RANKS else []),
    )
    for options in ways:
        assert tokens(run(model_dir, **options)[0]) == tokens(first)


def test_more_blocks_fit_the_same_memory(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 16 values takes 18 bytes, not 32."""
    monkeypatch.setattr(model_runner, "MAX_CPU_POOL_BYTES", 1 << 20)
    blocks = []
    for kind in ("auto", "fp8"):
        llm = LLM(str(model_dir), dtype="bfloat16", kv_cache_dtype=kind, kvcache_block_size=16)
        blocks.append(llm.executor.num_kvcache_blocks)
        for layer in llm.executor.runner.attention_layers:  # type: ignore[attr-defined]
            assert layer.scales is None or bool((layer.scales > 0).all()), "a warm-up reads slots that nobody wrote"
        llm.exit()
    heads = 2 * 2 * 2 * 16  # keys and values, layers, KV heads, tokens
    assert blocks == [(1 << 20) // (heads * 32), (1 << 20) // (heads * 18)]


def test_what_cannot_read_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="attention_backend='flash' does not read kv_cache_dtype='fp8'; use"):
        EngineConfig.create("m", kv_cache_dtype="fp8", attention_backend="flash")
    with pytest.raises(UserError, match="kv_cache_dtype='int4'"):
        EngineConfig.create("m", kv_cache_dtype="int4")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    config, dtype = EngineConfig.create("m", kv_cache_dtype="fp8"), torch.bfloat16
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if fits:
            assert resolve_cache_dtype(config, dtype, torch.device("cuda")) == torch.float8_e4m3fn
        else:
            with pytest.raises(UserError, match=r"8.9 or more and NVIDIA A100 has 8.0; use kv_cache_dtype=auto"):
                resolve_cache_dtype(config, dtype, torch.device("cuda"))
