"""What one sequence asks of the sampler beyond a temperature, and one step's worth of it as flat arrays. Numpy only.

Sequences that ask for nothing have none of this, and a step without any that do is launched as if this module did not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from nanovllm.engine.token_masks import allow_only, mask_words
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.reasoning import Constraint
    from nanovllm.engine.scheduler import ScheduledSequence
    from nanovllm.engine.step_result import StepResult

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.int32]


# What one is made of.
_wishes = attrgetter(
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "bad_words",
    "logit_bias", "allowed_token_ids", "logprobs", "prompt_logprobs", "structured_outputs", "thinking_budget",
)  # fmt: skip
_NO_WISHES = _wishes(SamplingParams())


def has_wishes(params: SamplingParams) -> bool:
    """Whether `params` may ask for more than a temperature."""
    return any(value is not default for value, default in zip(_wishes(params), _NO_WISHES, strict=True))


class RowSampling:
    """One sequence's wishes, checked and worked out when its request is made.

    Attributes:
        params: the request's.
        bias_ids, bias_values: added to the logits in every step; -inf for what is never sampled.
        allowed: mask [W] of `allowed_token_ids`, or None.
        early_ids: not sampled before `params.min_tokens` tokens.
        bad_words: token ids of those that are several tokens long, which are known only once the tokens before are.
        constraint: a grammar, or None; likewise.
        first_scored: the first token position whose logits are looked at; the prefix cache must not skip it.
        scored: position -> token ids whose log-probability there is asked for; empty where none is.
        scores: what has been found: position -> `PositionScores`.
        logprobs: what has been found of generated tokens, in order.
        needs_logits: whether more than a constraint is asked of the sampler, which then works on all logits of the row.
        samples_differently: whether the sampler must know of it at all, or only report scores of the prompt.
    """

    __slots__ = (
        "allowed",
        "bad_words",
        "bias_ids",
        "bias_values",
        "constraint",
        "early_ids",
        "first_scored",
        "logprobs",
        "needs_logits",
        "params",
        "samples_differently",
        "scored",
        "scores",
    )

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        bad_words: Iterable[list[int]] = (),
        early_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
        scored: dict[int, list[int]] | None = None,
    ) -> None:
        self.params = params
        bias = {int(token): float(value) for token, value in (params.logit_bias or {}).items()}
        bad_words = list(bad_words)
        bias.update({word[0]: -np.inf for word in bad_words if len(word) == 1})
        self.bias_ids = np.array(list(bias), dtype=np.int64)
        self.bias_values = np.array(list(bias.values()), dtype=np.float32)
        self.bad_words = [word for word in bad_words if len(word) > 1]
        self.early_ids = sorted(set(early_ids)) if params.min_tokens else []
        self.allowed = None if params.allowed_token_ids is None else _mask(params.allowed_token_ids, vocab_size)
        self.constraint = constraint
        self.scored = scored or {}
        self.first_scored = min(self.scored, default=None)
        self.scores: dict[int, PositionScores] = {}
        self.logprobs: list[SampledLogprobs] = []
        self.needs_logits = (
            bool(self.bad_words)
            or self.penalizes
            or self.allowed is not None
            or len(self.bias_ids) > 0
            or bool(self.early_ids)
            or params.logprobs is not None
            # A greedy row's token is the likeliest one, which is never filtered out.
            or (params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0))
        )
        self.samples_differently = self.needs_logits or constraint is not None

    @property
    def needs_tokens(self) -> bool:
        """Whether the tokens so far decide what may come next, so that the host must have read them."""
        return self.constraint is not None or bool(self.bad_words)

    @property
    def accepts_together(self) -> bool:
        """Whether nothing but the mask of a grammar decides which tokens there may be."""
        return not self.needs_logits and self.constraint is not None and self.constraint.mask_state is not None

    @property
    def limits_tokens(self) -> bool:
        """Whether tokens are ruled out, or preferred, whatever the constraint says: its only way on may not be one then."""
        return bool(self.bad_words or self.early_ids or self.allowed is not None or len(self.bias_ids))

    @property
    def penalizes(self) -> bool:
        """Whether the logits depend on which tokens were there before."""
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0

    def banned_next(self, token_ids: Sequence[int], num_prompt_tokens: int) -> list[int]:
        """The last tokens of bad words whose other tokens are the last of `token_ids`, after the prompt."""
        banned: list[int] = []
        for word in self.bad_words:
            start = len(token_ids) - len(word) + 1
            if start >= num_prompt_tokens and list(token_ids[start:]) == word[:-1]:
                banned.append(word[-1])
        return banned


def _mask(ids: Iterable[int], vocab_size: int) -> Masks:
    mask = np.empty(mask_words(vocab_size), dtype=np.int32)
    allow_only(mask, ids)
    return mask


class SampledLogprobs(NamedTuple):
    """Of one generated token: its id, log-probability and rank (1: the likeliest); the likeliest ids and theirs."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class PositionScores(NamedTuple):
    """Of one scored position: log-probabilities and ranks of the ids asked for; the likeliest ids and theirs."""

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[int]
    top_logprobs: list[float]


class SamplingInput(NamedTuple):
    """What a step's sampler must know beside temperatures, for E of the step's S sampling rows, and which logits it must report.

    Attributes:
        rows: [E] indices among the sampling rows.
        top_k: [E], the vocabulary's size for all tokens. top_p, min_p: [E].
        penalties: [3, E] repetition, presence, frequency; penalized: [Q] indices into E of rows with any.
        history: [3, M] of sequences that begin to sample with penalties: state slot, token id, and 1 for a token of the prompt, 2
            for one of the output. fresh_slots: theirs.
        bias: [2, B] index into E and token id; bias_values: [B].
        masks: [m, W], mask_rows: [m] indices into E; several may concern one row.
        grammar_masks, grammar_rows: likewise, before log-probabilities are taken.
        row_masks: [d, W] of rows that ask for a mask and nothing else; masked_rows: [d] theirs among the sampling rows, none of
            which is in `rows`.
        logprob_rows: [L] indices into E whose tokens' log-probabilities are asked for; num_logprobs: most alternatives of any.
        score_rows: [U] hidden rows of the step whose logits are asked for; score_pairs: [2, P] index into U and token id.
        num_score_top: most alternatives of any.
    """

    rows: Ints
    top_k: Ints
    top_p: Floats
    min_p: Floats
    penalties: Floats
    penalized: Ints
    history: Ints
    fresh_slots: Ints
    bias: Ints
    bias_values: Floats
    masks: Masks
    mask_rows: Ints
    grammar_masks: Masks
    grammar_rows: Ints
    row_masks: Masks
    masked_rows: Ints
    logprob_rows: Ints
    num_logprobs: int
    score_rows: Ints
    score_pairs: Ints
    num_score_top: int

    @property
    def asks_only_masks(self) -> bool:
        """Whether there are masks, and nothing else."""
        return len(self.masked_rows) > 0 and not len(self.rows) and not len(self.score_rows)

    def with_grammar(
        self, masks: Masks, masked_rows: Sequence[int], rows: Sequence[int], bans: Sequence[tuple[int, int]]
    ) -> SamplingInput:
        """This, and what only the latest tokens tell: masks of the `masked_rows` and then of `rows` (indices into E), and banned
        (row, token)s."""
        return self._replace(
            row_masks=masks[: len(masked_rows)],
            masked_rows=np.array(masked_rows, dtype=np.int64),
            grammar_masks=masks[len(masked_rows) :],
            grammar_rows=np.array(rows, dtype=np.int64),
            bias=np.concatenate((self.bias, np.array(bans, dtype=np.int64).reshape(-1, 2).T), axis=1),
            bias_values=np.concatenate((self.bias_values, np.full(len(bans), -np.inf, dtype=np.float32))),
        )


def build_sampling_input(batch: Sequence[ScheduledSequence], vocab_size: int) -> SamplingInput | None:
    """The wishes of an ordered `batch`, as far as they do not depend on tokens the host has not read; None where there are none.

    To be called before `build_model_input`, which notes that the device knows the sequences.
    """
    if not any(item.seq.extra for item in batch):
        return None
    rows: list[int] = []
    params: list[SamplingParams] = []
    penalized: list[int] = []
    history: list[Ints] = []
    fresh: list[int] = []
    bias: list[tuple[int, int]] = []
    bias_values: list[float] = []
    masks: list[Masks] = []
    mask_rows: list[int] = []
    logprob_rows: list[int] = []
    num_logprobs = num_score_top = 0
    constrained = False
    score_rows: list[int] = []
    score_pairs: list[tuple[int, int]] = []
    first_row = sampling = 0
    for seq, start, num_tokens, samples in batch:
        extra = seq.extra
        if extra is not None and extra.scored:
            for position in range(start, start + num_tokens):
                ids = extra.scored.get(position)
                if ids is not None:
                    score_pairs += [(len(score_rows), token) for token in ids]
                    score_rows.append(first_row + position - start)
                    num_score_top = max(num_score_top, extra.params.prompt_logprobs or 0)
        if extra is not None and samples and extra.constraint is not None:
            constrained = True
        if extra is not None and samples and extra.needs_logits:
            e, p = len(rows), extra.params
            rows.append(sampling)
            params.append(p)
            if extra.penalizes:
                penalized.append(e)
                if not seq.on_device:
                    fresh.append(seq.slot)
                    kinds = np.full(len(seq.token_ids), 2)
                    kinds[: seq.num_prompt_tokens] = 1
                    history.append(np.stack((np.full(len(kinds), seq.slot), np.array(seq.token_ids), kinds)))
            bias += [(e, token) for token in extra.bias_ids.tolist()]
            bias_values += extra.bias_values.tolist()
            if seq.num_generated_tokens + seq.num_pending - 1 < p.min_tokens:
                bias += [(e, token) for token in extra.early_ids]
                bias_values += [-np.inf] * len(extra.early_ids)
            if extra.allowed is not None:
                masks.append(extra.allowed)
                mask_rows.append(e)
            if p.logprobs is not None:
                logprob_rows.append(e)
                num_logprobs = max(num_logprobs, p.logprobs)
        first_row += num_tokens
        sampling += samples
    if not rows and not score_rows and not constrained:
        return None
    words = mask_words(vocab_size)
    return SamplingInput(
        rows=np.array(rows, dtype=np.int64),
        top_k=np.array([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        penalties=np.array(
            [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params], dtype=np.float32
        )
        .reshape(-1, 3)
        .T,
        penalized=np.array(penalized, dtype=np.int64),
        history=np.concatenate(history, axis=1) if history else np.zeros((3, 0), dtype=np.int64),
        fresh_slots=np.array(fresh, dtype=np.int64),
        bias=np.array(bias, dtype=np.int64).reshape(-1, 2).T,
        bias_values=np.array(bias_values, dtype=np.float32),
        masks=np.stack(masks) if masks else np.zeros((0, words), dtype=np.int32),
        mask_rows=np.array(mask_rows, dtype=np.int64),
        grammar_masks=np.zeros((0, words), dtype=np.int32),
        grammar_rows=np.zeros(0, dtype=np.int64),
        row_masks=np.zeros((0, words), dtype=np.int32),
        masked_rows=np.zeros(0, dtype=np.int64),
        logprob_rows=np.array(logprob_rows, dtype=np.int64),
        num_logprobs=num_logprobs,
        score_rows=np.array(score_rows, dtype=np.int64),
        score_pairs=np.array(score_pairs, dtype=np.int64).reshape(-1, 2).T,
        num_score_top=num_score_top,
    )


def note_logprobs(batch: Sequence[ScheduledSequence], result: StepResult) -> None:
    """Give what a step reported to the sequences that asked for it."""
    if result.scores is not None:
        pairs = zip(result.scores.logprobs, result.scores.ranks, strict=True)
        tops = zip(result.scores.top_ids, result.scores.top_logprobs, strict=True)
        for seq, start, num_tokens, _ in batch:
            if seq.extra is None or not seq.extra.scored:
                continue
            top = seq.extra.params.prompt_logprobs or 0
            for position in range(start, start + num_tokens):
                ids = seq.extra.scored.get(position)
                if ids is not None:
                    logprobs, ranks = zip(*(next(pairs) for _ in ids), strict=True)
                    top_ids, top_logprobs = next(tops)
                    scores = PositionScores(list(logprobs), list(ranks), top_ids[:top], top_logprobs[:top])
                    seq.extra.scores[position] = scores
    if result.logprobs is not None:
        rows = zip(*result.logprobs, strict=True)
        sampled = zip((item.seq for item in batch if item.samples), result.tokens, strict=True)
        for seq, token_id in sampled:
            if seq.extra is not None and seq.extra.params.logprobs is not None:
                top = seq.extra.params.logprobs
                logprob, rank, top_ids, top_logprobs = next(rows)
                # One a token, also for the token too many of a sequence that has ended, which nobody looks at.
                seq.extra.logprobs.append(SampledLogprobs(token_id, logprob, rank, top_ids[:top], top_logprobs[:top]))
