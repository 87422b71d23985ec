"""What an engine tells of itself. No torch: those who only read it import nothing else."""

from __future__ import annotations

from typing import NamedTuple


class EngineStats(NamedTuple):
    """Counters since the engine started, and its state now (`kv_usage`: part of the KV blocks held by sequences)."""

    num_running: int
    num_waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    kv_usage: float
