"""The one row path: rows in, results out. `ShardWorker` and `NanoVLLMPredictor` both run rows through here.

Raise `ROW_PATH_VERSION` with every change that gives any row another result: it is part of a job's identity.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from nanovllm import RequestOutput, SamplingParams
from nanovllm.outputs import error_output
from pipelines.job import TooLong
from pipelines.requests import Requests, Row
from pipelines.results import RowResult, row_result
from pipelines.row_values import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.stats import EngineStats

ROW_PATH_VERSION = 2

SUBMIT_ROWS = 64  # rows tokenized in one turn on the tokenizer thread


class Engine(Protocol):
    """The part of `AsyncLLM` that jobs need."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Of the model."""

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


class RowPath:
    """Feeds rows to an engine's continuous batch. One for each engine; `run` may be called many times at once."""

    def __init__(self, engine: Engine, too_long: TooLong) -> None:
        self._engine = engine
        self._too_long = too_long
        # Its own thread: rendering and tokenizing must hold up neither the event loop nor the engine. Fast tokenizers free the GIL.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def run(
        self,
        requests: Requests,
        rows: Sequence[Row],
        seeds: Sequence[int],
        done: Callable[[int, RowResult], None],
        submitted: Callable[[int, Future[RequestOutput]], None] = lambda position, future: None,
    ) -> None:
        """Generate for some rows.

        Args:
            requests: makes requests of them.
            rows: as `requests.rows` gives them.
            seeds: of each row's sampling.
            done: called with a row's position and result, on the event loop, as each ends.
            submitted: called with a row's position and the engine's future, on the tokenizer thread, as each begins.

        Raises:
            EngineDeadError: the engine died; rows not reported are lost.
        """
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        try:
            for start in range(0, len(rows), SUBMIT_ROWS):
                some = range(start, min(start + SUBMIT_ROWS, len(rows)))
                futures = await loop.run_in_executor(
                    self._tokenizing, self._submit, requests, some, rows, seeds, submitted
                )
                for position, future in enumerate(futures, start):
                    tasks.append(loop.create_task(_report(position, future, done)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _submit(
        self,
        requests: Requests,
        some: range,
        rows: Sequence[Row],
        seeds: Sequence[int],
        submitted: Callable[[int, Future[RequestOutput]], None],
    ) -> list[Future[RequestOutput]]:
        futures = []
        for position in some:
            futures.append(self._submit_row(requests, rows[position], seeds[position]))
            submitted(position, futures[-1])
        return futures

    def _submit_row(self, requests: Requests, row: Row, seed: int) -> Future[RequestOutput]:
        try:
            prompt, params = requests.request(row, seed)
            if self._too_long != "error":
                prompt = self._fit(self._engine.encode(prompt) if isinstance(prompt, str) else prompt, params)
            return self._engine.submit(prompt, params)
        except RowError as error:
            message = str(error)
        except Exception as error:  # tokenizers raise many kinds; each is about this one text
            message = f"prompt cannot be tokenized: {' '.join(str(error).split())}"
        failed: Future[RequestOutput] = Future()
        # Messages quote rows, and rows of JSON may hold half a surrogate pair, which no column does.
        failed.set_result(error_output(message.encode("utf-8", "replace").decode()))
        return failed

    def _fit(self, token_ids: list[int], params: SamplingParams) -> list[int]:
        """Drop tokens at one end until the prompt leaves room for `max_tokens`."""
        limit = max(1, self._engine.max_prompt_len + 1 - params.max_tokens)
        if len(token_ids) <= limit:
            return token_ids
        return token_ids[-limit:] if self._too_long == "truncate_left" else token_ids[:limit]


async def _report(position: int, future: Future[RequestOutput], done: Callable[[int, RowResult], None]) -> None:
    done(position, row_result(await asyncio.wrap_future(future)))
