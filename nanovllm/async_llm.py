"""AsyncLLM: an engine that owns a thread, for actors whose requests arrive at any time. All of them run as one continuous batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as Sized
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from nanovllm.engine.llm_engine import LLMEngine, Prompt
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stats import EngineStats
from nanovllm.errors import EngineDeadError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.ranks import RankLauncher


class AsyncLLM:
    """A running engine. Every method may be called from any thread. See `LLMEngine` for the arguments and errors."""

    def __init__(self, model: str, *, launcher: RankLauncher | None = None, **options: Any) -> None:
        self._engine = LLMEngine(model, launcher=launcher, **options)
        self._futures: dict[int, Future[RequestOutput]] = {}
        self._new: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._loop, name="nanovllm-engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output, in tokens."""
        return self._engine.max_model_len

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens."""
        return self._engine.max_prompt_len

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._engine.encode(text)

    def encode_batch(self, texts: Sized[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, on all cores at once. Where the tokenizer refuses one it raises for all."""
        return self._engine.encode_batch(texts, add_special_tokens)

    def stats(self) -> EngineStats:
        """Counters and state of the engine; nothing runs or waits in one that died."""
        stats = self._engine.stats()
        if self._failure is not None:
            return stats._replace(num_running=0, num_waiting=0)
        return stats._replace(num_waiting=stats.num_waiting + len(self._new))

    def submit(self, prompt: Prompt, params: SamplingParams) -> Future[RequestOutput]:
        """Start one request; tokenizes on the caller's thread.

        Returns:
            A future of the output. A request that cannot run has `finish_reason` "error"; `cancel()` stops the request;
            `EngineDeadError` means that the engine died.
        """
        future: Future[RequestOutput] = Future()
        seq = self._engine.make_sequence(prompt, params)
        if isinstance(seq, dict):
            future.set_result(seq)
            return future
        with self._wake:
            failure = self._failure or (EngineDeadError("the engine was shut down") if self._stopping else None)
            if failure is not None:
                future.set_exception(failure)
                return future
            self._futures[seq.seq_id] = future
            self._new.append(seq)
            self._wake.notify()
        future.add_done_callback(lambda done: self._cancel(seq) if done.cancelled() else None)
        return future

    def shutdown(self) -> None:
        """Stop the thread and free the model; requests in flight end with `EngineDeadError`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _cancel(self, seq: Sequence) -> None:
        with self._wake:
            self._cancelled.append(seq)
            self._wake.notify()

    def _loop(self) -> None:
        try:
            while self._take_requests():
                for seq, output in self._engine.step():
                    self._resolve(seq, output)
        except Exception as error:
            self._end(
                error if isinstance(error, EngineDeadError) else EngineDeadError(f"{type(error).__name__}: {error}")
            )
        else:
            self._end(EngineDeadError("the engine was shut down"))

    def _take_requests(self) -> bool:
        """Move arrivals into the engine, sleeping while there is nothing to do; False when it is time to stop."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._new or self._cancelled or self._engine.has_work)
                if self._stopping:
                    return False
                while self._new:
                    self._engine.add(self._new.popleft())
                while self._cancelled:
                    seq = self._cancelled.popleft()
                    self._futures.pop(seq.seq_id, None)
                    self._engine.abort(seq)
            if self._engine.has_work:
                return True

    def _resolve(self, seq: Sequence, output: RequestOutput) -> None:
        with self._wake:
            future = self._futures.pop(seq.seq_id, None)
        # False: cancelled while its last step ran.
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(output)

    def _end(self, failure: EngineDeadError) -> None:
        with self._wake:
            self._failure = failure
            futures = dict(self._futures)
            self._futures.clear()
        suspects = self._engine.ids_in_step()
        for seq_id, future in futures.items():
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDeadError(str(failure), failure.killed, seq_id in suspects))
        self._engine.exit()
