"""A prompt that kills its engine, on order: for tests of what surrounds an engine. Without the variable it costs nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Literal, get_args

from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.errors import UserError

VARIABLE = "NANOVLLM_TEST_POISON"
How = Literal["raise", "kill", "segfault", "hang"]


class Poison:
    """Ends the first step that computes a poisoned request: with an exception, SIGKILL, SIGSEGV, or never."""

    def __init__(self, how: How, text: str) -> None:
        """Args: `how` the engine ends; `text` that makes a prompt a poisoned one."""
        self._how = how
        self._text = text
        self._seq_ids: set[int] = set()

    @classmethod
    def from_environment(cls) -> Poison | None:
        """What `NANOVLLM_TEST_POISON=how:text` orders; None where it is not set.

        Raises:
            UserError: `how` is not raise, kill, segfault or hang.
        """
        order = os.environ.get(VARIABLE)
        if not order:
            return None
        how, _, text = order.partition(":")
        if how not in get_args(How) or not text:
            raise UserError(f"{VARIABLE}={order!r}: write how:text with how one of {', '.join(get_args(How))}")
        return cls(how, text)  # type: ignore[arg-type]

    def look(self, seq_id: int, prompt: str) -> None:
        """Remember a request whose prompt holds the text, be it given as text or as its tokens."""
        if self._text in prompt:
            self._seq_ids.add(seq_id)

    def strike(self, batch: Iterable[ScheduledSequence]) -> None:
        """End the engine where the step holds a poisoned request."""
        if not any(item.seq.seq_id in self._seq_ids for item in batch):
            return
        if self._how == "raise":
            raise RuntimeError("poisoned")
        if self._how == "hang":
            time.sleep(1e9)
        os.kill(os.getpid(), signal.SIGKILL if self._how == "kill" else signal.SIGSEGV)
