"""The one row path: prompt values in, results out. `ShardWorker` and `NanoVLLMPredictor` both run rows through here.

Raise `ROW_PATH_VERSION` with every change that gives any row another result: it is part of a job's identity.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import xxhash

from nanovllm import RequestOutput, SamplingParams
from nanovllm.outputs import error_output
from pipelines.job import PromptConfig
from pipelines.prompts import RowError, render
from pipelines.results import RowResult, row_result

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import EngineStats

ROW_PATH_VERSION = 2

SUBMIT_ROWS = 64  # rows tokenized in one turn on the tokenizer thread


class Engine(Protocol):
    """The part of `AsyncLLM` that jobs need."""

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        """Start one request."""

    def stats(self) -> EngineStats:
        """Counters and state."""

    def shutdown(self) -> None:
        """Free the engine."""


def row_seed(job_seed: int, *place: str | int) -> int:
    """The sampling seed of a row: 63 bits of xxhash over the job's seed and the row's place in the dataset.

    The job uses (file relative to the input's root, row number in the file, sample number), the predictor the prompt.
    """
    key = "\0".join(str(part) for part in (job_seed, *place))
    return xxhash.xxh64_intdigest(key.encode("utf-8", "surrogatepass")) >> 1


class RowPath:
    """Feeds rows to an engine's continuous batch. One for each engine; `run` may be called many times at once."""

    def __init__(self, engine: Engine, prompt: PromptConfig, sampling: SamplingParams) -> None:
        self._engine = engine
        self._prompt = prompt
        self._sampling = sampling
        self._limit = max(1, engine.max_prompt_len + 1 - sampling.max_tokens)
        # Its own thread: tokenizing must hold up neither the event loop nor the engine. Fast tokenizers free the GIL.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def run(
        self,
        values: Sequence[object],
        seeds: Sequence[int],
        done: Callable[[int, RowResult], None],
        submitted: Callable[[int, Future[RequestOutput]], None] = lambda position, future: None,
    ) -> None:
        """Generate for rows with prompts `values`.

        Args:
            values: prompts, which may be no strings.
            seeds: of each row's sampling.
            done: called with a row's position and result, on the event loop, as each ends.
            submitted: called with a row's position and the engine's future, on the tokenizer thread, as each begins.

        Raises:
            EngineDeadError: the engine died; rows not reported are lost.
        """
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        try:
            for start in range(0, len(values), SUBMIT_ROWS):
                rows = range(start, min(start + SUBMIT_ROWS, len(values)))
                futures = await loop.run_in_executor(self._tokenizing, self._submit, rows, values, seeds, submitted)
                for position, future in enumerate(futures, start):
                    tasks.append(loop.create_task(_report(position, future, done)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _submit(
        self,
        rows: range,
        values: Sequence[object],
        seeds: Sequence[int],
        submitted: Callable[[int, Future[RequestOutput]], None],
    ) -> list[Future[RequestOutput]]:
        futures = []
        for row in rows:
            futures.append(self._submit_row(values[row], seeds[row]))
            submitted(row, futures[-1])
        return futures

    def _submit_row(self, value: object, seed: int) -> Future[RequestOutput]:
        try:
            text = render(value)
            prompt = text if self._prompt.too_long == "error" else self._fit(self._engine.encode(text))
            return self._engine.submit(prompt, dataclasses.replace(self._sampling, seed=seed))
        except RowError as error:
            message = str(error)
        except Exception as error:  # tokenizers raise many kinds; each is about this one text
            message = f"prompt cannot be tokenized: {' '.join(str(error).split())}"
        failed: Future[RequestOutput] = Future()
        failed.set_result(error_output(message))
        return failed

    def _fit(self, token_ids: list[int]) -> list[int]:
        """Drop tokens at one end until the prompt leaves room for `max_tokens`."""
        if len(token_ids) <= self._limit:
            return token_ids
        return token_ids[-self._limit :] if self._prompt.too_long == "truncate_left" else token_ids[: self._limit]


async def _report(position: int, future: Future[RequestOutput], done: Callable[[int, RowResult], None]) -> None:
    done(position, row_result(await asyncio.wrap_future(future)))
