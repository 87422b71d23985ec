"""Runs steps on one rank in this process, or on several in processes of their own that die with it. The engine sees one interface.

Ranks are started as `python -m nanovllm.engine.rank_worker` and spoken to over a private connection each: no shared name, no
re-import of the user's main module, and a closed connection is how either side learns that the other is gone. They are child
processes, or wherever the launcher that the engine was given puts them (`nanovllm.engine.ranks`).
"""

from __future__ import annotations

import errno
import gc
import time
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.model_input import ModelInput
from nanovllm.engine.model_runner import ModelRunner, resolve_device, resolve_dtype
from nanovllm.engine.ranks import ChildRanks, RankEnd, RankGroup, RankLauncher
from nanovllm.engine.row_sampling import SamplingInput
from nanovllm.engine.step_result import StepCopy, StepResult
from nanovllm.engine.token_masks import mask_words
from nanovllm.errors import EngineDeadError, UserError
from nanovllm.kernels.fp8_cache import FP8
from nanovllm.layers.attention import SharingBackend, select_backend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.utils.prefixes import SharingShape

# `Executor.chunk_cost` where decodes run as graphs, of the 0.6B shape and 256 sequences (bench/NOTES.md).
GRAPHS_CHUNK_COST = 1.5


# How long a rank's complaint waits for word that another one was killed, which would explain it.
BLAME_S, BLAME_ELSEWHERE_S = 0.5, 3.0
OUT_OF_REACH = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class MaskBuffer:
    """Masks over the vocabulary in memory that is used again: fresh pages would cost more than what is written to them."""

    def __init__(self, vocab_size: int, *, pinned: bool) -> None:
        self._words = mask_words(vocab_size)
        self._pinned = pinned
        self._buffer: npt.NDArray[np.int32] = np.empty((0, self._words), dtype=np.int32)

    def rows(self, count: int) -> npt.NDArray[np.int32]:
        """The first `count` rows [count, W]."""
        if count > len(self._buffer):
            shape = (max(count, 2 * len(self._buffer)), self._words)
            self._buffer = torch.zeros(shape, dtype=torch.int32, pin_memory=self._pinned).numpy()
        return self._buffer[:count]


class RankSetup(NamedTuple):
    """First message to a rank: all it needs to join the others and build its shard.

    Attributes:
        rendezvous, store: see `RankGroup`; the latter for rank 0 alone.
        apart: see `RankLauncher`.
    """

    config: EngineConfig
    model_config: ModelConfig
    max_model_len: int
    rank: int
    rendezvous: str
    store: int | None
    apart: bool
    num_threads: int


class RankReply(NamedTuple):
    """A rank's answer: `value`, or what went wrong (`user_error` where the user can mend it)."""

    value: Any = None
    error: str | None = None
    user_error: bool = False


class Executor(ABC):
    """Where the model runs. Steps run in the order they are launched in, and are collected in that order.

    Attributes, known after construction:
        num_kvcache_blocks: size of the pool.
        summary: what runs where.
        chunk_cost: how much longer a step with chunks takes than one of decodes alone, as a part of the latter: decodes may run as
            CUDA graphs, whose launch takes the host no time.
        sharing: see `sharing_shape`.
    """

    num_kvcache_blocks: int
    summary: str
    chunk_cost: float
    sharing: SharingShape | None

    @abstractmethod
    def mask_buffer(self, rows: int) -> npt.NDArray[np.int32]:
        """Where to put masks [rows, W] for `sample`, from where they reach the device fastest: the same memory in each call."""

    @abstractmethod
    def launch(self, step: ModelInput) -> None:
        """Start one step; it may still run when this returns. One that is `extended` waits for `sample` before it samples.

        Raises:
            EngineDeadError: a rank died.
        """

    @abstractmethod
    def sample(self, asked: SamplingInput, filled: Future[None] | None = None) -> None:
        """Let the extended step that was launched last sample, once the masks of what it asks are `filled` (None: they are).

        Raises:
            EngineDeadError: a rank died.
        """

    @abstractmethod
    def collect(self) -> StepResult:
        """Wait for the oldest step not collected yet.

        Raises:
            EngineDeadError: a rank died.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget the steps in flight."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free the model; child processes have ended when this returns."""


def create_executor(
    config: EngineConfig, model_config: ModelConfig, max_model_len: int, launcher: RankLauncher | None = None
) -> Executor:
    """The executor for `config.tensor_parallel_size` ranks. `launcher` makes them where there are several; None: as child processes."""
    if config.tensor_parallel_size == 1:
        return UniprocExecutor(config, model_config, max_model_len)
    return RankedExecutor(config, model_config, max_model_len, launcher or ChildRanks())


def sharing_shape(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> SharingShape | None:
    """How decodes on `device` attend to the prefixes they share; None where each does for itself."""
    if not config.shares_prefixes:
        return None
    backend = select_backend(config.attention_backend, device)
    if not issubclass(backend, SharingBackend):
        return None
    size = config.tensor_parallel_size
    return backend.sharing_shape(
        model_config.num_heads // size,
        max(1, model_config.num_kv_heads // size),
        model_config.head_dim,
        FP8 if config.kv_cache_dtype == "fp8" else resolve_dtype(config, model_config, device),
    )


def choose_num_blocks(config: EngineConfig, most: int) -> int:
    """KV blocks of the pool: what the user asked for, or the `most` there is use and memory for."""
    return most if config.num_kvcache_blocks < 0 else config.num_kvcache_blocks


class UniprocExecutor(Executor):
    """One rank, in this process."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> None:
        self.runner: ModelRunner | None = ModelRunner(config, model_config, max_model_len, TensorParallel())
        self.num_kvcache_blocks = choose_num_blocks(config, self.runner.max_kvcache_blocks())
        self.summary = self.runner.start(self.num_kvcache_blocks)
        self.sharing = sharing_shape(config, model_config, self.runner.device)
        self.chunk_cost = GRAPHS_CHUNK_COST if self.runner.graphs else 0.0
        self._masks = MaskBuffer(model_config.vocab_size, pinned=self.runner.device.type == "cuda")
        self.in_flight: deque[StepCopy] = deque()

    def launch(self, step: ModelInput) -> None:
        """See `Executor.launch`."""
        if self.runner is None:
            raise EngineDeadError("the engine was shut down")
        copy = self.runner.launch(step)
        if copy is not None:
            self.in_flight.append(copy)

    def mask_buffer(self, rows: int) -> npt.NDArray[np.int32]:
        """See `Executor.mask_buffer`."""
        return self._masks.rows(rows)

    def sample(self, asked: SamplingInput, filled: Future[None] | None = None) -> None:
        """See `Executor.sample`."""
        assert self.runner is not None
        self.in_flight.append(self.runner.sample(asked, filled))

    def collect(self) -> StepResult:
        """See `Executor.collect`."""
        return self.in_flight.popleft().result()

    def discard(self) -> None:
        """See `Executor.discard`."""
        self.in_flight.clear()
        if self.runner is not None:
            self.runner.discard()

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        self.in_flight.clear()
        self.runner = None
        if torch.cuda.is_available():
            gc.collect()  # what refers to itself would keep its part of the GPU
            torch.cuda.empty_cache()


class RankedExecutor(Executor):
    """Tensor-parallel ranks, each a process of its own."""

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, max_model_len: int, launcher: RankLauncher
    ) -> None:
        # Refused here at once, not by every rank after its imports; and all ranks must take the same kind.
        device = resolve_device(config, 0, launcher.apart)
        config = config.model_copy(update={"device": device.type})
        self.chunk_cost = GRAPHS_CHUNK_COST if device.type == "cuda" and not config.enforce_eager else 0.0
        self.sharing = sharing_shape(config, model_config, device)
        self._masks = MaskBuffer(model_config.vocab_size, pinned=False)
        size = config.tensor_parallel_size
        threads = max(1, torch.get_num_threads() // size)
        self.group = launcher.launch(size)
        try:
            for rank in range(size):
                store = self.group.store if rank == 0 else None
                place = (rank, self.group.rendezvous, store, launcher.apart)
                self._send(rank, RankSetup(config, model_config, max_model_len, *place, threads))
            self.num_kvcache_blocks = choose_num_blocks(config, min(self._receive_all()))
            for rank in range(size):
                self._send(rank, self.num_kvcache_blocks)
            self.summary = f"{size} ranks, each: {self._receive_all()[0]}"
        except BaseException:
            self.shutdown()
            raise

    def launch(self, step: ModelInput) -> None:
        """See `Executor.launch`."""
        if not self.group.ranks:
            raise EngineDeadError("the engine was shut down")
        for rank in range(len(self.group.ranks)):
            self._send(rank, step)

    def mask_buffer(self, rows: int) -> npt.NDArray[np.int32]:
        """See `Executor.mask_buffer`."""
        return self._masks.rows(rows)

    def sample(self, asked: SamplingInput, filled: Future[None] | None = None) -> None:
        """See `Executor.sample`."""
        if filled is not None:
            filled.result()
        for rank in range(len(self.group.ranks)):
            self._send(rank, asked)

    def collect(self) -> StepResult:
        """See `Executor.collect`. Every rank answers, so that the death of any is seen."""
        if not self.group.ranks:
            raise EngineDeadError("the engine was shut down")
        result: StepResult = self._receive_all()[0]
        return result

    def discard(self) -> None:
        """See `Executor.discard`. The ranks would still answer, so they end."""
        self.shutdown()

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        group, self.group = self.group, RankGroup([], self.group.rendezvous)
        for rank in group.ranks:
            rank.connection.close()
        for rank in group.ranks:
            if rank.end(timeout_s=5) is None:
                rank.kill()
                rank.end(timeout_s=5)
        group.dissolve()

    def _send(self, rank: int, message: object) -> None:
        try:
            self.group.ranks[rank].connection.send(message)
        except OSError as error:
            raise self._dead(rank, error) from None

    def _receive_all(self) -> list[Any]:
        """One reply of every rank. A rank that died or failed is reported as soon as it shows, while others may hang."""
        replies: dict[int, Any] = {}
        connections = [rank.connection for rank in self.group.ranks]
        while len(replies) < len(connections):
            pending = [c for rank, c in enumerate(connections) if rank not in replies]
            for ready in wait(pending):
                rank = connections.index(ready)  # type: ignore[arg-type]
                replies[rank] = self._receive(rank)
        return [replies[rank] for rank in range(len(replies))]

    def _receive(self, rank: int) -> Any:
        try:
            reply: RankReply = self.group.ranks[rank].connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead(rank, error) from None
        if reply.error is not None:
            killed = None if reply.user_error else self._killed_rank()
            if killed is not None:
                raise self._dead(killed)
            self._kill_all()
            if reply.user_error:
                raise UserError(reply.error)
            raise EngineDeadError(f"tensor-parallel rank {rank} failed: {reply.error}")
        return reply.value

    def _killed_rank(self) -> int | None:
        """The rank that was killed, if any: the others' collectives fail with it, and may be the first to say so."""
        here = all(rank.here for rank in self.group.ranks)
        deadline = time.monotonic() + (BLAME_S if here else BLAME_ELSEWHERE_S)
        while time.monotonic() < deadline:
            for number, rank in enumerate(self.group.ranks):
                end = rank.end(timeout_s=0)
                if end is not None and end.signalled:
                    return number
            time.sleep(0.01)
        return None

    def _dead(self, rank: int, error: Exception | None = None) -> EngineDeadError:
        """What happened to `rank`, whose connection failed; the other ranks are killed, since they may wait for it forever."""
        handle = self.group.ranks[rank]
        end = handle.end(timeout_s=5)
        if end is None and handle.here:
            end = RankEnd("closed its connection", False)
        elif end is None:  # where it ran alone, it would have told why
            silent = isinstance(error, OSError) and error.errno in OUT_OF_REACH
            end = RankEnd(f"{'is out of reach' if silent else 'closed its connection'}, and so is its node", True)
        self._kill_all()
        return EngineDeadError(
            f"tensor-parallel rank {rank} ({handle.name}) {end.how}; the engine has stopped", end.killed
        )

    def _kill_all(self) -> None:
        for rank in self.group.ranks:
            rank.kill()
        self.shutdown()
