"""Constrained output through the whole engine: every output parses, beside free rows, whatever the loop, batch and ranks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import scheduler
from tests.models import TWO_RANKS
from tests.preemption import NoReserve

SCHEMA = {
    "type": "object",
    "properties": {
        "sentiment": {"enum": ["positive", "negative"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "the dog"]}, "maxItems": 2},
    },
    "required": ["sentiment", "score", "tags"],
    "additionalProperties": False,
}
WANTED: list[dict[str, Any] | None] = [
    {"json": SCHEMA},
    {"regex": r"[a-f]{3}-[0-9]{2}"},
    {"choice": ["yes", "no", "not sure"]},
    {"grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{1,3}/'},
    None,
]
ENGINES: list[dict[str, Any]] = [
    {},
    {"async_scheduling": False},
    {"num_kvcache_blocks": 8, "max_num_batched_tokens": 9},
    *([{"tensor_parallel_size": 2}] if TWO_RANKS else []),
    {"chunk_cost": 1.0},  # as where decodes run as CUDA graphs
    {"threads": 3},  # as on a machine with more cores
]


def valid(wanted: dict[str, Any], text: str) -> bool:
    if "json" in wanted:
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if "choice" in wanted:
        return text in wanted["choice"]
    return re.fullmatch(wanted.get("regex", r"x[0-9]{1,3}"), text) is not None


def test_every_constrained_output_parses(chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Demand", NoReserve)
    params = [
        SamplingParams(temperature, 90, seed=seed, structured_outputs=wanted)
        for wanted in WANTED
        for seed, temperature in enumerate((0.0, 1.0, 1.0))
    ]
    params += [SamplingParams(1.0, 90, seed=5, top_p=0.9, structured_outputs=wanted) for wanted in WANTED[:4]]
    prompts = [f"number {number} of the quick brown fox" for number in range(len(params))]
    found = []
    for options in ENGINES:
        chunk_cost, threads = options.get("chunk_cost"), options.get("threads")
        if threads:
            monkeypatch.setattr(os, "cpu_count", lambda cpus=2 * threads: cpus)
        own = {key: value for key, value in options.items() if key not in ("chunk_cost", "threads")}
        llm = LLM(str(chat_model_dir), kvcache_block_size=16, **own)
        llm.executor.chunk_cost = chunk_cost or llm.executor.chunk_cost
        outputs = llm.generate(prompts, params, use_tqdm=False)
        steps = llm.steps
        llm.exit()
        found.append([(output["text"], output["token_ids"]) for output in outputs])
        for param, output in zip(params, outputs, strict=True):
            assert output["error"] is None
            if param.structured_outputs is not None:
                assert output["finish_reason"] == "stop"
                assert valid(dict(param.structured_outputs), output["text"]), output["text"]  # type: ignore[call-overload]
                assert output["parsed"] is not None
            else:
                assert "parsed" not in output
        if options == {}:
            longest = max(output["num_generated_tokens"] for output in outputs[:3])
            assert longest > 20
            assert steps < 90 + 20
    assert all(one == found[0] for one in found), "the loop, preemption and ranks change nothing"


def test_forced_text_takes_no_steps(chat_model_dir: Path) -> None:
    """What the grammar leaves no choice about is computed in one chunk, not token by token."""
    text = "the quick brown fox jumps over the lazy dog"
    for options in ({}, {"async_scheduling": False}):
        llm = LLM(str(chat_model_dir), kvcache_block_size=16, **options)
        params = SamplingParams(1.0, 90, seed=1, structured_outputs={"choice": [text]})
        (output,) = llm.generate(["fox"], params, use_tqdm=False)
        assert output["text"] == output["parsed"] == text
        assert llm.tokenizer is not None
        assert output["num_generated_tokens"] > 10
        assert llm.steps < output["num_generated_tokens"] / 2


def test_forced_text_of_many_rows(chat_model_dir: Path) -> None:
    """With more rows only those are asked whose last token was the only one: fewer steps, the same tokens."""
    texts = ["the quick brown fox jumps over the lazy dog", "a dog over the lazy fox"]
    params = [SamplingParams(1.0, 90, seed=row, structured_outputs={"choice": texts}) for row in range(40)]
    found = []
    for chunk_cost in (1e9, 0.1):
        llm = LLM(str(chat_model_dir), kvcache_block_size=16)
        llm.executor.chunk_cost = chunk_cost
        outputs = llm.generate([f"fox {row}" for row in range(40)], params, use_tqdm=False)
        assert all(output["text"] in texts for output in outputs)
        found.append(([output["token_ids"] for output in outputs], llm.steps))
        llm.exit()
    (never, slow), (often, fast) = found
    assert never == often
    assert fast < slow / 2


def test_stop_strings_in_constrained_text(chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may end while other threads still make its next mask."""
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    params = [
        SamplingParams(1.0, 60, seed=row, stop=["b", "dd"], structured_outputs={"regex": "[a-d]{50}"})
        for row in range(12)
    ]
    for output in llm.generate(["fox"] * 12, params, use_tqdm=False):
        assert output["error"] is None and output["finish_reason"] == "stop"
        assert re.fullmatch("[a-d]{0,50}", output["text"])
        assert "b" not in output["text"] and "dd" not in output["text"]


def test_cut_and_refused(chat_model_dir: Path) -> None:
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    params = [
        SamplingParams(1.0, 4, seed=1, structured_outputs={"json": SCHEMA}),
        SamplingParams(1.0, 4, structured_outputs={"json": {"type": "no such type"}}),
        SamplingParams(1.0, 4, structured_outputs={"chioce": ["a"]}),
        SamplingParams(1.0, 9, seed=1, structured_outputs={"choice": ["a", "b"]}, allowed_token_ids=[200]),
        SamplingParams(1.0, 4, seed=1),
    ]
    cut, schema, key, impossible, free = llm.generate(["fox"] * 5, params, use_tqdm=False)
    assert (cut["finish_reason"], cut["parsed"], cut["error"]) == ("length", None, None)
    assert "cannot be compiled" in (schema["error"] or "")
    assert "choice" in (key["error"] or "")
    assert "does not allow" in (impossible["error"] or "")
    assert free["error"] is None


def test_a_grammar_that_outgrows_its_limits_is_an_error(chat_model_dir: Path) -> None:
    """Right recursion that grows with the text: the row says why it ended, and one beside it goes on."""
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    llm.requests.grammars._limits = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=30)
    grammar = 'start: a+\na: "x" | "x" a | b\nb: "x" "y"* a'
    params = [
        SamplingParams(1.0, 60, seed=1, structured_outputs=wanted)
        for wanted in ({"grammar": grammar}, {"choice": ["a"]})
    ]
    grown, fine = llm.generate(["fox"] * 2, params, use_tqdm=False)
    assert grown["finish_reason"] == "error"
    assert "cannot go on after" in (grown["error"] or "") and "items" in (grown["error"] or "")
    assert (fine["error"], fine["text"]) == (None, "a")


@pytest.mark.parametrize("budget", [None, 0, 5])
def test_thinking_comes_first(budget: int | None, chat_model_dir: Path) -> None:
    llm = LLM(str(chat_model_dir), kvcache_block_size=16, reasoning=True)
    params = SamplingParams(
        1.0, 60, seed=3, thinking_budget=budget, structured_outputs={"choice": ["yes", "no"]}, ignore_eos=False
    )
    open_, closed = llm.generate(["Is it? <think>", "Is it? <think>\n\n</think>\n\n"], params, use_tqdm=False)
    assert closed["text"] in ("yes", "no")
    assert closed["reasoning_text"] is None
    if budget is not None:  # a random model does not end its thinking by itself
        assert open_["text"] in ("yes", "no")
        assert open_["parsed"] == open_["text"]
        assert bool(open_["reasoning_text"]) == (budget > 0)
    else:
        assert (open_["finish_reason"], open_["parsed"], open_["text"]) == ("length", None, "")
