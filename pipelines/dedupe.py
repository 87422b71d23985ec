"""Equal requests are generated once: opt-in for jobs whose outputs do not depend on chance (`run.dedupe`).

`Deduplicated` stands between the row path and its engine and is an engine itself. A request that equals one in flight waits for
it; one that equals a finished one gets its output. It knows of one engine: rows that are equal in two actors, or before and after
a crash, are generated in each, with the same result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from nanovllm import RequestOutput, SamplingParams, UserError
from nanovllm.outputs import TokenLogprobs
from pipelines.row_values import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.stats import EngineStats
    from pipelines.rows import Engine

# Bound of the finished outputs that are kept, about; the least recently used go first. A text of 100 tokens takes about 1.5 KB,
# so that copies are found as long as no more than some 90,000 other texts came between.
CACHE_BYTES = 128 << 20


class Copy(Future[RequestOutput]):
    """The future of a request that another one's generation answers."""


class Deduplicated:
    """An engine that generates equal requests once. Every method may be called from any thread.

    Args:
        engine: that generates.
        cache_bytes: memory of the finished outputs that are kept, about. What waits is bounded by the requests in flight.
    """

    def __init__(self, engine: Engine, cache_bytes: int = CACHE_BYTES) -> None:
        self._engine = engine
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._waiting: dict[bytes, list[Future[RequestOutput]]] = {}
        self._finished: OrderedDict[bytes, tuple[RequestOutput, int]] = OrderedDict()
        self._bytes = 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Of the model."""
        return self._engine.tokenizer

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens."""
        return self._engine.max_prompt_len

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._engine.encode(text)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; where the tokenizer refuses one it raises for all."""
        return self._engine.encode_batch(texts, add_special_tokens)

    def stats(self) -> EngineStats:
        """Counters and state of the engine."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """Free the engine."""
        self._engine.shutdown()

    def submit(self, prompt: str | TokenIds, params: SamplingParams) -> Future[RequestOutput]:
        """Start one request, or wait for one that is equal but for its seed: the future is a `Copy` then.

        A request that samples, as a row may ask for, is its own. Copies of a request that ends with an error get its error,
        and its exception where the engine dies. A future that is cancelled stops no request, as others may wait for it.
        """
        if not is_greedy(params):
            return self._engine.submit(prompt, params)
        key = request_key(prompt, params)
        copy = Copy()
        with self._lock:
            finished = self._finished.get(key)
            if finished is not None:
                self._finished.move_to_end(key)
                copy.set_result(finished[0])
                return copy
            if key in self._waiting:
                self._waiting[key].append(copy)
                return copy
        source = self._engine.submit(prompt, params)
        own: Future[RequestOutput] = Future()
        with self._lock:
            self._waiting.setdefault(key, []).append(own)
        source.add_done_callback(lambda done: self._ended(key, done))
        return own

    def _ended(self, key: bytes, source: Future[RequestOutput]) -> None:
        """Hand what became of a request to all that wait for it, and keep it where it is an output."""
        error = source.exception()
        with self._lock:
            waiting = self._waiting.pop(key, [])
            if error is None:
                self._keep(key, source.result())
        for future in waiting:
            if not future.set_running_or_notify_cancel():
                continue
            if error is None:
                future.set_result(source.result())
            else:
                future.set_exception(error)

    def _keep(self, key: bytes, output: RequestOutput) -> None:
        output = _without_tokens(output)
        size = _size(output)
        self._bytes += size - self._finished.get(key, (output, 0))[1]
        self._finished[key] = (output, size)
        while self._bytes > self._cache_bytes:
            _, (_, size) = self._finished.popitem(last=False)
            self._bytes -= size


def is_greedy(params: SamplingParams) -> bool:
    """Whether the output depends on the prompt and the parameters alone."""
    return params.temperature == 0 or params.labels is not None


def check_dedupe(name: str, sampling: SamplingParams) -> None:
    """Refuse to share outputs that are drawn by chance.

    Raises:
        UserError: naming the setting `name`.
    """
    if not is_greedy(sampling):
        raise UserError(
            f"{name} is for greedy jobs, and sampling.temperature={sampling.temperature!r} draws every row's output by chance; "
            f"set sampling.temperature=0 or sampling.labels, or leave {name} out"
        )


def request_key(prompt: str | TokenIds, params: SamplingParams) -> bytes:
    """Equal for requests that have the same greedy output. A cryptographic digest, since prompts are anybody's text."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(dataclasses.replace(params, seed=None)).encode("utf-8", "surrogatepass"))
    digest.update(b"\0text\0" if isinstance(prompt, str) else b"\0ids\0")
    if isinstance(prompt, str):
        digest.update(prompt.encode("utf-8", "surrogatepass"))
    else:  # all of a column are of one kind
        digest.update(prompt.tobytes() if isinstance(prompt, array) else repr(prompt).encode())
    return digest.digest()


def _without_tokens(output: RequestOutput) -> RequestOutput:
    """An output without its token ids, which no row has a column for."""
    return {**output, "token_ids": []}


def _size(output: RequestOutput) -> int:
    """About how many bytes an output takes."""
    texts = [output["text"], output["error"], output.get("parsed"), output.get("reasoning_text"), output.get("label")]
    positions: list[TokenLogprobs | None] = [*(output["logprobs"] or []), *(output.get("prompt_logprobs") or [])]
    return (
        1000
        + sum(sys.getsizeof(text) for text in texts if text is not None)
        + sum(100 + sys.getsizeof(label) for label in output.get("label_probs") or {})
        + sum(300 * len(found or {}) + 250 for found in positions)
    )
