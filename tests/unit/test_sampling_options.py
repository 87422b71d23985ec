"""Every sampling option against `transformers`: its model, its logits processors and warpers, one token at a time.

The reference recomputes the whole sequence for every token and draws with the engine's own noise (whose distribution is tested in
`test_engine_sampling.py`), so sampled tokens must be equal too, whatever the engine's batch, chunks, overlap or ranks.
"""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import logits_process as hf

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine import scheduler
from nanovllm.kernels.filter_logits import filter_logits, filter_logits_torch
from nanovllm.kernels.sampling import gumbel_noise
from nanovllm.kernels.triton_compat import HAS_TRITON
from tests.models import TWO_RANKS
from tests.preemption import NoReserve

NUM_TOKENS = 12


@cache
def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def oracle_logprobs(path: Path, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), V] log-probabilities of what follows each token."""
    return oracle(path)(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def processors(params: SamplingParams, prompt_len: int, vocab_size: int, eos: list[int]) -> hf.LogitsProcessorList:
    """What `transformers` calls these options, in the engine's order."""
    found = hf.LogitsProcessorList()
    if params.allowed_token_ids is not None:
        found.append(hf.SuppressTokensLogitsProcessor(sorted({*range(vocab_size)} - {*params.allowed_token_ids})))
    if params.min_tokens:
        stops = [*eos, *(params.stop_token_ids or ())]
        found.append(hf.MinNewTokensLengthLogitsProcessor(prompt_len, params.min_tokens, stops))
    if params.logit_bias:
        found.append(hf.SequenceBiasLogitsProcessor({(int(t),): float(b) for t, b in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        found.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    return found


def warpers(params: SamplingParams) -> hf.LogitsProcessorList:
    found = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(params.temperature)])
    if params.min_p > 0:
        found.append(hf.MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        found.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        found.append(hf.TopPLogitsWarper(params.top_p))
    return found


@torch.inference_mode()
def reference(path: Path, prompt: list[int], params: SamplingParams, bad: list[list[int]] = ()) -> list[int]:  # type: ignore[assignment]
    """The tokens that should come out. `bad`: the ids of `params.bad_words`."""
    model, ids = oracle(path), list(prompt)
    eos = [model.config.eos_token_id] if model.config.eos_token_id is not None else []
    for step in range(params.max_tokens):
        scores = model(torch.tensor([ids])).logits[:, -1].float()
        made = torch.tensor([ids[len(prompt) :]], dtype=torch.int64)
        if bad:  # of the output alone: HF's looks at the prompt too
            # Some releases pass over words that are longer than what there is.
            padding = torch.full((1, max(map(len, bad))), -1)
            scores = hf.NoBadWordsLogitsProcessor(bad)(torch.cat((padding, made), dim=1), scores)
        scores = processors(params, len(prompt), scores.shape[1], eos)(torch.tensor([ids]), scores)
        counts = torch.bincount(made[0], minlength=scores.shape[1])
        scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if params.temperature > 0:
            scores = warpers(params)(torch.tensor([ids]), scores)
            seeds, steps = torch.tensor([params.seed]), torch.tensor([step])
            scores = scores + gumbel_noise(seeds, steps, scores.shape[1])
        token = int(scores.argmax())
        ids.append(token)
        if (token in eos and not params.ignore_eos) or token in (params.stop_token_ids or ()):
            break
    return ids[len(prompt) :]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 3},
    "top_k=1": {"top_k": 1},
    "top_p": {"top_p": 0.6},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "all filters": {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.7},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below 1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 2.0},
    "negative penalties": {"frequency_penalty": -2.0, "presence_penalty": -0.5},
    "all penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.7, "presence_penalty": 0.4, "top_p": 0.9},
    "logit_bias": {"logit_bias": {7: 6.0, "9": 5.5, 11: -100.0}},
    "allowed": {"allowed_token_ids": [3, 8, 20, 100, 31, 32, 33]},
    "allowed and penalties": {"allowed_token_ids": [3, 8, 20, 100], "frequency_penalty": 1.0, "top_k": 2},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": list(range(100, 300))},
    "greedy, filtered": {"temperature": 0, "top_k": 2, "top_p": 0.1},
    "greedy, penalties": {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
    "greedy, min_tokens": {"temperature": 0, "min_tokens": 5, "stop_token_ids": list(range(250))},
}


def requests(count: int = 2) -> tuple[list[list[int]], list[SamplingParams]]:
    """`count` prompts for every option."""
    rng = random.Random(5)
    prompts, params = [], []
    for number, options in enumerate(OPTIONS.values()):
        for i in range(count):
            prompts.append([rng.randrange(257) for _ in range(rng.randint(1, 30))])
            params.append(
                SamplingParams(**{"temperature": 0.9, "max_tokens": NUM_TOKENS, "seed": 100 * number + i, **options})
            )
    return prompts, params


def run(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output["error"] for output in outputs] == [None] * len(outputs)
    return outputs


@pytest.fixture(scope="module")
def expected(chat_model_dir: Path) -> list[list[int]]:
    return [reference(chat_model_dir, *request) for request in zip(*requests(), strict=True)]


ENGINES: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "one step at a time": {"async_scheduling": False},
    "preempted, in chunks": {"num_kvcache_blocks": 6, "max_num_batched_tokens": 9},
    **({"two ranks": {"tensor_parallel_size": 2}} if TWO_RANKS else {}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_are_those_of_transformers(
    engine: str, chat_model_dir: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = requests()
    if "num_kvcache_blocks" in ENGINES[engine]:
        monkeypatch.setattr(scheduler, "Demand", NoReserve)
    llm = LLM(str(chat_model_dir), kvcache_block_size=16, **ENGINES[engine])
    outputs = run(llm, prompts, params)
    names = [name for name in OPTIONS for _ in range(2)]
    wrong = [name for name, out, right in zip(names, outputs, expected, strict=True) if out["token_ids"] != right]
    assert not wrong
    assert llm.scheduler.num_preemptions > 0 or "preempted" not in engine
    llm.exit()


def test_options_change_what_they_should(expected: list[list[int]]) -> None:
    """The reference itself: options that changed nothing would test nothing."""
    assert len({tuple(tokens) for tokens in expected}) > 0.9 * len(expected)
    by_name = dict(zip([name for name in OPTIONS for _ in range(2)], expected, strict=True))
    assert len(by_name["min_tokens"]) >= 6
    assert {*by_name["allowed"]} <= {3, 8, 20, 100, 31, 32, 33}
    assert 11 not in by_name["logit_bias"]


def test_bad_words(chat_model_dir: Path) -> None:
    """Words of one, two and three tokens that would come out otherwise; a few letters do, so they would come often."""
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    assert llm.tokenizer is not None
    letters = [llm.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "acegij"]
    prompt = llm.encode("the quick")
    common = {"temperature": 1.5, "max_tokens": 40, "allowed_token_ids": letters, "ignore_eos": True}
    for seed in range(4):
        (free,) = run(llm, ["the quick"], [SamplingParams(seed=seed, **common)])
        text = free["text"]
        for words in ([text[5]], [text[5:7]], [text[3:5], text[10:12], text[20:23], text[30:33]]):
            words = sorted({*words})
            bad = [llm.tokenizer.encode(word, add_special_tokens=False) for word in words]
            assert [len(ids) for ids in bad] == [len(word) for word in words]
            params = SamplingParams(seed=seed, **common, bad_words=words)
            (output,) = run(llm, ["the quick"], [params])
            assert not any(word in output["text"] for word in words)
            assert output["token_ids"] == reference(chat_model_dir, prompt, params, bad)


def test_logprobs_are_those_of_transformers(chat_model_dir: Path) -> None:
    """Of generated and prompt tokens, before penalties and filters, with rank and text; short blocks: some prompts are cached."""
    llm = LLM(str(chat_model_dir), kvcache_block_size=16, max_num_batched_tokens=40)
    rng = random.Random(1)
    prompts = [[rng.randrange(257) for _ in range(50)] for _ in range(3)]
    common = {"max_tokens": 8, "seed": 3, "repetition_penalty": 1.4, "top_k": 9}
    asked = [{"logprobs": 4}, {"logprobs": 0, "prompt_logprobs": 0}, {"prompt_logprobs": 3}]
    run(llm, prompts, SamplingParams(max_tokens=3))  # the prompts are in the cache now
    outputs = run(llm, prompts * 3, [SamplingParams(1.0, **common, **options) for options in asked for _ in prompts])
    for number, output in enumerate(outputs):
        options, prompt = asked[number // 3], prompts[number % 3]
        whole = prompt + output["token_ids"]
        truth = oracle_logprobs(chat_model_dir, whole)
        if "logprobs" in options:
            assert output["logprobs"] is not None
            check_logprobs(llm, output["logprobs"], whole, truth, len(prompt), options["logprobs"])
        else:
            assert output["logprobs"] is None
        if "prompt_logprobs" in options:
            assert output["prompt_logprobs"][0] is None
            assert len(output["prompt_logprobs"]) == len(prompt)
            check_logprobs(llm, output["prompt_logprobs"][1:], whole, truth, 1, options["prompt_logprobs"])
        else:
            assert "prompt_logprobs" not in output
            assert output["num_cached_tokens"] == 48


def check_logprobs(llm: LLM, found: list[Any], token_ids: list[int], truth: torch.Tensor, start: int, top: int) -> None:
    for at, entries in enumerate(found, start):
        row = truth[at - 1]
        best = row.topk(max(top, 1)).indices.tolist()[:top]
        # The token that is there, then the likeliest ones: what a column of lists must tell apart.
        assert [*entries] == [token_ids[at], *(token for token in best if token != token_ids[at])]
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert entry.rank == int((row > row[token]).sum()) + 1
            assert llm.tokenizer is not None
            assert entry.decoded_token == llm.tokenizer.decode([token])


def test_samples_of_one_prompt(chat_model_dir: Path) -> None:
    """Each is what a request of its own with its seed gives; they share the prompt's blocks."""
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    prompt = list(range(40))
    (whole,) = run(llm, [prompt], SamplingParams(1.0, 10, n=5, seed=8, logprobs=1))
    samples = whole["outputs"]
    assert len({tuple(sample["token_ids"]) for sample in samples}) == 5
    assert whole["token_ids"] == samples[0]["token_ids"]
    assert whole["num_generated_tokens"] == sum(len(sample["token_ids"]) for sample in samples)
    assert [sample["num_cached_tokens"] for sample in samples] == [0, 32, 32, 32, 32]
    assert all(len(sample["logprobs"] or ()) == len(sample["token_ids"]) for sample in samples)
    (first,) = run(llm, [prompt], SamplingParams(1.0, 10, seed=8))
    assert first["token_ids"] == samples[0]["token_ids"], "the first is what n=1 gives"
    again = run(llm, [[5], prompt], SamplingParams(1.0, 10, n=5, seed=8))
    assert [sample["token_ids"] for sample in again[1]["outputs"]] == [sample["token_ids"] for sample in samples]


def test_stop_strings_count_from_min_tokens(chat_model_dir: Path) -> None:
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    letters = "abcdefghijklmnopqrstuvwxyz "
    (free,) = run(llm, ["fox"], SamplingParams(1.0, 30, seed=2, stop=list(letters)))
    (late,) = run(llm, ["fox"], SamplingParams(1.0, 30, seed=2, stop=list(letters), min_tokens=12))
    assert free["num_generated_tokens"] < 12 <= late["num_generated_tokens"]


def test_special_tokens_in_the_text(chat_model_dir: Path) -> None:
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    params = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "allowed_token_ids": [1]}
    without, with_them = run(
        llm, [[5, 6]] * 2, [SamplingParams(**params), SamplingParams(**params, skip_special_tokens=False)]
    )
    assert (without["text"], with_them["text"]) == ("", "<|im_start|>" * 4)


@pytest.mark.parametrize("use", ["torch", "kernel"])
def test_filters_equal_transformers(use: str) -> None:
    """Rows of many kinds: flat, peaked, with ties, with banned tokens, and several thousand columns for several blocks."""
    if use == "kernel" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    # The interpreter takes tensors of the host, a GPU's kernel none.
    device = "cuda" if use == "kernel" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for columns, spread in ((17, 1.0), (1024, 4.0), (2500, 0.3), (2500, 8.0)):
        rows = 6
        logits = torch.randn(rows, columns, generator=generator) * spread
        logits[1, ::3] = float("-inf")
        logits[2] = 0.25
        logits[3] = logits[3].round()
        temperatures = torch.tensor([1.0, 0.5, 1.3, 1.0, 0.01, 2.5])
        top_k = torch.tensor([columns, 5, columns, 7, 3, columns])
        top_p = torch.tensor([0.7, 0.9, 1.0, 0.5, 0.99, 0.05])
        min_p = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.1, 0.02])
        expected = logits.clone()
        for i in range(rows):
            params = SamplingParams(
                temperature=temperatures[i].item(), top_k=int(top_k[i]), top_p=top_p[i].item(), min_p=min_p[i].item()
            )
            kept = warpers(params)(torch.zeros(1, 1), logits[i : i + 1])[0]
            # Of tokens as likely as the last one that stays, transformers' top_p keeps some and the engine all.
            expected[i, kept < kept[kept > -math.inf].min()] = float("-inf")
            expected[i, logits[i] == logits[i, kept > -math.inf].min()] = logits[i, kept > -math.inf].min()
        found = logits.clone()
        order = torch.randperm(rows, generator=generator)
        arguments = [found, order, temperatures[order], top_k[order], top_p[order], min_p[order]]
        arguments = [tensor.to(device) for tensor in arguments]
        (filter_logits if use == "kernel" else filter_logits_torch)(*arguments)
        found = arguments[0].cpu()
        assert torch.equal(found, expected), (columns, (found != expected).nonzero())
