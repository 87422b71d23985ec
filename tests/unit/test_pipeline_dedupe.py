"""Equal requests are generated once, whoever asks and however it ends, and what is kept of them is bounded."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from nanovllm import AsyncLLM, EngineDeadError, RequestOutput, SamplingParams, UserError
from nanovllm.outputs import error_output
from pipelines.dedupe import Copy, Deduplicated
from pipelines.job import build
from pipelines.predictor import NanoVLLMPredictor
from pipelines.results import RowResult
from tests.rows import run_rows

GREEDY = SamplingParams(temperature=0, max_tokens=5)


class SlowEngine:
    """Answers when the test says so."""

    max_prompt_len = 100

    def __init__(self) -> None:
        self.started: list[tuple[str | list[int], Future[RequestOutput]]] = []

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        if prompt == "odd":
            raise RuntimeError("cannot encode")
        future: Future[RequestOutput] = Future()
        self.started.append((prompt, future))
        return future

    def stats(self) -> Any:
        raise NotImplementedError

    def shutdown(self) -> None:
        pass

    def answer(self, number: int, text: str) -> None:
        self.started[number][1].set_result({**error_output(""), "text": text, "error": None, "token_ids": [1, 2]})


def text_of(future: Future[RequestOutput]) -> str:
    return future.result(timeout=0)["text"]


def test_equal_requests_wait_for_one_and_later_ones_get_what_it_gave() -> None:
    engine = SlowEngine()
    once = Deduplicated(engine)
    first, other, second = (once.submit(prompt, GREEDY) for prompt in ("a", "b", "a"))
    assert [prompt for prompt, _ in engine.started] == ["a", "b"]
    assert [isinstance(future, Copy) for future in (first, other, second)] == [False, False, True]
    assert not second.done()
    engine.answer(0, "of a")
    assert (text_of(first), text_of(second), other.done()) == ("of a", "of a", False)
    late = once.submit("a", GREEDY)
    assert isinstance(late, Copy)
    assert text_of(late) == "of a"
    assert len(engine.started) == 2


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ("a ", {}),
        ([97], {}),
        ("a", {"max_tokens": 6}),
        ("a", {"structured_outputs": {"choice": ["x", "y"]}}),
        ("a", {"logprobs": 1}),
        ("a", {"stop": ["x"]}),
    ],
)
def test_other_requests_are_their_own(prompt: str | list[int], params: dict[str, Any]) -> None:
    engine = SlowEngine()
    once = Deduplicated(engine)
    once.submit("a", GREEDY)
    once.submit("a", SamplingParams(temperature=0, max_tokens=5, seed=77))  # greedy: the seed decides nothing
    assert len(engine.started) == 1
    once.submit(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 5, **params}))
    assert len(engine.started) == 2


def test_a_text_is_not_the_token_ids_that_it_spells() -> None:
    engine = SlowEngine()
    once = Deduplicated(engine)
    prompts: list[str | list[int]] = ["[97]", [97], "[97]", [97]]
    for prompt in prompts:
        once.submit(prompt, GREEDY)
    assert [prompt for prompt, _ in engine.started] == ["[97]", [97]]


def test_what_is_drawn_by_chance_is_never_shared() -> None:
    engine = SlowEngine()
    once = Deduplicated(engine)
    for temperature in (0.5, 0.5):
        once.submit("a", SamplingParams(temperature=temperature, seed=1))
    assert len(engine.started) == 2
    for _ in range(2):
        once.submit("a", SamplingParams(temperature=1.0, labels=["x", "y"]))  # scored, not drawn
    assert len(engine.started) == 3


def test_a_death_is_that_of_all_who_wait_and_is_not_remembered() -> None:
    engine = SlowEngine()
    once = Deduplicated(engine)
    waiting = [once.submit("a", GREEDY) for _ in range(3)]
    death = EngineDeadError("poisoned", in_step=True)
    engine.started[0][1].set_exception(death)
    assert all(future.exception(timeout=0) is death for future in waiting)
    again = once.submit("a", GREEDY)
    assert not isinstance(again, Copy)
    engine.answer(1, "fine")
    assert text_of(again) == "fine"


def test_one_who_gives_up_stops_nobody() -> None:
    engine = SlowEngine()
    once = Deduplicated(engine)
    first, second, third = (once.submit("a", GREEDY) for _ in range(3))
    assert first.cancel()
    assert second.cancel()
    assert not engine.started[0][1].cancelled()
    engine.answer(0, "of a")
    assert text_of(third) == "of a"


def test_what_cannot_be_tokenized_is_an_error_each_time() -> None:
    once = Deduplicated(SlowEngine())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot encode"):
            once.submit("odd", GREEDY)


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    engine = SlowEngine()
    once = Deduplicated(engine, cache_bytes=50_000)

    def ask(prompt: str) -> bool:
        """Whether it was generated."""
        before = len(engine.started)
        future = once.submit(prompt, GREEDY)
        if len(engine.started) > before:
            engine.answer(before, "x" * 10_000)
        assert text_of(future) == "x" * 10_000
        return len(engine.started) > before

    assert all(ask(f"prompt {number}") for number in range(4))
    assert not ask("prompt 0")  # used: the newest now
    assert ask("prompt 4")
    assert not ask("prompt 0")
    assert ask("prompt 1")
    for number in range(200):
        ask(f"other {number}")
    kept = [prompt for prompt in (f"other {number}" for number in range(200)) if not ask(prompt)]
    assert kept == []  # asked in the order of their age, each one drives out the next
    engine.started.clear()
    assert once._bytes <= 50_000
    assert len(once._finished) == 4


def test_rows_get_what_they_get_without_it(chat_model_dir: Path) -> None:
    engine = AsyncLLM(str(chat_model_dir), max_model_len=128, kvcache_block_size=16, max_num_seqs=4)
    values: list[object] = [f"row {number % 7}" for number in range(150)] + [None, "", "long " * 200] * 3

    def results(used: Any, sampling: SamplingParams) -> list[RowResult]:
        found = run_rows(used, values, range(len(values)), sampling)
        return [row._replace(num_cached_tokens=0) for row in found]

    try:
        for sampling in (
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1),
            SamplingParams(labels=["yes", "no", "not at all"]),
        ):
            plain = results(engine, sampling)
            before = engine.stats().prompt_tokens
            shared = results(Deduplicated(engine), sampling)
            texts = [[sample.text for sample in row.samples] for row in shared]
            assert texts == [[sample.text for sample in row.samples] for row in plain]
            assert [row.error for row in shared] == [row.error for row in plain]
            assert len({row.error for row in plain}) == 4
            lengths = {value: row.num_input_tokens for value, row in zip(values, shared, strict=True) if not row.error}
            # What the engine computed is the seven different prompts, each once, with their labels.
            computed = engine.stats().prompt_tokens - before
            assert computed <= 2 * sum(lengths.values()) + 7 * 16
    finally:
        engine.shutdown()


def test_only_greedy_jobs_may() -> None:
    place = {"model": "m", "input": "i", "output": "o", "run": {"dedupe": True}}
    with pytest.raises(UserError, match=r"run\.dedupe is for greedy jobs, and sampling\.temperature=1\.0"):
        build(place)
    assert build({**place, "sampling": {"temperature": 0}}).run.dedupe
    assert build({**place, "sampling": {"labels": ["a", "b"]}}).run.dedupe
    with pytest.raises(UserError, match="dedupe is for greedy jobs"):
        NanoVLLMPredictor("no-such-model", dedupe=True)
