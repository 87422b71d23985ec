"""Decides what each step computes: schedule, preempt, finish. Plain Python, so thousands of steps a second can be tested."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.demand import AnswerLengths, Demand
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.outputs import FinishReason


class ScheduledSequence(NamedTuple):
    """`num_tokens` tokens of `seq` from index `start` are computed in this step.

    `samples`: the step reaches the sequence's last token, so a next one is sampled.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool


class Scheduler:
    """One token budget a step, shared by decodes and prefill chunks; the oldest sequences come first.

    Running sequences are served first, in the order of their admission: one token each for those that decode, the next
    chunk for those still in prefill. What is left of the budget admits waiting ones, as long as the pool holds what all are expected to
    grow to. Where a running sequence finds no block all the same, the youngest one is preempted: its blocks are freed and it waits, to be
    recomputed, at the head of the queue.

    A step may be scheduled before the tokens of the one before are known: they count as pending. The caller hands them in by
    `Sequence.token_ids` before the step after that, drops those of sequences that have finished meanwhile, and lets one step
    run before it gives a freed slot or block new contents, which the order of the device's stream does by itself.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, block_manager: BlockManager) -> None:
        # More running sequences than budget would let the youngest starve.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_manager = block_manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_slots = list(range(self.max_num_seqs))[::-1]
        self.num_preemptions = 0
        self.lengths = AnswerLengths()
        # Blocks that the running ones can still take, whatever they do.
        self.growth = 0
        # Sequences that have left, and how many had when which one was not admitted: as long as none does, it need not be asked again.
        self.departures = 0
        self.refused: tuple[Sequence, int] | None = None

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. The caller has checked that it fits the pool when it runs alone."""
        self.waiting.append(seq)

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's work; every sequence's `num_computed_tokens` is already advanced past it."""
        preemptions = self.num_preemptions
        batch, budget = self._schedule_running()
        if self.num_preemptions == preemptions:
            self._admit(batch, budget)
        return batch

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, running or waiting, and free its blocks."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
            if reason != "error":
                self.lengths.add(seq)
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def _schedule_running(self) -> tuple[list[ScheduledSequence], int]:
        batch: list[ScheduledSequence] = []
        budget = self.max_num_batched_tokens
        block_size = self.block_manager.block_size
        index = 0
        while index < len(self.running) and budget > 0:
            seq = self.running[index]
            num_tokens = seq.num_tokens
            if num_tokens - seq.num_prompt_tokens >= seq.max_new_tokens:  # its last token is pending
                index += 1
                continue
            computed = seq.num_computed_tokens
            num_tokens = min(num_tokens - computed, budget)
            # Most decodes have room in their last block.
            if computed + num_tokens <= len(seq.block_table) * block_size or self._make_room(
                seq, computed + num_tokens
            ):
                budget -= self._take(batch, seq, num_tokens)
                index += 1
        return batch, budget

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Lengthen the block table of a running sequence; whether it still runs, or was the youngest itself."""
        while not self.block_manager.can_extend(seq, num_tokens):
            if self._preempt_youngest() is seq:
                return False
        held = len(seq.block_table)
        self.block_manager.extend(seq, num_tokens)
        self.growth -= len(seq.block_table) - held
        return True

    def _admit(self, batch: list[ScheduledSequence], budget: int) -> None:
        demand: Demand | None = None
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if self.refused == (seq, self.departures):
                break
            matched = self.block_manager.match_prefix(seq)
            needed = self.block_manager.num_new_blocks(seq, matched)
            # The prompt's other blocks are among `needed`.
            growth = self._most_blocks(seq) - self.block_manager.blocks_for(seq.num_tokens)
            free = self.block_manager.num_free_blocks
            # One that runs alone fits, and nobody else takes blocks.
            fits = needed <= free if not self.running else needed + growth + self.growth <= free
            if not fits and self.running:
                if demand is None or demand.free != free:
                    demand = Demand(self.running, free, self.block_manager.block_size, self.lengths)
                fits = demand.take(seq, needed)
            if not fits:
                self.refused = seq, self.departures
                break
            self.waiting.popleft()
            self.block_manager.allocate(seq, matched)
            seq.status = SequenceStatus.RUNNING
            seq.slot = self.free_slots.pop()
            self.running.append(seq)
            self.growth += growth
            budget -= self._take(batch, seq, min(seq.num_tokens - seq.num_computed_tokens, budget))

    def _take(self, batch: list[ScheduledSequence], seq: Sequence, num_tokens: int) -> int:
        start = seq.num_computed_tokens
        end = start + num_tokens
        samples = end == seq.num_tokens
        batch.append(ScheduledSequence(seq, start, num_tokens, samples))
        seq.num_computed_tokens = end
        if end // self.block_manager.block_size > seq.num_registered_blocks:
            self.block_manager.register(seq)
        seq.num_pending += samples
        return num_tokens

    def _most_blocks(self, seq: Sequence) -> int:
        """Blocks of `seq` at its limit; the last token is never stored."""
        return self.block_manager.blocks_for(seq.num_prompt_tokens + seq.max_new_tokens - 1)

    def _preempt_youngest(self) -> Sequence:
        seq = self.running.pop()
        self._release(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
        return seq

    def _release(self, seq: Sequence) -> None:
        self.growth -= self._most_blocks(seq) - len(seq.block_table)
        self.departures += 1
        self.block_manager.register(seq)
        self.block_manager.free(seq)
        self.free_slots.append(seq.slot)
        seq.slot = -1
