"""Stop rules and text: decides after each token whether a sequence is finished, and makes its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import FinishReason, RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class IncrementalDetokenizer:
    """Text of a growing token list, for sequences whose stop strings must be seen as they appear.

    Characters that end in the middle of a token's bytes appear once they are whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A slow (pure Python) tokenizer has no backend to stream with; it decodes the whole list again.
        self.backend = getattr(tokenizer, "_tokenizer", None)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.token_ids: list[int] = []
        self.text = ""

    def append(self, token_id: int) -> str:
        """Add a token; the whole text so far."""
        self.token_ids.append(token_id)
        if self.backend is None:
            self.text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
            return self.text
        try:
            self.text += self.stream.step(self.backend, token_id) or ""
        except Exception:  # the stream's own error on byte sequences that are no text; it cannot go on from there
            self.text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
            self.stream = DecodeStream(skip_special_tokens=True)
        return self.text


class OutputProcessor:
    """Stop rules in this order: end-of-sequence, stop tokens, stop strings, length.

    Args:
        tokenizer: None where the model has none: outputs then have no text, and stop strings cannot be used.
        eos_token_ids: ids that end a sequence unless it ignores them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, eos_token_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.detokenizers: dict[int, IncrementalDetokenizer] = {}

    def append(self, seq: Sequence, token_id: int) -> FinishReason | None:
        """Add a sampled token to `seq`; why it is finished, or None where it goes on."""
        seq.token_ids.append(token_id)
        if self._is_stop_token(seq, token_id) or (seq.params.stop and self._stop_string_seen(seq, token_id)):
            return "stop"
        return "length" if seq.num_generated_tokens >= seq.max_new_tokens else None

    def output(self, seq: Sequence) -> RequestOutput:
        """The output of a finished sequence."""
        self.detokenizers.pop(seq.seq_id, None)
        return RequestOutput(
            text=self._text(seq),
            token_ids=seq.generated_token_ids,
            finish_reason=seq.finish_reason or "error",
            num_input_tokens=seq.num_prompt_tokens,
            num_generated_tokens=seq.num_generated_tokens,
            num_cached_tokens=max(0, seq.num_cached_tokens),
            logprobs=None,
            error=None,
        )

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
            detokenizer = self.detokenizers[seq.seq_id] = IncrementalDetokenizer(self.tokenizer)
        before = len(detokenizer.text)
        text = detokenizer.append(token_id)
        # A stop string may begin in text that was there before this token.
        return any(stop in text[max(0, before - len(stop)) :] for stop in seq.params.stop_strings)

    def _text(self, seq: Sequence) -> str:
        if self.tokenizer is None:
            return ""
        token_ids = seq.generated_token_ids
        keep = seq.params.include_stop_str_in_output
        if token_ids and not keep and self._is_stop_token(seq, token_ids[-1]):
            token_ids = token_ids[:-1]
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        found = [(at, stop) for stop in seq.params.stop_strings if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            text = text[: at + len(stop)] if keep else text[:at]
        return text
