"""Labels with confidence against brute force: every label appended to the prompt and scored by `transformers`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, AsyncLLM, RequestOutput, SamplingParams
from nanovllm.engine.labels import label_paths
from tests.models import make_model, needs_two_ranks

LABELS = {
    "one token": ["a", "b", "c", "d"],
    "several tokens": ["positive", "negative", "neutral"],
    "common beginnings": ["the fox", "the dog", "the lazy dog", "thing", "there"],
    "beginnings of others": ["ab", "abc", "abcd", "b"],
    "unicode": ["gut", "schön", "größer", "日本"],
    "many": [f"{a}{b}" for a in "abcdefg" for b in "hijklmn"],
}


@pytest.fixture(scope="module")
def llm(chat_model_dir: Path) -> LLM:
    return LLM(str(chat_model_dir), kvcache_block_size=16, max_num_batched_tokens=64)


@torch.inference_mode()
def brute_force(path: Path, prompt: list[int], labels: dict[str, list[int]]) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    scores = {}
    for text, ids in labels.items():
        logprobs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        scores[text] = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))
    return scores


def label_ids(llm: LLM, texts: Sequence[str], eos: bool) -> dict[str, list[int]]:
    assert llm.tokenizer is not None
    end = [llm.tokenizer.eos_token_id] if eos else []
    return {text: llm.tokenizer.encode(text, add_special_tokens=False) + end for text in texts}


def check(output: RequestOutput, scores: dict[str, float]) -> None:
    assert output["error"] is None
    best = max(scores, key=scores.__getitem__)
    total = math.fsum(math.exp(score) for score in scores.values())
    assert (output["label"], output["text"], output["finish_reason"]) == (best, best, "stop")
    assert output["label_logprob"] == pytest.approx(scores[best], abs=1e-4)
    assert output["label_probs"] is not None
    assert list(output["label_probs"]) == list(scores), "in the order they were given in"
    assert sum(output["label_probs"].values()) == pytest.approx(1)
    for text, score in scores.items():
        assert output["label_probs"][text] == pytest.approx(math.exp(score) / total, rel=1e-3)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_equal_brute_force(kind: str, llm: LLM, chat_model_dir: Path) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(257) for _ in range(length)] for length in (1, 20, 47, 48, 90)]
    outputs = llm.generate(prompts, SamplingParams(labels=LABELS[kind]), use_tqdm=False)
    ids = label_ids(llm, LABELS[kind], eos=kind == "beginnings of others")
    for prompt, output in zip(prompts, outputs, strict=True):
        check(output, brute_force(chat_model_dir, prompt, ids))
        assert output["num_input_tokens"] == len(prompt)
        assert output["token_ids"] == []
    assert llm.block_manager.num_free_blocks == len(llm.block_manager.blocks)


def test_labels_beside_other_requests(llm: LLM, chat_model_dir: Path) -> None:
    """In one batch with generated rows, and again from the cache, they are what they are alone."""
    prompt = list(range(60))
    params: list[Any] = [SamplingParams(labels=["yes", "no"]), SamplingParams(0.8, 12, seed=4, top_p=0.9)] * 3
    outputs = llm.generate([prompt] * 6, params, use_tqdm=False)
    scores = brute_force(chat_model_dir, prompt, label_ids(llm, ["yes", "no"], eos=False))
    for output in outputs[::2]:
        check(output, scores)
    assert len({tuple(output["token_ids"]) for output in outputs[1::2]}) == 1
    assert max(output["num_cached_tokens"] for output in outputs) == 48


@needs_two_ranks
def test_labels_of_two_ranks_and_through_the_async_engine(chat_model_dir: Path) -> None:
    engine = AsyncLLM(str(chat_model_dir), kvcache_block_size=16, tensor_parallel_size=2)
    try:
        prompt = list(range(30))
        futures = [engine.submit(prompt, SamplingParams(labels=LABELS["several tokens"])) for _ in range(3)]
        outputs = [future.result(60) for future in futures]
        ids = {
            text: engine.tokenizer.encode(text, add_special_tokens=False)  # type: ignore[union-attr]
            for text in LABELS["several tokens"]
        }
        for output in outputs:
            check(output, brute_force(chat_model_dir, prompt, ids))
    finally:
        engine.shutdown()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"labels": ["a"]}, "2 or more"),
        ({"labels": ["a", "a"]}, "none of them twice"),
        ({"labels": ["a", ""]}, "not empty"),
        ({"labels": ["a", "b"], "n": 3, "temperature": 1.0}, "n=3"),
        ({"labels": ["a", "b"], "logprobs": 1}, "do not go together"),
        ({"labels": "ab"}, "list of strings"),
    ],
)
def test_labels_that_cannot_be(params: dict[str, Any], words: str, llm: LLM) -> None:
    bad, good = llm.generate([[1, 2]] * 2, [SamplingParams(**params), SamplingParams(max_tokens=2)], use_tqdm=False)
    assert words in (bad["error"] or "")
    assert good["error"] is None


def test_labels_need_an_end_where_one_begins_another(tmp_path: Path) -> None:
    without_eos = LLM(str(make_model(tmp_path / "m", tokenizer=True, eos_token_id=None)), kvcache_block_size=16)
    (output,) = without_eos.generate([[1, 2]], SamplingParams(labels=["a", "ab"]), use_tqdm=False)
    assert "no end-of-sequence token" in (output["error"] or "")


def test_one_pass_for_labels_of_one_token() -> None:
    assert label_paths({"a": [1], "b": [2]}) == [((), {0: [1, 2]})]
    paths = label_paths({"a": [1, 2, 3], "b": [1, 2, 4], "c": [5, 6], "d": [5, 7]})
    # Two sequences beside the prompt, the longest with all that lies on its way, and no pair asked for twice.
    assert paths == [((5,), {1: [6, 7]}), ((1, 2), {0: [1, 5], 1: [2], 2: [3, 4]})]
