"""The engine on a GPU: the CPU's tokens, whatever the backend, the loop and the graphs. Skipped where there is none."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams, UserError
from nanovllm.engine import scheduler, shared_prefix
from nanovllm.outputs import RequestOutput
from tests.models import make_model
from tests.preemption import NoReserve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RNG = random.Random(0)
SHARED = [RNG.randrange(257) for _ in range(50)]
PROMPTS = [SHARED * (i % 2) + [RNG.randrange(257) for _ in range(RNG.randrange(1, 90))] for i in range(37)]
PARAMS = [
    SamplingParams(temperature=0.8 * (i % 3 > 0), max_tokens=RNG.randrange(1, 60), seed=i, stop_token_ids=[7, 8, 9])
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def run(model: Path, turns: int = 1, **options: Any) -> list[list[RequestOutput]]:
    defaults = {"dtype": "float32", "max_model_len": 256, "kvcache_block_size": 16, "max_num_seqs": 24}
    llm = LLM(str(model), **(defaults | {"gpu_memory_utilization": 0.3} | options))
    outputs = [llm.generate(PROMPTS, PARAMS, use_tqdm=False) for _ in range(turns)]
    llm.exit()
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return tokens(run(model, device="cpu")[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"attention_backend": "torch"},
        {"kvcache_block_size": 256, "max_num_batched_tokens": 64},
        {"max_num_seqs": 3},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_tokens_equal_those_of_the_cpu(model: Path, expected: list[list[int]], options: dict[str, Any]) -> None:
    assert tokens(run(model, device="cuda", **options)[0]) == expected


# What each has that the others have not is switched on, and shorter than the prompts.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    "llama": {},
    "granite": {},
    "smollm3": {},
    "phi3": {"hidden_size": 64, "partial_rotary_factor": 0.75, "sliding_window": 33},
    "mistral": {"sliding_window": 24},
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "mixtral": {},
    "gemma2": {},
    "gemma3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_the_cpu(family: str, tmp_path: Path) -> None:
    path = make_model(tmp_path, family, **FAMILIES[family])
    assert tokens(run(path, device="cuda")[0]) == tokens(run(path, device="cpu")[0])


def test_tight_pool_and_cached_prefixes(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted sequences are computed again, and a second batch finds the first one's blocks."""
    monkeypatch.setattr(scheduler, "Demand", NoReserve)
    llm = LLM(str(model), dtype="float32", max_model_len=256, kvcache_block_size=16, num_kvcache_blocks=20)
    for _ in range(2):
        assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    stats = llm.stats()
    llm.exit()
    assert stats.preemptions > 0 and stats.cached_tokens > 0


def test_two_engines_share_the_gpu(model: Path, expected: list[list[int]]) -> None:
    """Each takes its own fraction, and gives it back."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "gpu_memory_utilization": 0.3}
    engines = [LLM(str(model), **options) for _ in range(2)]
    for llm in engines:
        assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    for llm in engines:
        llm.exit()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > free - (1 << 30)


def test_more_blocks_than_memory_are_refused(model: Path) -> None:
    with pytest.raises(UserError, match="num_kvcache_blocks=100000000"):
        LLM(str(model), num_kvcache_blocks=100_000_000)


def logprobs_of(output: RequestOutput) -> list[float]:
    """Of the prompt's tokens, or of labels, where they were asked for."""
    positions = output.get("prompt_logprobs") or []
    return [entry.logprob for position in positions for entry in (position or {}).values()] + [
        *(output.get("label_probs") or {}).values()
    ]


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=str)
def test_scores_and_constrained_rows_beside_decodes(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]
) -> None:
    """Rows that come while others decode, in padded graphs with chunks: scores, masks and tokens are those of the CPU."""
    model = make_model(tmp_path_factory.mktemp("models") / "chat", tokenizer=True)
    rng = random.Random(1)
    texts = [f"{'the quick brown fox ' * rng.randrange(4)}number {row}" for row in range(60)]
    kinds: list[dict[str, Any]] = [
        {"prompt_logprobs": 2, "max_tokens": 5},
        {"labels": ["yes", "no", "not sure"]},
        {"structured_outputs": {"regex": "[a-f]{3,20}-[0-9]{2}"}, "max_tokens": 40},
        {"structured_outputs": {"choice": ["the quick brown fox jumps over the lazy dog", "no"]}, "max_tokens": 60},
        {"max_tokens": 30},
    ]
    params = [
        SamplingParams(**{"temperature": 0.9 * (row % 2), "seed": row, **kinds[row % 5]}) for row in range(len(texts))
    ]
    found = []
    for device in ("cpu", "cuda"):
        llm = LLM(str(model), device=device, dtype="float32", max_num_seqs=9, max_model_len=256, **options)
        found.append(llm.generate(texts, params, use_tqdm=False))
        llm.exit()
    assert [output["error"] for output in found[1]] == [None] * len(texts)
    assert tokens(found[1]) == tokens(found[0])
    for expected, output in zip(*found, strict=True):
        assert logprobs_of(output) == pytest.approx(logprobs_of(expected), abs=1e-3)
        assert output.get("parsed") == expected.get("parsed") and output.get("label") == expected.get("label")


@pytest.mark.parametrize(("dtype", "mean", "part"), [("float32", 1e-3, 0.9), ("bfloat16", 0.15, 0.0)])
def test_a_cache_in_eight_bits(model: Path, dtype: str, mean: float, part: float) -> None:
    """Prefill, and decodes in graphs, from eight bits: what plain torch makes of the same cache, up to values that round otherwise."""
    scored = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0) for _ in PROMPTS]
    texts, scores = [], []
    for backend in ("torch", "triton"):
        options: dict[str, Any] = {"dtype": dtype, "kvcache_block_size": 16, "max_num_seqs": 24, "max_model_len": 256}
        llm = LLM(str(model), kv_cache_dtype="fp8", attention_backend=backend, gpu_memory_utilization=0.3, **options)
        texts.append(tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)))
        outputs = llm.generate(PROMPTS, scored, use_tqdm=False)
        scores.append(torch.tensor([*itertools.chain.from_iterable(map(logprobs_of, outputs))]))
        llm.exit()
    assert (scores[0] - scores[1]).abs().mean() < mean
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= part * len(PROMPTS)


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_seqs": 5}], ids=str)
def test_shared_prefixes(model: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One instruction, documents for some of the rows, in several levels; the plain path's tokens."""
    for name, value in (("LEAST_TOKENS", 16), ("LEAST_SAVED", 1), ("LEAST_SAVED_BYTES", 1), ("ENTRY_TOKENS", 0)):
        monkeypatch.setattr(shared_prefix, name, value)
    rng = random.Random(2)
    documents = [[rng.randrange(257) for _ in range(60)] for _ in range(4)]
    prompts = [
        SHARED + documents[rng.randrange(4)] + [rng.randrange(257) for _ in range(rng.randrange(1, 30))]
        for _ in PROMPTS
    ]
    found = []
    for shared in (False, True):
        settings: dict[str, Any] = {"max_num_seqs": 24, "kvcache_block_size": 16, "max_model_len": 256, **options}
        llm = LLM(str(model), device="cuda", dtype="float32", shared_prefix_attention=shared, **settings)
        found.append(tokens(llm.generate(prompts, PARAMS, use_tqdm=False)))
        assert (llm.sharing is not None) == shared
        llm.exit()
    assert found[0] == found[1]
