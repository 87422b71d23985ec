"""The engine against its oracle: greedy token ids equal those of Hugging Face `generate` on the same weights in float32.

Every configuration runs through the paths where a slip would change tokens: prefix hits, preemption, chunked prefill, tensor
parallel. The oracle gets one prompt at a time, so it knows nothing of padding or batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanovllm import LLM, SamplingParams
from nanovllm.engine import scheduler
from nanovllm.kernels.triton_compat import HAS_TRITON
from nanovllm.layers.backends import triton_backend
from nanovllm.outputs import RequestOutput
from tests.models import make_model, needs_two_ranks
from tests.preemption import NoReserve

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


class Case(NamedTuple):
    family: str
    options: dict[str, Any]


CASES = {
    "qwen3-tied-odd": Case(
        "qwen3",
        {"hidden_size": 40, "head_dim": 16, "vocab_size": 131, "intermediate_size": 54, "tie_word_embeddings": True},
    ),
    "qwen3-group3-bias-bf16-v5": Case(
        "qwen3",
        {
            "hidden_size": 72,
            "num_attention_heads": 6,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "intermediate_size": 100,
            "form": "5.x",
            "dtype": "bfloat16",
        },
    ),
    "qwen3-mqa-yarn-sharded": Case(
        "qwen3",
        {"num_key_value_heads": 1, "head_dim": 24, "vocab_size": 131, "rope_scaling": YARN, "shards": 3},
    ),
    "qwen2-mha-tied": Case(
        "qwen2",
        {
            "hidden_size": 72,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 131,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-mqa-v5": Case(
        "qwen2",
        {"hidden_size": 40, "num_key_value_heads": 1, "vocab_size": 257, "form": "5.x", "rope_theta": 1000000.0},
    ),
    "qwen2-group3-yarn-sharded": Case(
        "qwen2", {"num_attention_heads": 6, "vocab_size": 263, "rope_scaling": YARN, "shards": 2}
    ),
    "llama-mha-linear": Case(
        "llama",
        # "type" is how configs older than transformers 4.43 name the kind of scaling.
        {
            "hidden_size": 40,
            "num_key_value_heads": 4,
            "vocab_size": 131,
            "rope_scaling": {"type": "linear", "factor": 2.5},
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama3-group4-head-dim-v5": Case(
        "llama",
        {
            "num_attention_heads": 8,
            "head_dim": 10,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "form": "5.x",
        },
    ),
    "llama-mqa-biases-yarn": Case(
        "llama",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": YARN,
            "vocab_size": 259,
            "intermediate_size": 70,
        },
    ),
    "granite-group2": Case("granite", {"vocab_size": 257, "rms_norm_eps": 1e-3}),
    "smollm3-nope-tied": Case(
        "smollm3",
        {"num_hidden_layers": 5, "no_rope_layers": None, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mistral-window-v5": Case(
        "mistral", {"sliding_window": 24, "head_dim": 16, "num_key_value_heads": 1, "form": "5.x"}
    ),
    "qwen3-layer-types": Case(
        "qwen3",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-moe-mqa": Case("qwen3_moe", {"num_key_value_heads": 1, "num_experts_per_tok": 3}),
    "qwen3-moe-some-dense-raw-weights": Case(
        "qwen3_moe",
        {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False, "vocab_size": 259, "shards": 2},
    ),
    "mixtral-window-v5": Case("mixtral", {"sliding_window": 30, "num_key_value_heads": 1, "form": "5.x"}),
    "gemma2-softcaps-mqa": Case("gemma2", {"num_key_value_heads": 1, "vocab_size": 263}),
    "gemma3-linear-mqa": Case(
        "gemma3", {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "vocab_size": 259}
    ),
    "gemma3-v5": Case("gemma3", {"form": "5.x", "final_logit_softcapping": 20.0}),
    "phi3-longrope-partial": Case(
        "phi3",
        {
            "num_key_value_heads": 1,
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 256,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.4, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            },
        },
    ),
}
# One a family, each with fewer KV heads than ranks or a vocabulary that two does not divide. The long ones differ from those of
# `llama`, `phi3`, `qwen3_moe` and `gemma2` in nothing that is sharded.
TP_CASES = (
    "qwen3-mqa-yarn-sharded",
    "qwen2-mqa-v5",
    "llama-mqa-biases-yarn",
    "phi3-longrope-partial",
    "qwen3-moe-some-dense-raw-weights",
    "gemma2-softcaps-mqa",
    pytest.param("mixtral-window-v5", marks=pytest.mark.long),
    pytest.param("gemma3-linear-mqa", marks=pytest.mark.long),
    pytest.param("granite-group2", marks=pytest.mark.long),
    pytest.param("smollm3-nope-tied", marks=pytest.mark.long),
    pytest.param("mistral-window-v5", marks=pytest.mark.long),
)


class Reference(NamedTuple):
    """A model on disk, prompts of mixed lengths and what the oracle says to them."""

    path: Path
    prompts: list[list[int]]
    params: list[SamplingParams]
    expected: list[list[int]]


def load_oracle(path: Path) -> PreTrainedModel:
    # Gemma 2 leaves out its soft caps where attention is any other than this.
    eager = {"attn_implementation": "eager"} if "Gemma2" in (path / "config.json").read_text() else {}
    return AutoModelForCausalLM.from_pretrained(path, **eager).float().eval()


def oracle_generate(oracle: PreTrainedModel, prompt: list[int], max_tokens: int, eos: Any = None) -> list[int]:
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def make_prompts(vocab_size: int) -> list[list[int]]:
    """1 to 70 tokens; some begin alike, one is another's beginning, two are the same."""
    rng = random.Random(vocab_size)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    shared = tokens(35)
    alone = [tokens(n) for n in (1, 2, 15, 16, 17)]
    return [*alone, [*shared, *tokens(35)], [*shared, *tokens(9)], shared[:32], [*shared, 0], [*shared, 0]]


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(request.param, tmp_path_factory.getbasetemp())


@cache
def make_reference(name: str, base: Path) -> Reference:
    case = CASES[name]
    path = make_model(base / name, case.family, **case.options)
    oracle = load_oracle(path)
    prompts = make_prompts(case.options.get("vocab_size", 257))
    limits = [24 if index % 3 == 0 else 14 for index in range(len(prompts))]
    expected = [oracle_generate(oracle, p, n) for p, n in zip(prompts, limits, strict=True)]
    # An oracle that repeats one token would agree with nearly any engine.
    assert len({token for row in expected for token in row}) > 40
    return Reference(path, prompts, [SamplingParams(temperature=0, max_tokens=n) for n in limits], expected)


def run(reference: Reference, llm: LLM) -> list[RequestOutput]:
    outputs = llm.generate(reference.prompts, reference.params, use_tqdm=False)
    assert [o["error"] for o in outputs] == [None] * len(outputs)
    assert [o["token_ids"] for o in outputs] == reference.expected
    assert {o["finish_reason"] for o in outputs} == {"length"}
    return outputs


def test_prefix_cache_on_and_off(reference: Reference) -> None:
    llm = LLM(str(reference.path), kvcache_block_size=16)
    cold = run(reference, llm)
    # Blocks are shared already in the step that computes them.
    assert [o["num_cached_tokens"] for o in cold] == [0, 0, 0, 0, 0, 0, 32, 16, 32, 32]
    warm = run(reference, llm)
    assert [o["num_cached_tokens"] for o in warm] == [0, 0, 0, 0, 16, 64, 32, 16, 32, 32]

    llm = LLM(str(reference.path), kvcache_block_size=16, enable_prefix_caching=False)
    for _ in range(2):
        assert not any(o["num_cached_tokens"] for o in run(reference, llm))


@pytest.mark.parametrize(("budget", "prefix_caching"), [(16, True), (64, False)])
def test_preemption(reference: Reference, budget: int, prefix_caching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that holds little more than the longest sequence, and no reserve that would keep preemption away."""
    monkeypatch.setattr(scheduler, "Demand", NoReserve)
    options = {"num_kvcache_blocks": 7, "enable_prefix_caching": prefix_caching, "max_num_batched_tokens": budget}
    llm = LLM(str(reference.path), kvcache_block_size=16, **options)
    run(reference, llm)
    assert llm.scheduler.num_preemptions > 0
    assert llm.block_manager.num_free_blocks == 7


def test_chunked_prefill(reference: Reference) -> None:
    """Seven tokens a step: every longer prompt is computed in chunks, beside decodes."""
    llm = LLM(str(reference.path), kvcache_block_size=16, max_num_batched_tokens=7)
    run(reference, llm)
    run(reference, llm)
    assert llm.steps > sum(map(len, reference.prompts)) // 14


@needs_two_ranks
@pytest.mark.parametrize("name", TP_CASES)
def test_two_ranks(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    reference = make_reference(name, tmp_path_factory.getbasetemp())
    options = {"kvcache_block_size": 16, "num_kvcache_blocks": 24, "max_num_batched_tokens": 48}
    llm = LLM(str(reference.path), tensor_parallel_size=2, **options)
    try:
        run(reference, llm)
        run(reference, llm)
    finally:
        llm.exit()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_windows_and_softcaps_by_the_kernels(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of two kinds in one engine: each has a split of its own. As compiled or interpreted, where few programs are quick."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton_backend, "decode_programs", lambda *_: 3)
    reference = make_reference("gemma2-softcaps-mqa", tmp_path_factory.getbasetemp())
    some = slice(3, 6)  # shorter than the window, and longer
    llm = LLM(str(reference.path), attention_backend="triton", kvcache_block_size=16, max_num_seqs=4, max_model_len=128)
    params = [SamplingParams(temperature=0, max_tokens=4) for _ in reference.params[some]]
    outputs = llm.generate(reference.prompts[some], params, use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == [row[:4] for row in reference.expected[some]]


@needs_two_ranks
def test_two_ranks_with_an_experts_half_each(tmp_path_factory: pytest.TempPathFactory) -> None:
    reference = make_reference("qwen3-moe-mqa", tmp_path_factory.getbasetemp())
    llm = LLM(str(reference.path), tensor_parallel_size=2, enable_expert_parallel=True, kvcache_block_size=16)
    try:
        run(reference, llm)
    finally:
        llm.exit()


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 1000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN | {"factor": 8.0}},
    "yarn-betas": {"rope_scaling": YARN | {"factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3}},
    "yarn-mscale": {"rope_scaling": YARN | {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False}},
}


@pytest.mark.parametrize("name", ROPES)
def test_long_positions(name: str, tmp_path: Path) -> None:
    """Hundreds of tokens past the original range of 64; the 4.x and 5.x forms of the config say the same."""
    for family in ("llama", "qwen3"):
        # So few layers and so long a context hide a wrong angle, unless the keys of far tokens weigh in: many prompts.
        options = ROPES[name] | {"head_dim": 32, "vocab_size": 131, "max_position_embeddings": 512}
        path = make_model(tmp_path / f"{family}-4", family, form="4.x", **options)
        prompts = [[random.Random(i).randrange(131) for _ in range(n)] for i, n in enumerate((60, 130, 310, 480))]
        oracle = load_oracle(path)
        expected = [oracle_generate(oracle, prompt, 16) for prompt in prompts]
        for form in ("4.x", "5.x"):
            if form == "5.x":
                path = make_model(tmp_path / f"{family}-5", family, form=form, **options)
            llm = LLM(str(path), kvcache_block_size=64)
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
            assert [o["token_ids"] for o in outputs] == expected, (family, form)


def test_yarn_stretches_the_longest_sequence(tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2", rope_scaling=YARN, max_position_embeddings=64)
    llm = LLM(str(path), kvcache_block_size=16)
    assert llm.max_model_len == 256
    prompt = [i % 250 for i in range(200)]
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert output["token_ids"] == oracle_generate(load_oracle(path), prompt, 20)


@pytest.fixture(scope="module")
def eos_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[int]]:
    """A model, prompts, and two token ids that the oracle generates early on for some of them."""
    path = make_model(tmp_path_factory.mktemp("eos"), "llama", eos_token_id=3)
    oracle = load_oracle(path)
    prompts = [[i, i + 1, i + 2] for i in range(0, 60, 6)]
    free = [oracle_generate(oracle, prompt, 12, eos=256) for prompt in prompts]
    return path, prompts, [free[0][4], free[1][7]]


def test_all_eos_ids_of_the_generation_config_stop(eos_model: tuple[Path, list[list[int]], list[int]]) -> None:
    path, prompts, eos_ids = eos_model
    (path / "generation_config.json").write_text(f'{{"eos_token_id": {eos_ids}, "bos_token_id": 1}}')
    oracle = load_oracle(path)
    assert oracle.generation_config.eos_token_id == eos_ids
    expected = [oracle_generate(oracle, prompt, 12, eos=eos_ids) for prompt in prompts]
    llm = LLM(str(path), kvcache_block_size=16)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == expected
    for output in outputs:
        stopped = output["token_ids"][-1] in eos_ids
        assert output["finish_reason"] == ("stop" if stopped else "length")
        assert output["num_generated_tokens"] == len(output["token_ids"])
    assert {token for o in outputs for token in o["token_ids"][-1:]} >= set(eos_ids)

    going_on = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert {o["finish_reason"] for o in going_on} == {"length"}
    for output, full in zip(outputs, going_on, strict=True):
        assert len(full["token_ids"]) == 12
        assert full["token_ids"][: len(output["token_ids"])] == output["token_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str, model_dir: Path) -> None:
    llm = LLM(str(model_dir), dtype=dtype, kvcache_block_size=16)
    prompts = make_prompts(257)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert all(len(o["token_ids"]) == 8 for o in outputs)
    full = LLM(str(model_dir), kvcache_block_size=16)
    exact = full.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    first_equal = sum(a["token_ids"][0] == b["token_ids"][0] for a, b in zip(outputs, exact, strict=True))
    assert first_equal >= len(prompts) - 2


@pytest.fixture(autouse=True)
def _inference_only() -> Iterator[None]:
    with torch.inference_mode():
        yield
