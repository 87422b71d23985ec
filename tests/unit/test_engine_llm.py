"""The LLM front door: text and stop rules, mixed inputs, chat, and requests that cannot run beside those that can."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm import LLM, RequestOutput, SamplingParams, UserError
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.sequence import Sequence
from tests.models import IM_END, make_model

PROMPTS = ["the quick brown fox", "hello", "ünïcödé ☃ 🙂", "a b c d e f g", "user", "lazy dog and then"]


@pytest.fixture(scope="module")
def llm(chat_model_dir: Path) -> LLM:
    return LLM(str(chat_model_dir), kvcache_block_size=16, num_kvcache_blocks=64, max_model_len=200)


@pytest.fixture(scope="module")
def tokenizer(chat_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model_dir)


def greedy(llm: LLM, prompts: Any, **params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, SamplingParams(**{"temperature": 0, "max_tokens": 30, **params}), use_tqdm=False)


def test_output_is_a_plain_dict_with_its_text(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    outputs = greedy(llm, PROMPTS, ignore_eos=True)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert type(output) is dict
        assert output["text"] == tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert output["num_input_tokens"] == len(tokenizer.encode(prompt))
        assert output["num_generated_tokens"] == len(output["token_ids"]) == 30
        assert (output["finish_reason"], output["error"], output["logprobs"]) == ("length", None, None)
    assert len({output["text"] for output in outputs}) == len(PROMPTS)


def test_text_and_token_id_prompts_are_the_same(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    mixed: list[Any] = [p if i % 2 else t for i, (p, t) in enumerate(zip(PROMPTS, ids, strict=True))]
    expected = [o["token_ids"] for o in greedy(llm, PROMPTS)]
    assert [o["token_ids"] for o in greedy(llm, mixed)] == expected
    for dtype in (np.int64, np.int32, np.uint16, object):
        assert [o["token_ids"] for o in greedy(llm, [np.array(t, dtype) for t in ids])] == expected
    assert [o["token_ids"] for o in greedy(llm, [np.repeat(t, 2).astype(np.int32)[::2] for t in ids])] == expected
    assert [o["token_ids"] for o in greedy(llm, [array("q", t) for t in ids])] == expected
    assert [o["token_ids"] for o in greedy(llm, [tuple(t) for t in ids])] == expected
    assert greedy(llm, PROMPTS[0])[0]["token_ids"] == expected[0], "one string is one prompt"


def test_parameters_one_each(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in range(1, 7)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o["num_generated_tokens"] for o in outputs] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match="2 sampling_params for 6 prompts"):
        llm.generate(PROMPTS, params[:2])
    assert llm.generate([], use_tqdm=False) == []


def test_end_of_sequence_is_kept_in_the_ids_and_left_out_of_the_text(tmp_path: Path) -> None:
    """The EOS id is made one the model is known to generate."""
    probe = LLM(str(make_model(tmp_path / "a", tokenizer=True)), kvcache_block_size=16)
    free = greedy(probe, ["hello"], ignore_eos=True)[0]
    eos = next(t for t in free["token_ids"][6:] if t > 2)
    length = free["token_ids"].index(eos) + 1
    llm = LLM(str(make_model(tmp_path / "b", tokenizer=True, eos_token_id=[299, eos])), kvcache_block_size=16)
    output = greedy(llm, ["hello"])[0]
    assert output["finish_reason"] == "stop"
    assert output["token_ids"] == free["token_ids"][:length]
    assert output["text"] == probe.tokenizer.decode(output["token_ids"][:-1], skip_special_tokens=True)  # type: ignore[union-attr]
    assert greedy(llm, ["hello"], ignore_eos=True)[0]["token_ids"] == free["token_ids"]


def test_stop_token_ids(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    free = greedy(llm, ["hello"], ignore_eos=True)[0]["token_ids"]
    stop = next(t for t in free[9:] if t > 2)  # a special token has no text to keep
    cut = free[: free.index(stop) + 1]
    output = greedy(llm, ["hello"], stop_token_ids=[stop, 298], ignore_eos=True)[0]
    assert (output["token_ids"], output["finish_reason"]) == (cut, "stop")
    assert output["text"] == tokenizer.decode(cut[:-1], skip_special_tokens=True)
    kept = greedy(llm, ["hello"], stop_token_ids=[stop], ignore_eos=True, include_stop_str_in_output=True)[0]
    assert kept["text"] == tokenizer.decode(cut, skip_special_tokens=True)


def test_stop_string_ends_generation_at_once(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    free = greedy(llm, ["hello"], ignore_eos=True)[0]
    text = free["text"]
    middle = len(text) // 2
    stop = text[middle : middle + 5]
    at = text.index(stop)
    for params in ({"stop": stop}, {"stop": [text[-1] + "never", stop, "zzz"]}):
        output = greedy(llm, ["hello"], ignore_eos=True, **params)[0]
        assert (output["text"], output["finish_reason"]) == (text[:at], "stop")
        ids = output["token_ids"]
        assert ids == free["token_ids"][: len(ids)]
        assert len(ids) < len(free["token_ids"])
        assert stop in tokenizer.decode(ids, skip_special_tokens=True)
        assert stop not in tokenizer.decode(ids[:-1], skip_special_tokens=True)
    kept = greedy(llm, ["hello"], ignore_eos=True, stop=stop, include_stop_str_in_output=True)[0]
    assert kept["text"] == text[: at + len(stop)]


def test_max_model_len_cuts_with_length(llm: LLM) -> None:
    output = greedy(llm, [[5] * 190], max_tokens=50, ignore_eos=True)[0]
    assert (output["num_generated_tokens"], output["finish_reason"]) == (10, "length")


def test_chat_renders_the_template(llm: LLM, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "the fox"}]
    rendered = "<|im_start|>system\nthe dog<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = greedy(llm, [rendered], max_tokens=8)
    assert expected[0]["num_input_tokens"] == len(tokenizer.encode(rendered))
    assert llm.chat(messages, params, use_tqdm=False)[0]["token_ids"] == expected[0]["token_ids"]
    both = llm.chat([messages, messages[1:]], params, use_tqdm=False)
    assert both[0]["token_ids"] == expected[0]["token_ids"]
    assert both[1]["num_input_tokens"] < both[0]["num_input_tokens"]
    silent = llm.chat(messages, params, use_tqdm=False, enable_thinking=False)[0]
    assert silent["num_input_tokens"] == len(tokenizer.encode(rendered + "<think>\n\n</think>\n\n"))


def test_chat_and_text_without_a_tokenizer(model_dir: Path) -> None:
    llm = LLM(str(model_dir), kvcache_block_size=16)
    with pytest.raises(UserError, match="no chat template"):
        llm.chat([{"role": "user", "content": "x"}])
    text, stop, good = llm.generate(
        ["hello", [1], [1]],
        [SamplingParams(), SamplingParams(stop="x"), SamplingParams(temperature=0, max_tokens=3)],
        use_tqdm=False,
    )
    assert "no tokenizer" in (text["error"] or "")
    assert "stop_token_ids" in (stop["error"] or "")
    assert (good["text"], len(good["token_ids"]), good["error"]) == ("", 3, None)


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "empty"),
    "empty ids": ([], "empty"),
    "too long": ([5] * 200, "200 tokens, the most is 199"),
    "id past the vocabulary": ([1, 300], "300, which is not a token id of this model (0 to 299)"),
    "negative id": ([1, -1], "-1, which is not a token id"),
    "no id": ([1, "x"], "'x', which is not a token id"),
    "float id": ([1.0], "1.0, which is not a token id"),
    "id of more bits": ([1, 2**40], "1099511627776, which is not a token id"),
    "array past the vocabulary": (array("i", [1, 300]), "300, which is not a token id of this model (0 to 299)"),
    "array of more bits": (array("q", [1, 2**32 + 1]), "4294967297, which is not a token id"),
    "negative in an array": (np.array([1, -1]), "-1, which is not a token id"),
    "array of floats": (np.array([1.0]), "1.0, which is not a token id"),
    "array of arrays": (np.array([[1, 2]]), "[1, 2], which is not a token id"),
    "array too long": (array("i", [5] * 200), "200 tokens, the most is 199"),
    "empty array": (np.array([]), "empty"),
    "none": (None, "None"),
    "a number": (7, "7"),
    "no text": ("\ud800", "cannot be tokenized"),
}
BAD_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens=0"),
    "max_tokens -1": ({"max_tokens": -1}, "max_tokens=-1"),
    "max_tokens none": ({"max_tokens": None}, "max_tokens=None"),
    "max_tokens float": ({"max_tokens": 2.5}, "max_tokens=2.5"),
    "temperature nan": ({"temperature": math.nan}, "temperature=nan"),
    "temperature inf": ({"temperature": math.inf}, "temperature=inf"),
    "temperature negative": ({"temperature": -0.1}, "temperature=-0.1"),
    "temperature text": ({"temperature": "hot"}, "temperature='hot'"),
    "temperature huge": ({"temperature": 10**400}, "temperature=1000"),
    "temperature none": ({"temperature": None}, "temperature=None"),
    "seed negative": ({"seed": -1}, "seed=-1"),
    "seed too large": ({"seed": 2**63}, "seed=9223372036854775808"),
    "seed text": ({"seed": "x"}, "seed='x'"),
    "stop empty": ({"stop": ""}, "stop=''"),
    "stop empty in list": ({"stop": ["a", ""]}, "not empty"),
    "stop number": ({"stop": 3}, "stop=3"),
    "stop ids": ({"stop_token_ids": ["a"]}, "stop_token_ids=['a']"),
    "stop ids number": ({"stop_token_ids": 3}, "stop_token_ids=3"),
}


def test_requests_that_cannot_run_are_rows_with_an_error(llm: LLM) -> None:
    """All at once, between good ones: no exception, and not a token changes for the others."""
    prompts: list[Any] = []
    params: list[SamplingParams] = []
    expected: list[str | None] = []
    good = SamplingParams(temperature=0.8, max_tokens=12, seed=5, ignore_eos=True)
    rows: list[tuple[Any, SamplingParams, str]] = [(p, good, m) for p, m in BAD_PROMPTS.values()]
    rows += [("hello", SamplingParams(**values), m) for values, m in BAD_PARAMS.values()]
    for i, (prompt, param, message) in enumerate(rows):
        prompts += [prompt, PROMPTS[i % len(PROMPTS)]]
        params += [param, good]
        expected += [message, None]
    alone = llm.generate(PROMPTS, good, use_tqdm=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for i, (output, message) in enumerate(zip(outputs, expected, strict=True)):
        if message is None:
            assert output["token_ids"] == alone[i // 2 % len(PROMPTS)]["token_ids"]
            assert (output["finish_reason"], output["error"]) == ("length", None)
        else:
            assert message in (output["error"] or ""), output
            assert "\n" not in (output["error"] or "")
            assert (output["finish_reason"], output["text"], output["token_ids"]) == ("error", "", [])


def test_numpy_parameters_are_numbers(llm: LLM) -> None:
    """Rows of a table hold numpy scalars."""
    params: Any = SamplingParams(np.float32(0.5), np.int64(4), seed=np.int64(3), stop_token_ids=[np.int32(299)])
    plain = SamplingParams(0.5, 4, seed=3, stop_token_ids=[299])
    first, second = llm.generate(["hello", "hello"], [params, plain], use_tqdm=False)
    assert first["token_ids"] == second["token_ids"]
    assert first["error"] is None


def test_prompt_larger_than_the_kv_pool(chat_model_dir: Path) -> None:
    llm = LLM(str(chat_model_dir), kvcache_block_size=16, num_kvcache_blocks=2)
    assert llm.max_prompt_len == 32
    large, exact, small = greedy(llm, [[5] * 33, [5] * 32, [5] * 20], ignore_eos=True)
    assert large["error"] == "the prompt has 33 tokens, the KV cache holds 32"
    # The last generated token is never stored, so a full pool still gives one.
    assert (exact["num_generated_tokens"], exact["finish_reason"]) == (1, "length")
    assert (small["num_generated_tokens"], small["finish_reason"]) == (13, "length")


def test_an_interrupted_call_leaves_nothing_behind(chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step: the next call computes what the first had promised to the prefix cache."""
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    prompt = list(range(100, 150))

    def interrupt(*_: object) -> list[int]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            greedy(llm, [prompt, "hello"])
    assert not llm.has_work
    output = greedy(llm, [prompt])[0]
    assert output["num_cached_tokens"] == 0
    assert output["token_ids"] == greedy(LLM(str(chat_model_dir)), [prompt])[0]["token_ids"]


def test_two_engines_in_one_process(tmp_path: Path, llm: LLM) -> None:
    expected = [o["token_ids"] for o in greedy(llm, PROMPTS)]
    other = LLM(str(make_model(tmp_path, "llama", seed=4, tokenizer=True)), kvcache_block_size=32)
    theirs = [o["token_ids"] for o in greedy(other, PROMPTS)]
    assert theirs != expected
    for engine in (llm, other):
        for prompt in PROMPTS:
            seq = engine.make_sequence(prompt, SamplingParams(temperature=0, max_tokens=30))
            assert not isinstance(seq, dict)
            engine.add(seq)
    results: dict[int, dict[int, list[int]]] = {0: {}, 1: {}}
    while llm.has_work or other.has_work:
        for index, engine in enumerate((llm, other)):
            for seq, output in engine.step() if engine.has_work else []:
                results[index][seq.seq_id] = output["token_ids"]
    assert [results[0][k] for k in sorted(results[0])] == expected
    assert [results[1][k] for k in sorted(results[1])] == theirs


# --- Stop rules against an oracle that decodes everything again after each token -------------------------------------


def process(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], params: SamplingParams
) -> tuple[RequestOutput, int]:
    """Feed `token_ids` as if a model had sampled them; the output, and how many were taken."""
    processor = OutputProcessor(tokenizer, [tokenizer.convert_tokens_to_ids(IM_END)])
    seq = Sequence(0, [1], params, len(token_ids), seed=0)
    for count, token_id in enumerate(token_ids, 1):
        seq.finish_reason = processor.append(seq, token_id)
        if seq.finish_reason:
            return processor.output(seq), count
    raise AssertionError("a sequence ends with its last token at the latest")


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=30), st.data())
def test_stop_strings_in_any_text(tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject) -> None:
    """Characters of several bytes are spread over tokens; the earliest stop string wins, wherever tokens begin or end."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(ids) != text:  # pragma: no cover - byte-level BPE is lossless
        raise AssertionError("the tokenizer loses text")
    start = data.draw(st.integers(0, len(text) - 1))
    stops = [text[start : data.draw(st.integers(start + 1, len(text)))], data.draw(st.text(min_size=1, max_size=3))]
    keep = data.draw(st.booleans())
    output, count = process(tokenizer, ids, SamplingParams(stop=stops, include_stop_str_in_output=keep))
    first = next(n for n in range(1, len(ids) + 1) if any(stop in tokenizer.decode(ids[:n]) for stop in stops))
    assert (count, output["finish_reason"]) == (first, "stop")
    seen = tokenizer.decode(ids[:count])
    at, stop = min((seen.find(stop), stop) for stop in stops if stop in seen)
    assert output["text"] == seen[: at + len(stop) if keep else at]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=40), st.booleans())
def test_tokens_that_are_no_text_do_not_raise(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], with_stop: bool
) -> None:
    """A random model emits bytes that are no UTF-8; with stop strings they go through the incremental decoder."""
    params = SamplingParams(stop="no such text" if with_stop else None, ignore_eos=True)
    output, count = process(tokenizer, ids, params)
    assert (count, output["finish_reason"]) == (len(ids), "length")
    assert output["text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_stop_string_after_bytes_that_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    snowman = tokenizer.encode("☃")
    broken = [*snowman[:1], *snowman[:2], *snowman, *snowman[1:]]
    ids = [*broken, *tokenizer.encode("the end. more"), *broken]
    output, count = process(tokenizer, ids, SamplingParams(stop="end."))
    assert output["finish_reason"] == "stop"
    assert output["text"] == tokenizer.decode(broken) + "the "
    assert count == len(broken) + len(tokenizer.encode("the end."))
