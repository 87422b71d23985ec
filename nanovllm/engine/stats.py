"""What an engine tells of itself. No torch: those who only read it import nothing else."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

# Upper ends of the buckets that steps are counted in, seconds; one more bucket holds what is longer.
STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class EngineStats(NamedTuple):
    """Counters since the engine started, and its state now (`kv_usage`: part of the KV blocks held by sequences).

    `step_s` is the time spent in steps, and `step_times` how many steps took how long, by the buckets of `STEP_BOUNDS_S`.
    """

    num_running: int
    num_waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    kv_usage: float
    step_s: float = 0.0
    step_times: tuple[int, ...] = (0,) * (len(STEP_BOUNDS_S) + 1)


class StepTimes:
    """How long steps took. Written by the thread that steps, read by any; a step costs it less than a microsecond."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counts = [0] * (len(STEP_BOUNDS_S) + 1)

    def add(self, seconds: float) -> None:
        """Count one step."""
        self.seconds += seconds
        self.counts[bisect_left(STEP_BOUNDS_S, seconds)] += 1
