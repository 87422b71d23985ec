"""How much of the KV pool the running sequences will want at most: what admission leaves free, so that hardly any is preempted. No torch.

A sequence takes a block every few steps and gives all back when it ends, so the pool is fullest just before some sequence ends. When that is,
where it may stop by itself, is told by how long answers have been so far. As in the Past-Future scheduler (arXiv 2507.10150).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many

import numpy as np
import numpy.typing as npt

from nanovllm.engine.sequence import Sequence

# Answers that count: so many of the last.
HISTORY = 512
# Multiples of it, without their whole parts, lie as evenly between 0 and 1 as those of any number.
GOLDEN = (5**0.5 - 1) / 2

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class AnswerLengths:
    """Which part of its limit each of the last answers had, of those that might have stopped before it."""

    def __init__(self) -> None:
        self.parts: deque[float] = deque(maxlen=HISTORY)

    def add(self, seq: Sequence) -> None:
        """An answer that is over."""
        if not seq.params.ignore_eos:
            self.parts.append(seq.num_generated_tokens / seq.max_new_tokens)

    def expected(self, parts: Floats, ids: Ints) -> Floats:
        """The part of its limit that an answer will have which has `parts` of it by now.

        That of one of those that were longer, another one for each sequence of `ids`, so that they end as far apart as answers do. Or of
        one more: twice as long as this one, or as they were in the middle; of any length, where there is none yet.
        """
        known = np.sort(np.fromiter(self.parts, np.float64, len(self.parts)))
        another = (1 + parts) / 2
        if len(known):
            another = np.minimum(another, 2 * np.maximum(parts, known.mean()))
        shorter = np.searchsorted(known, parts, side="right")
        # The same whenever it is asked, and spread evenly over any sequences one after the other.
        drawn = ids * GOLDEN % 1.0
        place = shorter + (drawn * (len(known) - shorter + 1)).astype(np.int64)
        expected: Floats = np.where(place < len(known), np.append(known, 1.0)[place], another)
        return expected


class Demand:
    """What sequences are expected to take.

    Args:
        seqs: those that run; free: blocks that are free now.
    """

    def __init__(self, seqs: Many[Sequence], free: int, block_size: int, lengths: AnswerLengths) -> None:
        self.free = free
        self.block_size = block_size
        self.lengths = lengths
        self.tokens, self.left = self._tokens(seqs)
        self.held = _column([len(seq.block_table) for seq in seqs])
        # What others found in the cache, or have from the one that computed it, stays when it ends.
        self.own = self.held - _column([seq.num_cached_tokens for seq in seqs]) // block_size

    def take(self, seq: Sequence, needed: int) -> bool:
        """Count `seq` among them, which takes `needed` blocks now, if the pool holds all of them when it is fullest; whether it does."""
        held = -(-seq.num_tokens // self.block_size)
        columns = (self.tokens, self.left, self.held, self.own)
        more = (*self._tokens([seq]), _column([held]), _column([needed]))
        tokens, left, held_by, own = (np.concatenate(pair) for pair in zip(columns, more, strict=True))
        if needed > self.free or self._peak(tokens, left, held_by, own) > self.free - needed:
            return False
        self.tokens, self.left, self.held, self.own = tokens, left, held_by, own
        self.free -= needed
        return True

    def _tokens(self, seqs: Many[Sequence]) -> tuple[Ints, Ints]:
        """Tokens that each has stored when this step is over, and that it is expected to store after that."""
        # A token that is only being sampled is not stored yet.
        tokens = _column([seq.num_tokens - (seq.num_pending > 0) for seq in seqs])
        limits = _column([seq.max_new_tokens for seq in seqs])
        made = _column([seq.num_generated_tokens for seq in seqs])
        parts = self.lengths.expected(made / limits, _column([seq.seq_id for seq in seqs]))
        parts = np.where([seq.params.ignore_eos for seq in seqs], 1.0, parts)
        # The last one never is.
        stored = _column([seq.num_prompt_tokens for seq in seqs]) + np.ceil(parts * limits).astype(np.int64) - 1
        return tokens, np.maximum(stored - tokens, 0)

    def _peak(self, tokens: Ints, left: Ints, held: Ints, own: Ints) -> int:
        """Blocks more in use than now when the pool is fullest, if nobody else comes and each sequence stores a token a step up to its last,
        and ends a step later, when that has been read."""
        order = np.argsort(left)
        tokens, left, held = tokens[order], left[order], held[order]
        # Before each end: what those before it gave back; and what those that are left took, half of whose last block is empty.
        given = np.cumsum(own[order]) - own[order]
        taken = np.cumsum((tokens / self.block_size + 0.5 - held)[::-1])[::-1]
        taken += np.arange(len(left), 0, -1) * left / self.block_size
        fullest = int(np.argmax(taken - given))
        most = tokens[fullest:] + np.minimum(left[fullest:], left[fullest] + 1)
        grown = -(-most // self.block_size) - held[fullest:]
        return int(grown.sum()) - int(given[fullest])


def _column(numbers: list[int]) -> Ints:
    return np.fromiter(numbers, np.int64, len(numbers))
