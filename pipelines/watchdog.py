"""Ends actors that hang, so that Ray replaces them. The driver looks at every sample of the board.

Ray notices a process that dies and a node that does not answer; it does not notice an actor whose process is suspended, or
whose engine waits for a device that never answers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable

from pipelines.processes import born
from pipelines.progress import WorkerState

STALLED = 10.0  # a step may take so many times longer than a report


class Watchdog:
    """Kills actors that were silent for `hang_s`, or whose engine made no step for `STALLED` times that."""

    def __init__(self, hang_s: float, ended: Callable[[WorkerState], None] = lambda state: None) -> None:
        """Args: `ended` is told, by a thread, whom it has killed."""
        self._hang_s = hang_s
        self._tell = ended
        self._ended: set[tuple[str, int, str | None]] = set()

    def look(self, workers: Iterable[tuple[float, WorkerState]]) -> None:
        """End those that hang. Takes the ages and states of all workers that ever reported; dead ones are among them."""
        for age, state in workers:
            process = (state.node, state.pid, state.birth)
            stalled_s = age + state.stalled_s if state.stalled_s else 0.0
            if process in self._ended or (age < self._hang_s and stalled_s < STALLED * self._hang_s):
                continue
            self._ended.add(process)
            threading.Thread(target=self._end, args=(state,), name="watchdog", daemon=True).start()

    def _end(self, state: WorkerState) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(state.node, soft=False)
        kill = ray.remote(num_cpus=0, max_retries=0)(end_process).options(scheduling_strategy=there)
        try:
            was_alive = ray.get(kill.remote(state.pid, state.birth), timeout=self._hang_s)
        except ray.exceptions.RayError:
            return  # the node is gone, or hangs as a whole: Ray notices that
        if was_alive:
            print(f"killed pid {state.pid} on node {state.node[:8]}, which hung; Ray replaces it", file=sys.stderr)
            self._tell(state)


def end_process(pid: int, birth: str | None) -> bool:
    """SIGKILL the process `pid` of this machine that began at `birth`. False where there is none."""
    if birth is None or born(pid) != birth:
        return False
    os.kill(pid, signal.SIGKILL)
    return True
