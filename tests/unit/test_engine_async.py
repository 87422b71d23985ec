"""AsyncLLM: one continuous batch fed from many threads, and every future resolved however the engine ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, EngineDeadError, RequestOutput, SamplingParams, UserError
from nanovllm.engine.poison import VARIABLE

TEXTS = [f"the fox {i} and the dog {i * i}" for i in range(24)]


@pytest.fixture
def engine(chat_model_dir: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(str(chat_model_dir), kvcache_block_size=16, num_kvcache_blocks=40, max_num_seqs=9)
    yield engine
    engine.shutdown()


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_many_threads_get_what_generate_gives(engine: AsyncLLM, chat_model_dir: Path) -> None:
    params = [SamplingParams(temperature=0.7 * (i % 2), max_tokens=5 + i, seed=i) for i in range(len(TEXTS))]
    expected = LLM(str(chat_model_dir), kvcache_block_size=16).generate(TEXTS, params, use_tqdm=False)
    results: dict[int, RequestOutput] = {}

    def work(worker: int) -> None:
        mine = range(worker, len(TEXTS), 6)
        futures = {i: engine.submit(TEXTS[i], params[i]) for i in mine}
        results.update({i: future.result(timeout=60) for i, future in futures.items()})

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, output in enumerate(expected):
        assert {**results[i], "num_cached_tokens": 0} == {**output, "num_cached_tokens": 0}
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    assert stats.generated_tokens == sum(o["num_generated_tokens"] for o in expected)


def test_a_bad_request_is_an_output_at_once(engine: AsyncLLM) -> None:
    output = engine.submit("", SamplingParams()).result(timeout=0)
    assert output["finish_reason"] == "error"
    assert engine.submit([1], SamplingParams(temperature=0, max_tokens=2)).result(timeout=10)["error"] is None


def test_cancel_stops_the_request_and_frees_its_blocks(engine: AsyncLLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    expected = engine.submit("other", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)).result(timeout=30)
    futures = [engine.submit([i + 5], long) for i in range(12)]  # nine run, the others wait
    wait_until(lambda: engine.stats().generated_tokens > 60)
    other = engine.submit("other", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert all(future.cancel() for future in futures)
    assert other.result(timeout=30)["token_ids"] == expected["token_ids"]
    wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    assert engine.stats().kv_usage == 0
    assert engine.stats().generated_tokens < 12 * 400 / 2, "cancelled requests ran on to their end"
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=1)


def test_shutdown_ends_requests_in_flight(chat_model_dir: Path) -> None:
    engine = AsyncLLM(str(chat_model_dir), kvcache_block_size=16)
    future = engine.submit("x", SamplingParams(max_tokens=400, ignore_eos=True))
    engine.shutdown()
    for late in (future, engine.submit("y", SamplingParams())):
        with pytest.raises(EngineDeadError, match="shut down"):
            late.result(timeout=5)
    engine.shutdown()


def test_a_failing_step_resolves_every_future(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = engine._engine.executor
    launch, calls = executor.launch, []

    def fail_later(step: Any) -> None:
        calls.append(step)
        if len(calls) > 5:
            raise RuntimeError("out of memory")
        launch(step)

    monkeypatch.setattr(executor, "launch", fail_later)
    futures: list[Future[RequestOutput]] = [
        engine.submit(text, SamplingParams(max_tokens=50, ignore_eos=True)) for text in TEXTS
    ]
    for future in futures:
        with pytest.raises(EngineDeadError, match="RuntimeError: out of memory"):
            future.result(timeout=10)
    with pytest.raises(EngineDeadError, match="out of memory"):
        engine.submit("late", SamplingParams()).result(timeout=5)


def test_a_poisoned_request_ends_the_engine_and_its_step_is_named(
    chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test hook itself, and whom the engine blames: the requests of the step, not those that wait or are new."""
    monkeypatch.setenv(VARIABLE, "raise:fox 7")
    engine = AsyncLLM(str(chat_model_dir), kvcache_block_size=16, num_kvcache_blocks=40, max_num_seqs=3)
    futures = [engine.submit(text, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)) for text in TEXTS]
    errors = [future.exception(timeout=20) for future in futures]
    engine.shutdown()
    in_step = [number for number, error in enumerate(errors) if isinstance(error, EngineDeadError) and error.in_step]
    assert 7 in in_step
    assert len(in_step) <= 2 * 3  # two steps may be under way
    assert errors[0] is None and str(errors[23]) == "RuntimeError: poisoned"
    assert not any(isinstance(error, EngineDeadError) and error.killed for error in errors)
    monkeypatch.setenv(VARIABLE, "explode:fox")
    with pytest.raises(UserError, match="one of raise, kill, segfault, hang"):
        AsyncLLM(str(chat_model_dir))


def test_a_model_that_cannot_run_is_refused_by_the_constructor(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        AsyncLLM(str(tmp_path))


def test_a_cancelled_request_of_several_samples_stops_all(chat_model_dir: Path) -> None:
    """Also where its first sample has ended before: nothing of it may go on taking slots."""
    engine = AsyncLLM(str(chat_model_dir), kvcache_block_size=16, max_model_len=512)
    try:
        # The first sample meets its stop string after 81 tokens, the others never.
        future = engine.submit("the quick", SamplingParams(1.0, 480, n=4, seed=4, stop=["x"], ignore_eos=True))
        wait_until(lambda: engine.stats().num_running == 3)
        future.cancel()
        wait_until(lambda: engine.stats().num_running == 0)
        assert engine.stats().generated_tokens < 81 + 3 * 480
        assert engine.stats().kv_usage == 0
    finally:
        engine.shutdown()
