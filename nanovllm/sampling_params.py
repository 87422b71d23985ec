"""How one request is sampled and when it stops. Plain data: nothing is checked before the request is added, so that one
row with bad parameters becomes one error row and never an exception that takes the others along.

Names and meanings are vLLM's where it has them. The order in which they act on a row's logits, as in vLLM: structured output,
allowed_token_ids, bad_words, min_tokens and logit_bias, the three penalties, temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import attrgetter
from typing import Any

from nanovllm.errors import UserError
from nanovllm.structured_outputs import StructuredOutputsParams

# Most alternatives reported for a token: each is copied to the host and kept until its request ends.
MAX_LOGPROBS = 20
# Most samples of one prompt, which run side by side.
MAX_SAMPLES = 128


@dataclass(slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        max_tokens: most tokens to generate (the prompt does not count).
        ignore_eos: go on past end-of-sequence tokens.
        stop: one or several strings; generation ends when one appears, and the text ends before it.
        stop_token_ids: further token ids that end generation.
        include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.
        seed: the request's random numbers depend on it and on nothing else; None draws one from the engine's seed.
        top_k: sample among the k likeliest tokens; 0 and -1: among all.
        top_p: sample among the fewest likeliest tokens that together have this probability, after `top_k`.
        min_p: leave out tokens whose probability is below this part of the likeliest one's.
        repetition_penalty: above 1, tokens of the prompt and the output become less likely: a logit is divided by it where
            positive, else multiplied.
        presence_penalty: taken off the logit of every token that is in the output.
        frequency_penalty: taken off the logit of a token for each time it is in the output.
        min_tokens: end-of-sequence and stop tokens cannot be sampled, and stop strings do not count, before so many tokens.
        bad_words: strings whose tokens are never generated, at the beginning of a word or inside.
        logit_bias: added to the logits of token ids.
        allowed_token_ids: nothing else is sampled.
        n: samples of the prompt; sample i > 0 has a seed that follows from `seed` and i.
        logprobs: report the log-probability of every generated token, and of so many of the likeliest ones, before any of the
            above but structured output changed them.
        prompt_logprobs: likewise for the prompt's tokens, given those before them.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: a form the output must have; a mapping with one of the keys of `StructuredOutputsParams` will do.
        labels: choose among these texts instead of generating: each is scored as a continuation of the prompt.
        thinking_budget: most tokens between the model's marks of reasoning, after which the closing one is forced.
        lora_adapter: name of one of the engine's `lora_adapters`, which then changes the model for this request.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    seed: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    bad_words: Sequence[str] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    labels: Sequence[str] | None = None
    thinking_budget: int | None = None
    lora_adapter: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty where there is none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """`structured_outputs`, made from a mapping where it is one.

        Raises:
            UserError: it is neither, or has an unknown key.
        """
        given = self.structured_outputs
        return None if given is None else StructuredOutputsParams.coerce(given)

    def problem(self) -> str | None:
        """What is wrong with these parameters, in one line, or None where nothing is."""
        return self._number_problem() or self._list_problem() or self._combination_problem()

    def _number_problem(self) -> str | None:
        for (name, least, most, what), value, default in zip(_NUMBERS, _numbers(self), _DEFAULTS, strict=True):
            if value is default:
                continue
            if name in _REALS:
                if not _is_number(value) or not _is_finite(value) or not least <= value <= most:
                    return f"{name}={value!r}: must be {what}"
                if name in ("top_p", "repetition_penalty") and value == 0:
                    return f"{name}={value!r}: must be {what}"
            elif not (_is_int(value) and least <= value <= most) and not (value is None and name in _OPTIONAL):
                return f"{name}={value!r}: must be {what}"
        return None

    def _list_problem(self) -> str | None:
        if all(value is None for value in _lists(self)):
            return None
        if self.lora_adapter is not None and not isinstance(self.lora_adapter, str):
            return f"lora_adapter={self.lora_adapter!r}: must be the name of an adapter, or None"
        if self.stop is not None and not isinstance(self.stop, (str, Sequence)):
            return f"stop={self.stop!r}: must be a string or a list of strings"
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            return f"stop={self.stop!r}: every stop must be a string that is not empty"
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = getattr(self, name)
            if ids is not None and not _is_id_list(ids):
                return f"{name}={ids!r}: must be a list of token ids"
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            return "allowed_token_ids is empty; leave it out to allow every token"
        for name, least in (("bad_words", 0), ("labels", 2)):
            words = getattr(self, name)
            if words is None:
                continue
            if isinstance(words, str) or not isinstance(words, Sequence):
                return f"{name}={words!r}: must be a list of strings"
            if not all(isinstance(word, str) and word for word in words):
                return f"{name}={words!r}: every one must be a string that is not empty"
            if len(set(words)) < max(least, len(words)):
                return f"{name}={words!r}: must be {least} or more strings, none of them twice"
        bias = self.logit_bias
        if bias is not None:
            if not isinstance(bias, Mapping) or not all(_is_token_key(key) for key in bias):
                return f"logit_bias={bias!r}: must map token ids to numbers"
            if not all(_is_number(value) and _is_finite(value) for value in bias.values()):
                return f"logit_bias={bias!r}: every bias must be a finite number"
        return None

    def _combination_problem(self) -> str | None:
        if self.n > 1 and self.temperature == 0:
            return f"n={self.n!r}: with temperature=0 all samples are the same; use n=1 or a temperature above 0"
        if self.min_tokens > self.max_tokens:
            return f"min_tokens={self.min_tokens!r}: must not be more than max_tokens={self.max_tokens!r}"
        if self.labels is not None:
            for name in ("structured_outputs", "logprobs", "prompt_logprobs"):
                if getattr(self, name) is not None:
                    return f"labels and {name} do not go together: labels are scored, nothing is generated"
            if self.n != 1:
                return f"n={self.n!r}: with labels it must be 1, as nothing is sampled"
        try:
            structured = self.structure
        except UserError as error:
            return str(error)
        return None if structured is None else structured.problem()


_COUNT = "a whole number of 1 or more"
# Name, least, most, and what it must be.
_NUMBERS: list[tuple[str, float, float, str]] = [
    ("temperature", 0, math.inf, "a finite number of 0 (greedy) or more"),
    ("top_p", 0, 1, "a number above 0, at most 1 (all tokens)"),
    ("min_p", 0, 1, "a number from 0 (all tokens) to 1"),
    ("repetition_penalty", 0, math.inf, "a finite number above 0; 1 changes nothing"),
    ("presence_penalty", -2, 2, "a number from -2 to 2"),
    ("frequency_penalty", -2, 2, "a number from -2 to 2"),
    ("max_tokens", 1, math.inf, _COUNT),
    ("seed", 0, 2**63 - 1, "a whole number from 0 to 2**63 - 1, or None"),
    ("top_k", -1, math.inf, "a whole number of 1 or more; 0 or -1 for all tokens"),
    ("min_tokens", 0, math.inf, "a whole number of 0 or more"),
    ("n", 1, MAX_SAMPLES, f"a whole number from 1 to {MAX_SAMPLES}"),
    ("logprobs", 0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}, or None"),
    ("prompt_logprobs", 0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}, or None"),
    ("thinking_budget", 0, math.inf, "a whole number of 0 or more, or None"),
]
_REALS = {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_OPTIONAL = {"seed", "logprobs", "prompt_logprobs", "thinking_budget"}
# A job asks them of every row, most of which leave most of them as they are.
_numbers = attrgetter(*(name for name, *_ in _NUMBERS))
_DEFAULTS = _numbers(SamplingParams())
_lists = attrgetter("lora_adapter", "stop", "stop_token_ids", "allowed_token_ids", "bad_words", "labels", "logit_bias")


def _is_int(value: object) -> bool:
    # Integral and Real take numpy's scalars too: a row of a table often holds those. They are ten times slower to ask than a type.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _is_id_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_int(t) and t >= 0 for t in value)


def _is_token_key(value: object) -> bool:
    # JSON and OpenAI's interface have text for keys.
    return (_is_int(value) and value >= 0) or (isinstance(value, str) and value.isdecimal())  # type: ignore[operator]


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_number(value: object) -> bool:
    return type(value) in (int, float) or (isinstance(value, Real) and not isinstance(value, bool))
