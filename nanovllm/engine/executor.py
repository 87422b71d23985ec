"""Runs steps on one rank in this process, or on several in child processes that die with it. The engine sees one interface.

Ranks are started as `python -m nanovllm.engine.rank_worker` and spoken to over a private socket pair each: no port, no shared
name, no re-import of the user's main module, and a closed socket is how either side learns that the other is gone.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.model_input import ModelInput
from nanovllm.engine.model_runner import ModelRunner, resolve_device
from nanovllm.engine.row_sampling import SamplingInput
from nanovllm.engine.step_result import StepCopy, StepResult
from nanovllm.engine.token_masks import mask_words
from nanovllm.errors import EngineDeadError, UserError
from nanovllm.layers.attention import select_backend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import ModelConfig

# What ranks find in their environment unless the user has set it. They share a host and its kernel's sockets, nothing more.
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
RANK_ENVIRONMENT = {
    # Gloo and NCCL listen on a network interface to find each other, by default one that others can reach.
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    # NVLink multicast is of no use to one-shot sums, and sets up the switch between the GPUs, which other jobs of a shared host
    # depend on; some machines offer it and then fail. "0" and "1" the other way round turn it on for NCCL and torch.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


# `Executor.chunk_cost` where decodes run as graphs, of the 0.6B shape and 256 sequences (bench/NOTES.md).
GRAPHS_CHUNK_COST = 0.5


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
    """First message to a rank: all it needs to join the others and build its shard."""

    config: EngineConfig
    model_config: ModelConfig
    max_model_len: int
    rank: int
    rendezvous: str
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
    """

    num_kvcache_blocks: int
    summary: str
    chunk_cost: float

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
    def sample(self, asked: SamplingInput) -> None:
        """Let the extended step that was launched last sample.

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


def create_executor(config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> Executor:
    """The executor for `config.tensor_parallel_size` ranks."""
    if config.tensor_parallel_size == 1:
        return UniprocExecutor(config, model_config, max_model_len)
    return MultiprocExecutor(config, model_config, max_model_len)


def shared_tile(config: EngineConfig, model_config: ModelConfig) -> int:
    """Sequences that are attended together to the prefix they share; 0 where that is not done."""
    if not config.shared_prefix_attention:
        return 0
    size = config.tensor_parallel_size
    group = model_config.num_heads // size // max(1, model_config.num_kv_heads // size)
    return select_backend(config.attention_backend, resolve_device(config, 0)).shared_tile(group)


def choose_num_blocks(config: EngineConfig, most: int) -> int:
    """KV blocks of the pool: what the user asked for, or the `most` there is use and memory for."""
    return most if config.num_kvcache_blocks < 0 else config.num_kvcache_blocks


class UniprocExecutor(Executor):
    """One rank, in this process."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> None:
        self.runner: ModelRunner | None = ModelRunner(config, model_config, max_model_len, TensorParallel())
        self.num_kvcache_blocks = choose_num_blocks(config, self.runner.max_kvcache_blocks())
        self.summary = self.runner.start(self.num_kvcache_blocks)
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

    def sample(self, asked: SamplingInput) -> None:
        """See `Executor.sample`."""
        assert self.runner is not None
        self.in_flight.append(self.runner.sample(asked))

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


class MultiprocExecutor(Executor):
    """Tensor-parallel ranks, each a child process."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> None:
        device = resolve_device(config, 0)  # refused here at once, not by every rank after its imports
        self.chunk_cost = GRAPHS_CHUNK_COST if device.type == "cuda" and not config.enforce_eager else 0.0
        self._masks = MaskBuffer(model_config.vocab_size, pinned=False)
        size = config.tensor_parallel_size
        self.rendezvous_dir = Path(tempfile.mkdtemp(prefix="nanovllm-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        threads = max(1, torch.get_num_threads() // size)
        try:
            for rank in range(size):
                self._start_rank()
                rendezvous = str(self.rendezvous_dir / "store")
                setup = RankSetup(config, model_config, max_model_len, rank, rendezvous, threads)
                self._send(rank, setup)
            self.num_kvcache_blocks = choose_num_blocks(config, min(self._receive_all()))
            for rank in range(size):
                self._send(rank, self.num_kvcache_blocks)
            self.summary = f"{size} ranks, each: {self._receive_all()[0]}"
        except BaseException:
            self.shutdown()
            raise

    def launch(self, step: ModelInput) -> None:
        """See `Executor.launch`."""
        if not self.processes:
            raise EngineDeadError("the engine was shut down")
        for rank in range(len(self.processes)):
            self._send(rank, step)

    def mask_buffer(self, rows: int) -> npt.NDArray[np.int32]:
        """See `Executor.mask_buffer`."""
        return self._masks.rows(rows)

    def sample(self, asked: SamplingInput) -> None:
        """See `Executor.sample`."""
        for rank in range(len(self.processes)):
            self._send(rank, asked)

    def collect(self) -> StepResult:
        """See `Executor.collect`. Every rank answers, so that the death of any is seen."""
        if not self.processes:
            raise EngineDeadError("the engine was shut down")
        result: StepResult = self._receive_all()[0]
        return result

    def discard(self) -> None:
        """See `Executor.discard`. The ranks would still answer, so they end."""
        self.shutdown()

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes, self.connections = [], []
        shutil.rmtree(self.rendezvous_dir, ignore_errors=True)

    def _start_rank(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**RANK_ENVIRONMENT, **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in [os.getcwd(), *sys.path] if path)
        command = [sys.executable, "-m", "nanovllm.engine.rank_worker", str(theirs.fileno())]
        self.processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment))
        theirs.close()
        self.connections.append(Connection(ours.detach()))

    def _send(self, rank: int, message: object) -> None:
        try:
            self.connections[rank].send(message)
        except OSError:
            raise self._dead(rank) from None

    def _receive_all(self) -> list[Any]:
        """One reply of every rank. A rank that died or failed is reported as soon as it shows, while others may hang."""
        replies: dict[int, Any] = {}
        while len(replies) < len(self.connections):
            pending = [c for rank, c in enumerate(self.connections) if rank not in replies]
            for ready in wait(pending):
                rank = self.connections.index(ready)  # type: ignore[arg-type]
                replies[rank] = self._receive(rank)
        return [replies[rank] for rank in range(len(replies))]

    def _receive(self, rank: int) -> Any:
        try:
            reply: RankReply = self.connections[rank].recv()
        except (EOFError, OSError):
            raise self._dead(rank) from None
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
        """The rank that a signal ended, if any: the others' collectives fail with it, and may be the first to say so."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            for rank, process in enumerate(self.processes):
                if (process.poll() or 0) < 0:
                    return rank
            time.sleep(0.01)
        return None

    def _dead(self, rank: int) -> EngineDeadError:
        """What happened to `rank`; the other ranks are killed, since they may wait for it forever."""
        process = self.processes[rank]
        code = None
        try:
            code = process.wait(timeout=5)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        self._kill_all()
        killed = code in (-signal.SIGKILL, -signal.SIGTERM)
        return EngineDeadError(f"tensor-parallel rank {rank} (pid {process.pid}) {how}; the engine has stopped", killed)

    def _kill_all(self) -> None:
        for process in self.processes:
            process.kill()
        self.shutdown()
