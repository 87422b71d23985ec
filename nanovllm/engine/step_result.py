"""What a step returns to the engine: tokens, and log-probabilities where a request asked for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.utils.transfer import HostCopy


class LogprobTensors(NamedTuple):
    """Of N tokens: log-probabilities [N] and ranks [N]; of the U positions they are at: likeliest ids [U, k] and theirs [U, k]."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


class Logprobs(NamedTuple):
    """`LogprobTensors` on the host."""

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class StepResult(NamedTuple):
    """The token of each sequence that samples, in batch order; of generated tokens and of scored positions what was asked for."""

    tokens: list[int]
    logprobs: Logprobs | None = None
    scores: Logprobs | None = None


class StepCopy:
    """A step's result on its way to the host."""

    def __init__(
        self, tokens: torch.Tensor, logprobs: LogprobTensors | None = None, scores: LogprobTensors | None = None
    ) -> None:
        self._logprobs = None if logprobs is None else [HostCopy(tensor) for tensor in logprobs]
        self._scores = None if scores is None else [HostCopy(tensor) for tensor in scores]
        self._tokens = HostCopy(tokens)  # the last to arrive

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self._tokens.ready()

    def result(self) -> StepResult:
        """The values, once they have arrived."""
        tokens = self._tokens.tolist()
        return StepResult(tokens, _on_host(self._logprobs), _on_host(self._scores))


def _on_host(copies: list[HostCopy] | None) -> Logprobs | None:
    return None if copies is None else Logprobs(*(copy.tolist() for copy in copies))
