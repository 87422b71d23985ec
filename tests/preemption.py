"""Admission that leaves nobody room to grow, so that running sequences are preempted: in place of `scheduler.Demand`."""

from __future__ import annotations

from nanovllm.engine.demand import Demand
from nanovllm.engine.sequence import Sequence


class NoReserve(Demand):
    """Takes whoever has blocks for the tokens there are."""

    def take(self, seq: Sequence, needed: int) -> bool:
        """Whether `seq` has blocks now."""
        return needed <= self.free
