"""A request of several sequences: samples of one prompt, or one prompt continued by the labels to be scored."""

from __future__ import annotations

from collections.abc import Callable

from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput


class RequestGroup:
    """Sequences that run side by side and end as one output.

    Args:
        combine: makes the request's output from its sequences and theirs, in the order of `members`.

    Attributes:
        members: all sequences. The first one stands for the request: its id is the request's.
    """

    def __init__(
        self, members: list[Sequence], combine: Callable[[list[Sequence], list[RequestOutput]], RequestOutput]
    ) -> None:
        self.members = members
        self._combine = combine
        self._outputs: dict[int, RequestOutput] = {}
        for member in members:
            member.group = self

    @property
    def first(self) -> Sequence:
        """The sequence that stands for the request."""
        return self.members[0]

    def finished(self, seq: Sequence, output: RequestOutput) -> RequestOutput | None:
        """Note that a sequence ended; the request's output where it was the last."""
        self._outputs[seq.seq_id] = output
        if len(self._outputs) < len(self.members):
            return None
        return self._combine(self.members, [self._outputs[member.seq_id] for member in self.members])
