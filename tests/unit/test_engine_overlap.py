"""The overlapped loop against the synchronous one on a real model: the same tokens, reasons and text, whatever happens on the way.

`expected` comes from a synchronous engine with room for everything; each test then takes room away.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, AsyncLLM, RequestOutput, SamplingParams
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.device_state import DeviceState
from nanovllm.engine.executor import UniprocExecutor
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.kernels.sampling import LEAST_KEY
from tests.models import make_model
from tests.preemption import NoReserve

Batch = tuple[list[list[int]], list[SamplingParams]]
Answer = tuple[list[int], str | None, str]

VOCABULARY = 300
OPTIONS: dict[str, Any] = {"kvcache_block_size": 16, "num_kvcache_blocks": 256, "max_model_len": 160}
both_ways = pytest.mark.parametrize("overlap", [False, True], ids=["synchronous", "overlapped"])


def random_batch(seed: int, count: int = 24) -> Batch:
    """Prompts that share beginnings, greedy and seeded, with every way to stop."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (0, 20, 50)]
    prompts = [
        [*rng.choice(beginnings), *(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 30)))]
        for _ in range(count)
    ]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.6, 1.5]),
            seed=rng.choice([None, rng.randrange(2**40)]),
            max_tokens=rng.choice([1, rng.randint(2, 20), rng.randint(20, 60), 60]),
            ignore_eos=rng.random() < 0.7,
            stop_token_ids=rng.choice([None, None, rng.sample(range(3, VOCABULARY), 6)]),
            stop=rng.choice([None, None, None, "e", ["th", "zz", "q"]]),
            include_stop_str_in_output=rng.random() < 0.5,
        )
        for _ in range(count)
    ]
    return prompts, params


def answers(outputs: list[RequestOutput]) -> list[Answer]:
    assert not any(output["error"] for output in outputs)
    return [(o["token_ids"], o["finish_reason"], o["text"]) for o in outputs]


def build(model: Path, overlap: bool, **options: Any) -> LLM:
    return LLM(str(model), async_scheduling=overlap, **{**OPTIONS, **options})


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    assert not llm.in_flight
    assert not llm.has_work
    assert isinstance(llm.executor, UniprocExecutor)
    assert not llm.executor.in_flight
    assert not llm.output_processor.detokenizers
    assert sorted(llm.scheduler.free_slots) == list(range(llm.scheduler.max_num_seqs))
    assert all(block.ref_count == 0 for block in llm.block_manager.blocks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its EOS ids come up every now and then."""
    path = tmp_path_factory.mktemp("overlap")
    return make_model(path, tokenizer=True, eos_token_id=[2, 40, 240])


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return [random_batch(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def expected(model: Path, batches: list[Batch]) -> list[list[Answer]]:
    results = []
    for batch in batches:  # requests without a seed get one from their number, so each batch has a new engine
        llm = build(model, overlap=False)
        results.append(answers(llm.generate(*batch, use_tqdm=False)))
        assert llm.stats().preemptions == 0
    flat = [answer for result in results for answer in result]
    assert {reason for _, reason, _ in flat} == {"stop", "length"}
    assert sum(reason == "stop" for _, reason, _ in flat) > 15
    assert any(len(token_ids) == 1 for token_ids, _, _ in flat)
    return results


SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "tight pool": {"num_kvcache_blocks": 12},
    "tight pool without prefix cache": {"num_kvcache_blocks": 12, "enable_prefix_caching": False},
    "few slots": {"max_num_seqs": 3},
    "one slot": {"max_num_seqs": 1},
    "chunked prefill": {"max_num_batched_tokens": 9},
    "a token a step": {"max_num_batched_tokens": 1},
    "all at once": {"num_kvcache_blocks": 9, "max_num_seqs": 6, "max_num_batched_tokens": 17},
}


@both_ways
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_answers(
    model: Path,
    batches: list[Batch],
    expected: list[list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    overlap: bool,
) -> None:
    monkeypatch.setattr(scheduler_module, "Demand", NoReserve)
    preemptions = 0
    slow = setting in ("one slot", "a token a step")
    for batch, wanted in zip(batches[: 1 if slow else None], expected, strict=False):
        llm = build(model, overlap, **SETTINGS[setting])
        assert answers(llm.generate(*batch, use_tqdm=False)) == wanted
        stats = llm.stats()
        assert stats.generated_tokens == sum(len(token_ids) for token_ids, _, _ in wanted)
        assert stats.prompt_tokens == sum(map(len, batch[0]))
        preemptions += stats.preemptions
        assert_idle(llm)
    if "num_kvcache_blocks" in SETTINGS[setting]:
        assert preemptions > 5
    else:
        assert preemptions == 0


@both_ways
def test_an_engine_goes_on_after_a_batch(
    model: Path, batches: list[Batch], expected: list[list[Answer]], overlap: bool
) -> None:
    """Slots, blocks and cached prefixes of one batch, surplus steps among them, serve the next."""
    llm = build(model, overlap, num_kvcache_blocks=20, max_num_seqs=5)
    for _ in range(2):
        for (prompts, params), wanted in zip(batches, expected, strict=True):
            seeded = [i for i, p in enumerate(params) if p.seed is not None or p.temperature == 0]
            outputs = llm.generate([prompts[i] for i in seeded], [params[i] for i in seeded], use_tqdm=False)
            assert answers(outputs) == [wanted[i] for i in seeded]
            assert_idle(llm)
    assert llm.stats().cached_tokens > 0


@both_ways
def test_max_tokens_1_needs_no_second_step(model: Path, overlap: bool) -> None:
    llm = build(model, overlap)
    outputs = llm.generate([[5, 6], [7]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), use_tqdm=False)
    assert [o["num_generated_tokens"] for o in outputs] == [1, 1]
    assert [o["finish_reason"] for o in outputs] == ["length", "length"]
    assert (llm.stats().steps, llm.stats().generated_tokens) == (1, 2)


@both_ways
def test_steps_run_ahead_of_what_is_read(model: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """The order of the calls: two steps are in flight while the first is read, and where lengths are known none is in vain."""
    llm = build(model, overlap)
    calls: list[str] = []
    for name in ("launch", "collect"):
        record(monkeypatch, llm.executor, name, calls)
    llm.generate([[5], [6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    if overlap:
        assert "".join(c[0] for c in calls) == "llclclcc"
    else:
        assert "".join(c[0] for c in calls) == "lclclclc"


def record(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, calls: list[str]) -> None:
    original = getattr(target, name)

    def wrapper(*args: Any) -> Any:
        calls.append(name)
        return original(*args)

    monkeypatch.setattr(target, name, wrapper)


# --- Aborts ----------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("seed", range(4))
def test_aborts_in_the_middle(
    model: Path,
    batches: list[Batch],
    expected: list[list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    overlap: bool,
) -> None:
    """Aborted running, waiting and with a token pending: the others do not notice."""
    monkeypatch.setattr(scheduler_module, "Demand", NoReserve)
    rng = random.Random(seed)
    (prompts, params), wanted = batches[seed % 3], expected[seed % 3]
    tight = {"num_kvcache_blocks": 16, "max_num_seqs": 8, "max_num_batched_tokens": 40} if seed % 2 else {}
    llm = build(model, overlap, **tight)
    seqs: list[Sequence] = []
    for prompt, param in zip(prompts, params, strict=True):
        seq = llm.make_sequence(prompt, param)
        assert isinstance(seq, Sequence)
        llm.add(seq)
        seqs.append(seq)
    results: dict[int, RequestOutput] = {}
    aborted: dict[int, int] = {}
    while llm.has_work:
        for seq, output in llm.step():
            assert seq.seq_id not in results
            results[seq.seq_id] = output
        alive = [seq for seq in seqs if seq.status is not SequenceStatus.FINISHED]
        if alive and rng.random() < 0.6 and len(aborted) < 10:
            victim = rng.choice(alive)
            llm.abort(victim)
            aborted[victim.seq_id] = victim.num_generated_tokens
    assert len(aborted) > 4
    for index, seq in enumerate(seqs):
        assert seq.num_pending == 0
        if seq.seq_id in aborted:
            assert seq.seq_id not in results
            assert seq.num_generated_tokens == aborted[seq.seq_id]
            assert seq.generated_token_ids == wanted[index][0][: seq.num_generated_tokens]
        else:
            assert answers([results[seq.seq_id]]) == [wanted[index]]
    assert llm.stats().generated_tokens == sum(seq.num_generated_tokens for seq in seqs)
    assert_idle(llm)


@both_ways
def test_cancelled_futures(model: Path, batches: list[Batch], expected: list[list[Answer]], overlap: bool) -> None:
    (prompts, params), wanted = batches[0], expected[0]
    engine = AsyncLLM(str(model), async_scheduling=overlap, **{**OPTIONS, "num_kvcache_blocks": 40, "max_num_seqs": 10})
    try:
        long = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)
        futures = []
        doomed = []
        for prompt, param in zip(prompts, params, strict=True):
            futures.append(engine.submit(prompt, param))
        for index in range(12):
            doomed.append(engine.submit([index + 3] * 9, long))
        for index, future in enumerate(futures):
            result = future.result(timeout=60)
            assert answers([result]) == [wanted[index]]
            if index % 2:
                assert doomed[index // 2].cancel() or doomed[index // 2].done()
        for future in doomed:
            try:
                assert future.result(timeout=30)["num_generated_tokens"] == 120
            except CancelledError:
                continue
        again = engine.submit(prompts[0], params[0]).result(timeout=30)
        if params[0].temperature == 0 or params[0].seed is not None:
            assert answers([again]) == [wanted[0]]
    finally:
        engine.shutdown()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt(original: Callable[..., Any], at: int, after: bool) -> Callable[..., Any]:
    """`original`, whose call number `at` is cut short by Ctrl-C, before or after its work."""
    calls = 0

    def wrapper(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise KeyboardInterrupt
        result = original(*args)
        if calls == at:
            raise KeyboardInterrupt
        return result

    return wrapper


@both_ways
@pytest.mark.parametrize("at", [1, 2, 7])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("target", "name"), [(UniprocExecutor, "launch"), (UniprocExecutor, "collect"), (DeviceState, "advance")]
)
def test_an_interrupted_call_leaves_the_engine_usable(
    model: Path,
    batches: list[Batch],
    expected: list[list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
    target: type,
    name: str,
    after: bool,
    at: int,
    overlap: bool,
) -> None:
    if target is DeviceState and at == 7 and torch.cuda.is_available():
        pytest.skip("on a GPU it is a node of the decode step's graph")
    (prompts, params), wanted = batches[1], expected[1]
    prompts, params, wanted = prompts[:10], params[:10], wanted[:10]
    llm = build(model, overlap, num_kvcache_blocks=24)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, interrupt(getattr(target, name), at, after))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    assert not llm.block_manager.cached, "blocks that may never have been computed"
    assert isinstance(llm.executor, UniprocExecutor)
    assert llm.executor.runner is not None
    # On a GPU the kernel takes the maximum of what is there.
    assert (llm.executor.runner.keys == LEAST_KEY).all(), "keys of the step that was cut short"
    tokens = llm.stats().generated_tokens
    rows = [i for i, p in enumerate(params) if p.seed is not None or p.temperature == 0]
    outputs = llm.generate([prompts[i] for i in rows], [params[i] for i in rows], use_tqdm=False)
    assert answers(outputs) == [wanted[i] for i in rows]
    assert llm.stats().generated_tokens - tokens == sum(o["num_generated_tokens"] for o in outputs)
    assert_idle(llm)
