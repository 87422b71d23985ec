"""Sampling for rows that ask for more than a temperature, and log-probabilities. Plain torch but for the filter.

It works on the whole vocabulary of those rows alone, gathered from all ranks, each of which then computes the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.engine.row_sampling import SamplingInput
from nanovllm.engine.step_result import LogprobTensors
from nanovllm.kernels.filter_logits import filter_logits, filter_logits_torch
from nanovllm.kernels.sampling import sample_keys, sample_keys_torch, unpack_masks
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.utils.transfer import to_device

# Rows whose logits are looked at at a time where those of many positions are asked for.
SCORE_ROWS = 128
# Of the count of a token in a sequence's past, which is kept doubled.
MOST_SEEN = 2**15 - 2


class ExtendedSampler:
    """The sampler of one rank.

    Args:
        head: makes the logits. temperatures, seeds, steps: [R] the device state's, by slot.
    """

    def __init__(
        self, head: ParallelLMHead, temperatures: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor
    ) -> None:
        self.head = head
        self.temperatures, self.seeds, self.steps = temperatures, seeds, steps
        # [R, V] int16, by slot: twice the times a token was generated, and 1 more where the prompt has it. Made when it is first needed.
        self.seen: torch.Tensor | None = None

    def replace_keys(
        self, logits: torch.Tensor, slots: torch.Tensor, asked: SamplingInput, keys: torch.Tensor
    ) -> torch.Tensor | None:
        """Sample the rows that `asked` is about.

        Args:
            logits: [S, columns] this rank's, of all sampling rows; slots: [S] their state slots.
            keys: [S] as `sample` returns them, of which those rows' are replaced.

        Returns:
            [L, V] float32 logits from which log-probabilities are taken, or None where none are asked for.
        """
        if not len(asked.rows):
            return None
        device = logits.device
        rows = to_device(asked.rows, device)
        whole = self._gather(logits[rows])
        slots = slots[rows]
        _apply_masks(whole, asked.grammar_masks, asked.grammar_rows)
        raw = whole[to_device(asked.logprob_rows, device)] if len(asked.logprob_rows) else None
        _apply_masks(whole, asked.masks, asked.mask_rows)
        if len(asked.bias_values):
            row, token = to_device(asked.bias, device)
            whole.index_put_((row, token), to_device(asked.bias_values, device), accumulate=True)
        if len(asked.penalized):
            self._penalize(whole, slots, asked)
        self._filter(whole, slots, asked)
        sample = sample_keys if use_triton(whole) else sample_keys_torch
        keys[rows] = sample(whole, slots, self.temperatures, self.seeds, self.steps)
        return raw

    def sampled(
        self, raw: torch.Tensor | None, slots: torch.Tensor, asked: SamplingInput, tokens: torch.Tensor
    ) -> LogprobTensors | None:
        """Note the sampled `tokens` [S] for the penalties; the log-probabilities that were asked for, from `raw`."""
        device = tokens.device
        rows = to_device(asked.rows, device)
        if len(asked.penalized):
            assert self.seen is not None
            some = rows[to_device(asked.penalized, device)]
            place = (slots[some], tokens[some])
            self.seen[place] = (self.seen[place].int() + 2).clamp(max=MOST_SEEN + 1).short()
        if raw is None:
            return None
        ids = tokens[rows[to_device(asked.logprob_rows, device)]]
        return _logprobs(raw, torch.arange(len(ids), device=device), ids, asked.num_logprobs)

    def score(self, hidden: torch.Tensor, asked: SamplingInput) -> LogprobTensors | None:
        """Log-probabilities of the pairs in `asked.score_pairs`, from the step's hidden states [T, H]; None where there are none."""
        if not len(asked.score_rows):
            return None
        device = hidden.device
        index, ids = asked.score_pairs
        parts: list[LogprobTensors] = []
        for start in range(0, len(asked.score_rows), SCORE_ROWS):
            rows = to_device(asked.score_rows[start : start + SCORE_ROWS], device)
            # The pairs are in the order of their rows.
            first, last = np.searchsorted(index, (start, start + len(rows)))
            whole = self._gather(self.head(hidden[rows]))
            pair_rows = to_device(index[first:last] - start, device)
            parts.append(_logprobs(whole, pair_rows, to_device(ids[first:last], device), asked.num_score_top))
        return LogprobTensors(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _gather(self, logits: torch.Tensor) -> torch.Tensor:
        """[E, V] float32 from every rank's [E, columns]."""
        return self.head.tp.all_gather_last(logits)[:, : self.head.vocab_size].float()

    def _penalize(self, whole: torch.Tensor, slots: torch.Tensor, asked: SamplingInput) -> None:
        device = whole.device
        if self.seen is None:
            shape = len(self.temperatures), whole.shape[1]
            self.seen = torch.zeros(shape, dtype=torch.int16, device=device)
        if len(asked.fresh_slots):
            self._start(asked)
        rows = to_device(asked.penalized, device)
        repetition, presence, frequency = to_device(asked.penalties, device)[:, rows].unsqueeze(-1)
        seen = self.seen[slots[rows]].int()
        counts = seen >> 1
        x = whole[rows]
        x = torch.where(seen > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        whole[rows] = x - frequency * counts - presence * (counts > 0)

    def _start(self, asked: SamplingInput) -> None:
        """Put down what sequences that begin to sample hold so far."""
        assert self.seen is not None
        device = self.seen.device
        fresh = to_device(asked.fresh_slots, device)
        slots, tokens, kinds = to_device(asked.history, device)
        place = torch.empty(len(self.seen), dtype=torch.int64, device=device)
        place[fresh] = torch.arange(len(fresh), device=device)
        counts = torch.zeros(len(fresh), self.seen.shape[1], dtype=torch.int32, device=device)
        generated = kinds == 2
        # Added up, unlike the prompt's; a product and not a selection, whose size the host would have to wait for.
        counts.index_put_((place[slots], tokens), 2 * generated.int(), accumulate=True)
        prompt = torch.zeros_like(counts)
        prompt.index_put_((place[slots], tokens), (~generated).int(), accumulate=True)
        self.seen[fresh] = (counts.clamp(max=MOST_SEEN) + (prompt > 0)).short()

    def _filter(self, whole: torch.Tensor, slots: torch.Tensor, asked: SamplingInput) -> None:
        unfiltered = (asked.top_k >= whole.shape[1]) & (asked.top_p >= 1) & (asked.min_p <= 0)
        some = np.flatnonzero(~unfiltered)
        if not len(some):
            return
        device = whole.device
        rows = to_device(some, device)
        temperatures = self.temperatures[slots[rows]]
        # A greedy row's token passes every filter, whatever the scale.
        temperatures = torch.where(temperatures == 0, 1.0, temperatures)
        limits = (to_device(values[some], device) for values in (asked.top_k, asked.top_p, asked.min_p))
        filter_ = filter_logits if use_triton(whole) else filter_logits_torch
        filter_(whole, rows, temperatures, *limits)


def _apply_masks(logits: torch.Tensor, masks: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
    """Set to -inf what the bits of `masks` [m, W] do not allow in `rows` [m] of `logits` [E, V]."""
    if not len(rows):
        return
    where = to_device(rows, logits.device)
    allowed = unpack_masks(to_device(masks, logits.device))[:, : logits.shape[1]]
    logits[where] = logits[where].masked_fill(~allowed, float("-inf"))


def _logprobs(logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, top: int) -> LogprobTensors:
    """Of `ids` [N] in `rows` [N] of `logits` [U, V], and of each row's `top` likeliest."""
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits[rows, ids]
    best = logits.topk(top, dim=-1)
    return LogprobTensors(chosen - total[rows, 0], _ranks(logits, rows, chosen), best.indices, best.values - total)


def _ranks(logits: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """1 + how many logits of the row are larger, for each of `values` [N]; in pieces, as N may be large."""
    ranks = torch.empty(len(values), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), SCORE_ROWS):
        part = slice(start, start + SCORE_ROWS)
        ranks[part] = (logits[rows[part]] > values[part].unsqueeze(1)).sum(-1) + 1
    return ranks
