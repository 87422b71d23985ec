"""Stop rules and text: decides after each token whether a sequence is finished, and makes its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from tokenizers.decoders import DecodeStream

from nanovllm.engine.reasoning import ThinkTags, split_token_ids
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import FinishReason, Logprob, RequestOutput, TokenLogprobs, error_output
from nanovllm.structured_outputs import parsed_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class IncrementalDetokenizer:
    """Text of a growing token list, for sequences whose stop strings must be seen as they appear.

    Characters that end in the middle of a token's bytes appear once they are whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        # A slow (pure Python) tokenizer has no backend to stream with; it decodes the whole list again.
        self.backend = getattr(tokenizer, "_tokenizer", None)
        self.stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self.token_ids: list[int] = []
        self.text = ""

    def append(self, token_id: int) -> str:
        """Add a token; the whole text so far."""
        self.token_ids.append(token_id)
        if self.backend is None:
            self.text = self.tokenizer.decode(self.token_ids, skip_special_tokens=self.skip_special_tokens)
            return self.text
        try:
            self.text += self.stream.step(self.backend, token_id) or ""
        except Exception:  # the stream's own error on byte sequences that are no text; it cannot go on from there
            self.text = self.tokenizer.decode(self.token_ids, skip_special_tokens=self.skip_special_tokens)
            self.stream = DecodeStream(skip_special_tokens=self.skip_special_tokens)
        return self.text


class Verdict(NamedTuple):
    """What a constraint says of a token: whether it fits, and whether nothing but the end may follow."""

    fits: bool
    stopped: bool


class OutputProcessor:
    """Stop rules in this order: end-of-sequence, stop tokens, stop strings, length.

    Args:
        tokenizer: None where the model has none: outputs then have no text, and stop strings cannot be used.
        eos_token_ids: ids that end a sequence unless it ignores them.
        think_tags: of a model that thinks first, whose reasoning becomes a part of its own; else None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_token_ids: Iterable[int],
        think_tags: ThinkTags | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.think_tags = think_tags
        self.eos_token_ids = frozenset(eos_token_ids)
        self.detokenizers: dict[int, IncrementalDetokenizer] = {}
        self.token_texts: dict[int, str] = {}

    def append(self, seq: Sequence, token_id: int, verdict: Verdict | None = None) -> FinishReason | None:
        """Add a sampled token to `seq`; why it is finished, or None where it goes on. `verdict`: where its constraint has it already."""
        seq.token_ids.append(token_id)
        constraint = seq.extra.constraint if seq.extra is not None else None
        if constraint is not None:
            fits, stopped = verdict or (constraint.accept(token_id), constraint.is_stopped)
            if (not fits or stopped) and constraint.problem is not None:
                seq.problem = (
                    f"structured_outputs cannot go on after {seq.num_generated_tokens} tokens: {constraint.problem}"
                )
                return "error"
            if not fits:
                seq.problem = (
                    f"token {token_id} was sampled, which structured_outputs does not allow beside the other parameters"
                )
                return "error"
        if self._is_stop_token(seq, token_id) or (seq.params.stop and self._stop_string_seen(seq, token_id)):
            return "stop"
        if constraint is not None and stopped:
            return "stop"
        return "length" if seq.num_generated_tokens >= seq.max_new_tokens else None

    def output(self, seq: Sequence) -> RequestOutput:
        """The output of a finished sequence."""
        self.detokenizers.pop(seq.seq_id, None)
        if seq.problem is not None:
            return error_output(seq.problem, seq.num_prompt_tokens)
        extra = seq.extra
        reasoning, answer = self._split(seq)
        output = RequestOutput(
            text=self._text(seq, answer),
            token_ids=seq.generated_token_ids,
            finish_reason=seq.finish_reason or "error",
            num_input_tokens=seq.num_prompt_tokens,
            num_generated_tokens=seq.num_generated_tokens,
            num_cached_tokens=max(0, seq.num_cached_tokens),
            logprobs=None,
            error=None,
        )
        if self.think_tags is not None:
            output["reasoning_text"] = None if reasoning is None else self._decode(seq, reasoning).strip()
            output["text"] = output["text"].lstrip()
        if extra is None:
            return output
        if seq.params.logprobs is not None:
            output["logprobs"] = [
                self._logprobs([(t.token_id, t.logprob, t.rank)], t.top_ids, t.top_logprobs)
                for t in extra.logprobs[: seq.num_generated_tokens]
            ]
        if seq.params.prompt_logprobs is not None:
            output["prompt_logprobs"] = [None]
            for position in range(seq.num_prompt_tokens - 1):
                scores = extra.scores[position]
                own = (seq.token_ids[position + 1], scores.logprobs[0], scores.ranks[0])
                output["prompt_logprobs"].append(self._logprobs([own], scores.top_ids, scores.top_logprobs))
        structure = seq.params.structure
        if structure is not None and extra.constraint is not None:
            complete = extra.constraint.is_complete
            output["parsed"], _ = parsed_value(structure, output["text"], seq.finish_reason, complete)
        return output

    def _logprobs(
        self, own: list[tuple[int, float, int]], top_ids: list[int], top_logprobs: list[float]
    ) -> TokenLogprobs:
        """Of a position the token that is there, which comes first, and the likeliest ones, as (id, log-probability, rank)."""
        entries = [*own, *((i, p, rank) for rank, (i, p) in enumerate(zip(top_ids, top_logprobs, strict=True), 1))]
        found: TokenLogprobs = {}
        for i, p, rank in entries:
            if i not in found:
                found[i] = Logprob(p, rank, self._token_text(i))
        return found

    def _token_text(self, token_id: int) -> str | None:
        if self.tokenizer is None:
            return None
        text = self.token_texts.get(token_id)
        if text is None:
            text = self.token_texts[token_id] = self.tokenizer.decode([token_id])
        return text

    def forget(self, seq: Sequence) -> None:
        """Drop what is kept for a sequence that ended without an output."""
        self.detokenizers.pop(seq.seq_id, None)

    def _is_stop_token(self, seq: Sequence, token_id: int) -> bool:
        if token_id in self.eos_token_ids and not seq.params.ignore_eos:
            return True
        return token_id in (seq.params.stop_token_ids or ())

    def _stop_string_seen(self, seq: Sequence, token_id: int) -> bool:
        if self.tokenizer is None:
            return False
        detokenizer = self.detokenizers.get(seq.seq_id)
        if detokenizer is None:
            skip = seq.params.skip_special_tokens
            detokenizer = self.detokenizers[seq.seq_id] = IncrementalDetokenizer(self.tokenizer, skip)
        before = len(detokenizer.text)
        text = detokenizer.append(token_id)
        # A stop string may begin in text that was there before this token.
        return seq.num_generated_tokens >= seq.params.min_tokens and any(
            stop in text[max(0, before - len(stop)) :] for stop in seq.params.stop_strings
        )

    def _split(self, seq: Sequence) -> tuple[list[int] | None, list[int]]:
        """Tokens of the reasoning, None where there is none, and of the answer."""
        token_ids = seq.generated_token_ids
        if self.think_tags is None:
            return None, token_ids
        state = self.think_tags.prompt_state(seq.token_ids[: seq.num_prompt_tokens])
        reasoning, answer = split_token_ids(token_ids, self.think_tags, state)
        return reasoning or None, answer

    def _decode(self, seq: Sequence, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=seq.params.skip_special_tokens)
        return text

    def _text(self, seq: Sequence, token_ids: list[int]) -> str:
        """The text of the answer `token_ids`, cut where a stop string begins."""
        keep = seq.params.include_stop_str_in_output
        if token_ids and not keep and self._is_stop_token(seq, token_ids[-1]):
            token_ids = token_ids[:-1]
        text = self._decode(seq, token_ids)
        if seq.finish_reason != "stop" and seq.params.min_tokens:
            return text  # what there is of them came before they counted
        found = [(at, stop) for stop in seq.params.stop_strings if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            text = text[: at + len(stop)] if keep else text[:at]
        return text
