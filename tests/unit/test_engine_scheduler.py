"""Scheduler and block manager driven as the engine drives them, over random workloads, without a model.

A shadow of the KV cache stores for each slot which token prefix was written there. Whatever a sequence reads must be
the prefix it would have computed itself: that is what makes a cached, preempted or chunked answer equal an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nanovllm.engine import block_manager as block_manager_module
from nanovllm.engine import scheduler as scheduler_module
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import ScheduledSequence, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """`arrival`: the step before which it is added; `abort`: the step before which it is aborted, if it still runs."""

    prompt: list[int]
    max_new_tokens: int
    arrival: int = 0
    abort: int | None = None


@dataclass(frozen=True)
class Workload:
    """What one simulated engine is asked to do. `hashes`: how many different block hashes there are; None: real ones."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    prefix_caching: bool
    reserve: int
    hashes: int | None
    requests: list[Request]


@dataclass
class Simulation:
    """The engine's step with a token function for a model, checking everything after each move."""

    workload: Workload
    shadow: dict[int, int] = field(default_factory=dict)
    prefixes: dict[tuple[int, int], int] = field(default_factory=dict)
    admitted: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    findable: list[int] = field(default_factory=list)
    computed: set[tuple[int, ...]] = field(default_factory=set)
    steps: int = 0

    def __post_init__(self) -> None:
        w = self.workload
        self.blocks = BlockManager(w.num_blocks, w.block_size, w.prefix_caching)
        self.scheduler = Scheduler(w.max_num_seqs, w.budget, self.blocks)
        self.seqs: list[Sequence] = []
        self.aborts: dict[int, int | None] = {}
        self.chains: dict[int, list[int]] = {}
        self.finished: list[Sequence] = []

    def run(self) -> None:
        pending = sorted(enumerate(self.workload.requests), key=lambda item: item[1].arrival)
        total = sum(len(r.prompt) + r.max_new_tokens for r in self.workload.requests)
        while pending or self.scheduler.has_work:
            while pending and (pending[0][1].arrival <= self.steps or not self.scheduler.has_work):
                self.add(pending.pop(0)[1])
            self.abort()
            if self.scheduler.has_work:
                self.step()
            self.steps += 1
            # Every step generates, or computes a chunk; recomputing after preemption is bounded by the oldest's progress.
            assert self.steps < 10 * (total + 1) ** 2, "sequences do not end"
        assert not self.scheduler.running and not self.scheduler.waiting
        assert self.blocks.num_free_blocks == self.workload.num_blocks
        assert all(block.ref_count == 0 for block in self.blocks.blocks)
        assert all(seq.status is SequenceStatus.FINISHED and not seq.block_table for seq in self.seqs)

    def add(self, request: Request) -> None:
        # The limits `LLMEngine.make_sequence` sets: the last token generated is never stored.
        pool = self.workload.num_blocks * self.workload.block_size
        prompt = request.prompt[:pool]
        limit = min(request.max_new_tokens, pool - len(prompt) + 1)
        seq = Sequence(len(self.seqs), prompt, SamplingParams(), limit, seed=0)
        self.seqs.append(seq)
        self.aborts[seq.seq_id] = request.abort
        self.scheduler.add(seq)

    def abort(self) -> None:
        for seq in self.seqs:
            if self.aborts[seq.seq_id] == self.steps and seq.status is not SequenceStatus.FINISHED:
                self.scheduler.finish(seq, "error")
                self.check_blocks()

    def step(self) -> None:
        shared_before = {block.block_id for block in self.blocks.blocks if block.ref_count > 1}
        batch = self.scheduler.schedule()
        assert batch, "a step with no work"
        assert len(self.scheduler.running) <= self.workload.max_num_seqs
        assert 0 < sum(item.num_tokens for item in batch) <= self.workload.budget
        assert all(item.num_tokens > 0 for item in batch)
        assert [item.seq for item in batch] == self.scheduler.running[: len(batch)], "the oldest come first"
        self.check_blocks()
        self.check_admission(batch)
        self.write(batch, shared_before)
        for item in batch:
            self.check_reads(item)
        for item in batch:
            if item.samples:
                self.sample(item.seq)
        self.check_blocks()

    def check_admission(self, batch: list[ScheduledSequence]) -> None:
        known = set(self.admitted)
        for item in batch:
            seq = item.seq
            if seq.seq_id in known:
                self.remember(item)
                continue
            self.admitted.append(seq.seq_id)
            self.cached.append(seq.num_cached_tokens)
            self.findable.append(self.longest_known(seq))
            self.remember(item)
            assert seq.num_cached_tokens == item.start, "cached tokens are those the first chunk leaves out"
            assert seq.num_cached_tokens < seq.num_prompt_tokens
            if not self.workload.prefix_caching:
                assert seq.num_cached_tokens == 0
        assert self.admitted == sorted(self.admitted), "first come, first admitted"

    def longest_known(self, seq: Sequence) -> int:
        size = self.workload.block_size
        ends = range(size, seq.num_tokens, size)  # the last token is always computed
        return next((end for end in reversed(ends) if tuple(seq.token_ids[:end]) in self.computed), 0)

    def remember(self, item: ScheduledSequence) -> None:
        size, end = self.workload.block_size, item.start + item.num_tokens
        self.computed.update(tuple(item.seq.token_ids[:stop]) for stop in range(size, end + 1, size))

    def write(self, batch: list[ScheduledSequence], shared_before: set[int]) -> None:
        written: set[int] = set()
        for seq, start, num_tokens in batch:
            for position in range(start, start + num_tokens):
                slot = self.slot(seq, position)
                assert slot not in written, "two sequences write one slot"
                # A block shared in this very step may be written by the one sequence that computes it.
                assert slot // self.workload.block_size not in shared_before, "a shared block is written"
                written.add(slot)
                self.shadow[slot] = self.prefix(seq, position)

    def check_reads(self, item: ScheduledSequence) -> None:
        for position in range(item.start + item.num_tokens):
            assert self.shadow.get(self.slot(item.seq, position)) == self.prefix(item.seq, position), (
                f"sequence {item.seq.seq_id} reads at {position} what is not its own prefix"
            )

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.workload.block_size
        return seq.block_table[position // size] * size + position % size

    def prefix(self, seq: Sequence, position: int) -> int:
        """A number that stands for the tokens 0..position and for no others."""
        cache = self.chains.setdefault(seq.seq_id, [])
        while len(cache) <= position:
            key = (cache[-1] if cache else 0, seq.token_ids[len(cache)])
            cache.append(self.prefixes.setdefault(key, len(self.prefixes) + 1))
        return cache[position]

    def sample(self, seq: Sequence) -> None:
        # A function of the whole prefix, so equal sequences go on equally and their generated blocks are shared too.
        token = self.prefix(seq, seq.num_tokens - 1) * 2654435761 % 97 % 2
        seq.token_ids.append(token)
        if seq.num_generated_tokens >= seq.max_new_tokens:
            self.scheduler.finish(seq, "length")
            self.finished.append(seq)

    def check_blocks(self) -> None:
        holders = Counter(block_id for seq in self.scheduler.running for block_id in seq.block_table)
        assert all(len(set(seq.block_table)) == len(seq.block_table) for seq in self.scheduler.running)
        assert not any(seq.block_table for seq in self.scheduler.waiting)
        for block in self.blocks.blocks:
            assert block.ref_count == holders[block.block_id]
            assert (block.block_id in self.blocks.free_block_ids) == (block.ref_count == 0)
        cached = [block for block in self.blocks.blocks if block.node]
        assert {id(b) for b in cached} == {id(b) for b in self.blocks.cached.values()}
        assert all(self.blocks.cached[block.hash] is block for block in cached)
        assert len({block.node for block in cached}) == len(cached)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size = draw(st.sampled_from([1, 2, 4]))
    # Few tokens and few beginnings, so that prefixes meet in every way there is.
    beginnings = draw(st.lists(st.lists(st.integers(0, 1), max_size=14), min_size=1, max_size=3))
    requests = draw(
        st.lists(
            st.builds(
                lambda beginning, rest, new, arrival, abort: Request([*beginning, *rest], new, arrival, abort),
                st.sampled_from(beginnings),
                st.lists(st.integers(0, 1), min_size=1, max_size=8),
                st.integers(1, 24),
                st.just(0) | st.integers(0, 12),
                st.none() | st.none() | st.integers(0, 24),
            ),
            min_size=1,
            max_size=10,
        )
    )
    return Workload(
        block_size=block_size,
        num_blocks=draw(st.integers(1, 16) | st.integers(8, 40)),
        max_num_seqs=draw(st.integers(1, 8)),
        budget=draw(st.integers(1, 12) | st.just(1000)),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        reserve=draw(st.sampled_from([0, 0, 2, 64])),
        hashes=draw(st.sampled_from([None, None, 1, 3])),
        requests=requests,
    )


def simulate(workload: Workload) -> Simulation:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(scheduler_module, "DECODE_RESERVE_TOKENS", workload.reserve))
        if workload.hashes is not None:
            original, count = block_manager_module.xxhash.xxh64_intdigest, workload.hashes
            colliding = mock.patch.object(
                block_manager_module.xxhash, "xxh64_intdigest", lambda data, seed: original(data, seed=seed) % count
            )
            stack.enter_context(colliding)
        simulation = Simulation(workload)
        simulation.run()
    return simulation


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads())
def test_nothing_leaks_nothing_is_overwritten_everything_ends(workload: Workload) -> None:
    simulation = simulate(workload)
    event(f"preempted: {simulation.scheduler.num_preemptions > 0}, prefix hits: {any(simulation.cached)}")
    for seq in simulation.finished:
        assert seq.num_generated_tokens == seq.max_new_tokens


def crowded_workload(rng: random.Random) -> Workload:
    """More requests than the pool holds: hits, evictions, preemptions and aborts all at once."""
    beginnings = [[rng.randrange(2) for _ in range(rng.randrange(16))] for _ in range(3)]
    requests = [
        Request(
            [*rng.choice(beginnings), *(rng.randrange(2) for _ in range(rng.randint(1, 8)))],
            rng.randint(1, 24),
            rng.choice([0, 0, rng.randrange(40)]),
            rng.choice([None, None, None, rng.randrange(80)]),
        )
        for _ in range(rng.randint(8, 20))
    ]
    return Workload(
        block_size=rng.choice([1, 2, 4]),
        num_blocks=rng.randint(4, 24),
        max_num_seqs=rng.randint(2, 16),
        budget=rng.choice([3, 7, 20, 1000]),
        prefix_caching=rng.random() < 0.85,
        reserve=rng.choice([0, 0, 2, 64]),
        hashes=rng.choice([None, None, 3]),
        requests=requests,
    )


def test_thousands_of_crowded_steps() -> None:
    rng = random.Random(0)
    runs = [simulate(crowded_workload(rng)) for _ in range(150)]
    assert sum(run.steps for run in runs) > 5000
    assert sum(run.scheduler.num_preemptions > 0 for run in runs) > 50
    assert sum(any(run.cached) for run in runs) > 100
    assert sum(len(run.finished) < len(run.seqs) for run in runs) > 100, "hardly any aborts"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(workloads())
def test_cached_tokens_are_all_that_anyone_computed_before(workload: Workload) -> None:
    """In a pool that evicts nothing, a prompt finds every full block of it that was ever computed, and no more."""
    roomy = {"block_size": max(2, workload.block_size), "num_blocks": 256, "prefix_caching": True, "hashes": None}
    simulation = simulate(dataclasses.replace(workload, **roomy))
    assert simulation.cached == simulation.findable


def sequence(seq_id: int, prompt: list[int], max_new_tokens: int = 4) -> Sequence:
    return Sequence(seq_id, prompt, SamplingParams(), max_new_tokens, seed=0)


def test_decodes_and_prefill_chunks_share_a_step() -> None:
    scheduler = Scheduler(8, 6, BlockManager(32, 2))
    first, second = sequence(0, [1, 2, 3]), sequence(1, list(range(10, 20)))
    scheduler.add(first)
    scheduler.add(second)
    assert [(i.seq.seq_id, i.start, i.num_tokens) for i in scheduler.schedule()] == [(0, 0, 3), (1, 0, 3)]
    first.token_ids.append(4)
    assert [(i.seq.seq_id, i.start, i.num_tokens) for i in scheduler.schedule()] == [(0, 3, 1), (1, 3, 5)]
    first.token_ids.append(5)
    batch = scheduler.schedule()
    assert [(i.seq.seq_id, i.start, i.num_tokens, i.samples) for i in batch] == [(0, 4, 1, True), (1, 8, 2, True)]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    with mock.patch.object(scheduler_module, "DECODE_RESERVE_TOKENS", 0):
        scheduler = Scheduler(8, 100, BlockManager(4, 2, enable_prefix_caching=False))
        seqs = [sequence(i, [i, i], max_new_tokens=5) for i in range(4)]
        for seq in seqs:
            scheduler.add(seq)
        assert [i.seq for i in scheduler.schedule()] == seqs
        for seq in seqs:
            seq.token_ids.append(9)
        assert [i.seq for i in scheduler.schedule()] == seqs[:2]
        assert scheduler.num_preemptions == 2
        assert list(scheduler.waiting) == seqs[2:]
        assert [s.status for s in seqs[2:]] == [SequenceStatus.WAITING] * 2
        scheduler.finish(seqs[0], "stop")
        scheduler.finish(seqs[1], "stop")
        # Recomputed with the token it had generated.
        assert [(i.seq, i.start, i.num_tokens) for i in scheduler.schedule()] == [(s, 0, 3) for s in seqs[2:]]


def test_the_decode_reserve_keeps_preemption_away() -> None:
    """With the reserve a pool is not filled with prompts whose first tokens would throw each other out again."""
    requests = [Request([i], 40) for i in range(20)]
    workload = Workload(2, 64, 20, 1000, True, scheduler_module.DECODE_RESERVE_TOKENS, None, requests)
    assert simulate(workload).scheduler.num_preemptions == 0
    without = Workload(2, 64, 20, 1000, True, 0, None, requests)
    assert simulate(without).scheduler.num_preemptions > 0


def test_equal_prompts_of_one_step_are_computed_once() -> None:
    scheduler = Scheduler(64, 10000, BlockManager(400, 4))
    prompt = list(range(30))
    for i in range(50):
        scheduler.add(sequence(i, [*prompt, i], 1))
    batch = scheduler.schedule()
    assert len(batch) == 50
    assert [item.num_tokens for item in batch] == [31] + [3] * 49
    assert [item.seq.num_cached_tokens for item in batch] == [0] + [28] * 49
