"""Thinking models: where the thinking block of a sequence ends, what it costs, and what is generated after it.

A block ends with the first end tag (`</think>`) that is generated. Whether it has begun is read from the prompt, of which
only the turn being written counts: the tokens after the last special token (`<|im_start|>` and the like), which no text of a
user can contain as text of the turn. In this turn the last tag decides (`PromptState`):

- "open": a start tag. The template has put it there (DeepSeek R1, QwQ); thinking goes on from there.
- "closed": an end tag. The template has closed it (Qwen3 with `enable_thinking=False`); the answer begins at once.
- "absent": no tag. The model is expected to open the block by itself (Qwen3 by default).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.grammar import GrammarState
from nanovllm.engine.token_masks import allow_all, allow_only
from nanovllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptState = Literal["open", "closed", "absent"]


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """The tags of a model's thinking block.

    Attributes:
        start, end: the tags as text.
        start_ids, end_ids: their token ids. Models trained to think have one token for each. Where a tag is several tokens,
            other tokens with the same text are not taken for it.
        separator_ids: the empty line that such models write after the end tag.
        special_ids: tokens that separate turns.
    """

    start: str
    end: str
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    separator_ids: tuple[int, ...]
    special_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, start: str = "<think>", end: str = "</think>") -> ThinkTags:
        """The tags in the tokens of `tokenizer`.

        Raises:
            UserError: a tag is empty.
        """
        if not start or not end:
            raise UserError("a think tag is empty")

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        start_ids, end_ids = ids(start), ids(end)
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(start, end, start_ids, end_ids, ids("\n\n"), frozenset(special - {*start_ids, *end_ids}))

    def prompt_state(self, prompt_ids: Sequence[int]) -> PromptState:
        """What the prompt's last turn says of thinking; see the module."""
        first = len(prompt_ids)
        while first > 0 and prompt_ids[first - 1] not in self.special_ids:
            first -= 1
        turn = list(prompt_ids[first:])
        opened, closed = _rfind(turn, self.start_ids), _rfind(turn, self.end_ids)
        if opened == closed:  # both -1
            return "absent"
        return "open" if opened > closed else "closed"


class ReasoningGate:
    """Constraint of a sequence that thinks first: has the methods of `GrammarState`, and may hold one for the answer.

    While it thinks, every token is allowed but, where a grammar follows, those that would end the sequence. After
    `thinking_budget` tokens in the block the end tag is forced, token by token. The budget counts tokens of the block only, from
    the first generated one (a start tag that the model writes counts too), and not those of the end tag. Where a grammar
    follows, the empty line after the end tag is forced as well: models write it there, and a grammar that begins at once
    would forbid it.

    Args:
        tags: of the model.
        prompt_ids: the prompt; a closed block in it starts the answer at once.
        inner: constraint of the answer, or None.
        thinking_budget: most tokens in the block, from 0; None is no limit.
        vocab_size: width of a mask in tokens.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(
        self,
        tags: ThinkTags,
        prompt_ids: Sequence[int],
        inner: GrammarState | None,
        thinking_budget: int | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.tags = tags
        self.inner = inner
        self.thinking_budget = thinking_budget
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.prompt_state = tags.prompt_state(prompt_ids)
        self.thinking = self.prompt_state != "closed"
        self.num_thinking_tokens = 0
        self.tail: list[int] = []  # the last tokens of the block, as many as an end tag has
        self.forced: list[int] = []  # tokens that must come next, whatever follows them
        self.ended = False
        if self.thinking:
            self._apply_budget()

    @property
    def needs_mask(self) -> bool:
        """Whether the next token is constrained at all."""
        return bool(self.forced or self.inner)

    @property
    def is_finished(self) -> bool:
        """An end-of-sequence token was accepted."""
        return self.ended or (self.inner is not None and self.inner.is_finished)

    @property
    def is_stopped(self) -> bool:
        """Nothing but an end-of-sequence token may follow."""
        return not self._before_answer and self.inner is not None and self.inner.is_stopped

    @property
    def is_complete(self) -> bool:
        """The answer may end here; without a grammar it may everywhere, but not before it began."""
        return not self._before_answer and (self.inner is None or self.inner.is_complete)

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot go on, or None."""
        return self.inner.problem if self.inner else None

    def accept(self, token_id: int) -> bool:
        """Advance by a generated token; False, and nothing changes, where it is not allowed."""
        if self.forced:
            if token_id != self.forced[0]:
                return False
            del self.forced[0]
            if self.thinking:
                self._watch(token_id)
            return True
        if not self.thinking:
            if self.inner is not None:
                return self.inner.accept(token_id)
            self.ended = self.ended or token_id in self.eos_token_ids
            return True
        if token_id in self.eos_token_ids:
            if self.inner is not None:
                return False
            self.ended = True
            return True
        self.num_thinking_tokens += 1
        self._watch(token_id)
        if self.thinking:
            self._apply_budget()
        return True

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Write the tokens allowed next; see `GrammarState.fill_mask`."""
        if self.forced:
            allow_only(mask, self.forced[:1])
        elif self.inner is None:
            allow_all(mask, self.vocab_size)
        elif self.thinking:
            self.inner.fill_free_mask(mask)
        else:
            self.inner.fill_mask(mask)

    def forced_tokens(self) -> list[int]:
        """Tokens that are the only way on; they are not consumed."""
        if self._before_answer:
            after = [] if self.thinking or self.inner is None else self.inner.forced_tokens()
            return self.forced + after
        return self.inner.forced_tokens() if self.inner else []

    @property
    def mask_state(self) -> GrammarState | None:
        """The state whose mask is this one's, or None where `fill_mask` must be called."""
        return None if self._before_answer else self.inner

    @property
    def _before_answer(self) -> bool:
        return self.thinking or bool(self.forced)

    def _watch(self, token_id: int) -> None:
        """Add a token of the block; the block ends with the end tag."""
        self.tail = [*self.tail, token_id][-len(self.tags.end_ids) :]
        if tuple(self.tail) == self.tags.end_ids:
            self.thinking = False
            self.forced = list(self.tags.separator_ids) if self.inner is not None else []

    def _apply_budget(self) -> None:
        if self.thinking_budget is not None and self.num_thinking_tokens >= self.thinking_budget:
            self.forced = list(self.tags.end_ids)
            if self.prompt_state == "absent" and self.num_thinking_tokens == 0:
                # An empty block as the templates write it, not an end tag out of nowhere.
                self.forced[:0] = self.tags.start_ids + self.tags.separator_ids


Constraint = GrammarState | ReasoningGate


def split_reasoning(text: str, tags: ThinkTags, prompt_state: PromptState) -> tuple[str, str]:
    """Reasoning and answer of a generated text, each without whitespace at its ends (answers keep it at their end).

    Everything before the first end tag is reasoning, a start tag at its beginning left out; everything after it is the
    answer, further tags included. Without an end tag (`max_tokens` came first) all is reasoning where a block is open: the
    prompt has opened it, or the text begins with a start tag. Else all is answer.

    Args:
        text: decoded with special tokens kept where the tags are special tokens.
        tags: of the model.
        prompt_state: of the prompt (`ThinkTags.prompt_state`): after "closed" there is no reasoning.
    """
    if prompt_state == "closed":
        return "", text.lstrip()
    reasoning, end, answer = text.partition(tags.end)
    begins = reasoning.lstrip().startswith(tags.start)
    if not end and prompt_state == "absent" and not begins:
        return "", text.lstrip()
    if begins:
        reasoning = reasoning.lstrip()[len(tags.start) :]
    return reasoning.strip(), answer.lstrip()


def split_token_ids(
    token_ids: Sequence[int], tags: ThinkTags, prompt_state: PromptState
) -> tuple[list[int], list[int]]:
    """`split_reasoning` of token ids: exact where a tag is a token, and the same tokens `ReasoningGate` splits at.

    Returns:
        Ids of the reasoning and of the answer, without the tags; whitespace stays.
    """
    ids = list(token_ids)
    if prompt_state == "closed":
        return [], ids
    start, end = len(tags.start_ids), len(tags.end_ids)
    at = next((i for i in range(len(ids) - end + 1) if tuple(ids[i : i + end]) == tags.end_ids), None)
    begins = tuple(ids[:start]) == tags.start_ids
    if at is None and prompt_state == "absent" and not begins:
        return [], ids
    reasoning, answer = (ids, []) if at is None else (ids[:at], ids[at + end :])
    return reasoning[start:] if begins else reasoning, answer


def _rfind(items: list[int], part: tuple[int, ...]) -> int:
    """Index of the last `part` in `items`, or -1."""
    size, backwards, start = len(part), items[::-1], 0
    # `index` looks at a long prompt in microseconds.
    with suppress(ValueError):
        while True:
            end = len(items) - backwards.index(part[-1], start)
            if tuple(items[max(0, end - size) : end]) == part:
                return end - size
            start = len(items) - end + 1
    return -1
