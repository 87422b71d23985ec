"""The engine on a GPU with the torch backend: same labels as on the CPU, pool sized from free memory. Skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [[3, 1, 4, 1, 5], [9] * 40, list(range(60)), [2, 7, 1, 8]]


def greedy(model: Path, **options: object) -> list[list[int]]:
    llm = LLM(str(model), dtype="float32", max_model_len=256, kvcache_block_size=16, **options)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    llm.exit()
    return [output["token_ids"] for output in outputs]


def test_tokens_equal_those_of_the_cpu(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert greedy(model, device="cuda", gpu_memory_utilization=0.3) == greedy(model, device="cpu")


def test_seeded_sampling_equals_that_of_the_cpu(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    params = [SamplingParams(temperature=0.8, max_tokens=40, seed=i) for i in range(len(PROMPTS))]
    tokens = []
    for device in ("cuda", "cpu"):
        llm = LLM(str(model), dtype="float32", device=device, max_model_len=256, gpu_memory_utilization=0.3)
        tokens.append([output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)])
        llm.exit()
    assert tokens[0] == tokens[1]
