"""How one request is sampled and when it stops. Plain data: nothing is checked before the request is added, so that one
row with bad parameters becomes one error row and never an exception that takes the others along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real


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
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    seed: int | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty where there is none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def problem(self) -> str | None:
        """What is wrong with these parameters, in one line, or None where nothing is."""
        temperature = self.temperature
        if not _is_number(temperature) or not _is_finite(temperature) or temperature < 0:
            return f"temperature={temperature!r}: must be a finite number of 0 (greedy) or more"
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            return f"max_tokens={self.max_tokens!r}: must be a whole number of 1 or more"
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            return f"seed={self.seed!r}: must be a whole number from 0 to 2**63 - 1, or None"
        if self.stop is not None and not isinstance(self.stop, (str, Sequence)):
            return f"stop={self.stop!r}: must be a string or a list of strings"
        if not all(isinstance(s, str) and s for s in self.stop_strings):
            return f"stop={self.stop!r}: every stop must be a string that is not empty"
        stop_token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(stop_token_ids, Sequence) or not all(_is_int(t) and t >= 0 for t in stop_token_ids):
            return f"stop_token_ids={self.stop_token_ids!r}: must be a list of token ids"
        return None


def _is_int(value: object) -> bool:
    # Integral and Real take numpy's scalars too: a row of a table often holds those.
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
