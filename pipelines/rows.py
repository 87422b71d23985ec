"""The one row path: rows in, results out. `ShardWorker` and `NanoVLLMPredictor` both run rows through here.

Raise `ROW_PATH_VERSION` with every change that gives any row another result: it is part of a job's identity.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol

from nanovllm import EngineDeadError, RequestOutput, SamplingParams
from nanovllm.outputs import error_output
from pipelines.job import TooLong
from pipelines.prompts import Rendered
from pipelines.requests import Request, Requests, Row
from pipelines.results import RowResult, row_result
from pipelines.row_values import RowError, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.stats import EngineStats

ROW_PATH_VERSION = 2

# Rows tokenized together, in one turn on the tokenizer thread: enough for all cores of a host, and soon enough done that the first
# rows of a job run at once.
SUBMIT_ROWS = 64
# The engine has so many rows waiting, or as many as it has run at once, before more are made: what takes Python's lock from its steps is then spread over
# all of them, where a shard's rows made at once would slow some down.
ROWS_AHEAD = 256
PAUSE_S = 0.005
# How long the thread that makes rows keeps Python's lock while the engine's waits for it, which gives it away some dozens of times a step.
# With Python's own 5 ms the engine starves; shorter ones cost the rows little (bench/NOTES.md).
SWITCH_S = 50e-6


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

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, for engines with a tokenizer. Where it refuses one this raises for all."""

    def submit(self, prompt: str | TokenIds, params: SamplingParams) -> Future[RequestOutput]:
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
        # Its own thread: rendering and tokenizing must hold up neither the event loop nor the engine. Fast tokenizers free the GIL,
        # and take the texts of a group on all cores.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        # Calls are served one after another. Where all took turns they would also end together, and the engine would run empty until new ones
        # have begun.
        self._turn = asyncio.Lock()
        self._ahead = ROWS_AHEAD
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))

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
        results = _Results(loop, len(rows), done)
        try:
            async with self._turn:
                for start in range(0, len(rows), SUBMIT_ROWS):
                    await self._room(results)
                    some = range(start, min(start + SUBMIT_ROWS, len(rows)))
                    await loop.run_in_executor(
                        self._tokenizing, self._submit, requests, some, rows, seeds, submitted, results
                    )
            await results.all
        except EngineDeadError:
            raise  # nothing runs any more, and what it died of can be told from the futures
        except BaseException:
            results.cancel()
            raise

    async def _room(self, results: _Results) -> None:
        """Until the engine has few rows waiting, or a row has no result."""
        while not results.all.done():
            stats = self._engine.stats()
            self._ahead = max(self._ahead, stats.num_running)
            if stats.num_waiting < self._ahead:
                return
            await asyncio.sleep(PAUSE_S)

    def _submit(
        self,
        requests: Requests,
        some: range,
        rows: Sequence[Row],
        seeds: Sequence[int],
        submitted: Callable[[int, Future[RequestOutput]], None],
        results: _Results,
    ) -> None:
        asked = self._tokenized([_request(requests, rows[position], seeds[position]) for position in some])
        for position, request in zip(some, asked, strict=True):
            future = self._submit_row(request)
            submitted(position, future)
            results.watch(position, future)

    def _tokenized(self, asked: list[Request | str]) -> list[Request | str]:
        """The requests with token ids for text, as far as the tokenizer takes all texts of a kind."""
        if self._engine.tokenizer is None:
            return asked
        plain: dict[int, tuple[Request, str]] = {}
        rendered: dict[int, tuple[Request, str]] = {}
        for number, request in enumerate(asked):
            if isinstance(request, Request):
                if isinstance(request.prompt, str):
                    plain[number] = request, request.prompt
                elif isinstance(request.prompt, Rendered):
                    rendered[number] = request, request.prompt.text
        found = list(asked)
        for some, add_special_tokens in ((plain, True), (rendered, False)):
            try:
                token_ids = self._engine.encode_batch([text for _, text in some.values()], add_special_tokens)
            except Exception:
                # Of one text, or several: `_submit_row` tries each on its own, and only theirs are errors.
                continue
            for (number, (request, _)), ids in zip(some.items(), token_ids, strict=True):
                found[number] = request._replace(prompt=ids)
        return found

    def _submit_row(self, request: Request | str) -> Future[RequestOutput]:
        if isinstance(request, str):
            return _failed(request)
        prompt, params = request
        try:
            if isinstance(prompt, Rendered):
                tokenizer = self._engine.tokenizer
                prompt = prompt.text if tokenizer is None else prompt.token_ids(tokenizer)
            if self._too_long != "error":
                prompt = self._fit(self._engine.encode(prompt) if isinstance(prompt, str) else prompt, params)
            return self._engine.submit(prompt, params)
        except Exception as error:
            return _failed(_message(error))

    def _fit(self, token_ids: TokenIds, params: SamplingParams) -> TokenIds:
        """Drop tokens at one end until the prompt leaves room for `max_tokens`."""
        limit = max(1, self._engine.max_prompt_len + 1 - params.max_tokens)
        if len(token_ids) <= limit:
            return token_ids
        return token_ids[-limit:] if self._too_long == "truncate_left" else token_ids[:limit]


class _Results:
    """The results of some rows, on their way from the engine's thread to the event loop.

    All that have ended by the time the loop looks are handed over in one turn: to wake it costs as much as a row's work there, and the
    engine's thread has to wait for Python's lock after it.

    Args:
        count: of the rows; done: called on the event loop with the position and result of each.

    Attributes:
        all: done when they all are; has the exception of a row that has no result.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int, done: Callable[[int, RowResult], None]) -> None:
        self.all: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._left = count
        self._done = done
        self._running: dict[int, Future[RequestOutput]] = {}
        self._ended: deque[tuple[int, Future[RequestOutput]]] = deque()
        self._woken = self._cancelled = False
        if not count:
            self.all.set_result(None)

    def watch(self, position: int, future: Future[RequestOutput]) -> None:
        """Wait for a row's result, on the thread that submits it."""
        self._running[position] = future
        future.add_done_callback(partial(self._end, position))
        if self._cancelled:
            future.cancel()

    def cancel(self) -> None:
        """Stop the rows that have not ended, on the event loop."""
        self._cancelled = True
        self.all.cancel()
        for future in list(self._running.values()):
            future.cancel()

    def _end(self, position: int, future: Future[RequestOutput]) -> None:
        self._ended.append((position, future))
        if not (self._woken or self._cancelled):
            self._woken = True
            self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._woken = False  # before the look: what ends after it wakes the loop again
        while self._ended:
            position, future = self._ended.popleft()
            del self._running[position]
            self._left -= 1
            try:
                self._done(position, row_result(future.result()))
            except Exception as error:  # others of the same step may have their results
                if not self.all.done():
                    self.all.set_exception(error)
        if not self._left and not self.all.done():
            self.all.set_result(None)


def _request(requests: Requests, row: Row, seed: int) -> Request | str:
    """What a row asks for, or what is wrong with it."""
    try:
        return requests.request(row, seed)
    except Exception as error:
        return _message(error)


def _message(error: Exception) -> str:
    if isinstance(error, RowError):
        return str(error)
    # Tokenizers raise many kinds; each is about this one text.
    return f"prompt cannot be tokenized: {' '.join(str(error).split())}"


def _failed(message: str) -> Future[RequestOutput]:
    failed: Future[RequestOutput] = Future()
    # Messages quote rows, and rows of JSON may hold half a surrogate pair, which no column does.
    failed.set_result(error_output(message.encode("utf-8", "replace").decode()))
    return failed
