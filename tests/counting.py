"""Counts the rows that engines compute, in files that survive a SIGKILL: one line for every row, written as the row finishes.

    python tests/counting.py DIRECTORY <arguments of generate.py>

is `generate.py` with such engines. A row is told by its sampling seed, which follows from its place in the dataset.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections import Counter
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from nanovllm import AsyncLLM, RequestOutput, SamplingParams


class CountingLLM(AsyncLLM):
    """The engine of a job, which notes every row that it finishes before anyone else hears of it."""

    def __init__(self, directory: str, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        Path(directory).mkdir(parents=True, exist_ok=True)
        path = Path(directory) / f"{os.getpid()}-{uuid.uuid4().hex}"
        self._counted = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        future = super().submit(prompt, params)
        future.add_done_callback(lambda done: self._note(params.seed, done))
        return future

    def _note(self, seed: int | None, done: Future[RequestOutput]) -> None:
        if not done.cancelled() and done.exception() is None:
            # With the operating system when this returns, whatever becomes of the process.
            os.write(self._counted, f"{seed} {done.result()['num_generated_tokens']}\n".encode())


class Computed(NamedTuple):
    """How often rows were computed to their end, by seed, and the tokens of them all."""

    rows: Counter[int]
    tokens: int

    @property
    def repeated(self) -> Counter[int]:
        """How often rows were computed once more."""
        return Counter({seed: times - 1 for seed, times in self.rows.items() if times > 1})


def computed(directory: Path, pid: int | None = None) -> Computed:
    """What the engines of all processes computed, or those of one."""
    rows: Counter[int] = Counter()
    tokens = 0
    for path in directory.glob(f"{'*' if pid is None else pid}-*"):
        for line in path.read_text().splitlines():
            seed, generated = line.split()
            rows[int(seed)] += 1
            tokens += int(generated)
    return Computed(rows, tokens)


if __name__ == "__main__":
    from pipelines.generate import main
    from tests.counting import CountingLLM as Engine  # by its importable name, which actors find it by

    status = main(sys.argv[2:], partial(Engine, sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as generate.py ends: exit hooks could wait for what hangs
