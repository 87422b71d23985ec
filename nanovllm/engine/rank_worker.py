"""The child process of one tensor-parallel rank: `python -m nanovllm.engine.rank_worker FD`, started by `MultiprocExecutor`.

It leaves when its socket closes, so no rank outlives its engine however that ended: at once and without clean-up, since the
GPU may be waiting for a rank that is gone, and nothing that waits for the GPU would then return.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from nanovllm.engine.executor import RankReply, RankSetup
from nanovllm.engine.model_runner import GpuMemory, ModelRunner, resolve_device
from nanovllm.engine.row_sampling import SamplingInput
from nanovllm.engine.step_result import StepCopy
from nanovllm.errors import UserError
from nanovllm.layers.parallel import TensorParallel

# How long a rank waits for its next message before it looks whether its step is done: short against any step.
POLL_SECONDS = 50e-6


def join_ranks(rank: int, size: int, device: torch.device, rendezvous: str) -> TensorParallel:
    """Meet the other ranks, which know the same file `rendezvous` and nothing else."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # first of all: NCCL sends objects through the current device
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    return TensorParallel.join(rank, size, dist.group.WORLD, device)


def build_runner(setup: RankSetup) -> ModelRunner:
    """Join the process group and load this rank's shard."""
    torch.set_num_threads(setup.num_threads)
    device = resolve_device(setup.config, setup.rank)
    # Before the ranks meet: what NCCL and the ranks' common memory take is the engine's.
    memory = GpuMemory(device, setup.config.gpu_memory_utilization) if device.type == "cuda" else None
    tp = join_ranks(setup.rank, setup.config.tensor_parallel_size, device, setup.rendezvous)
    return ModelRunner(setup.config, setup.model_config, setup.max_model_len, tp, memory)


def leave_with_engine(descriptor: int, rendezvous: str) -> None:
    """Wait until the other end of the socket is closed, and end this process.

    For a thread of its own: the main one may be stuck in a launch, behind a kernel that waits for a rank that is gone.
    """
    poller = select.poll()
    poller.register(descriptor, 0)  # a hang-up is always reported
    poller.poll()
    _remove(rendezvous)
    os._exit(0)


def _remove(rendezvous: str) -> None:
    # The engine removes it too, but not where it was killed or dropped.
    shutil.rmtree(Path(rendezvous).parent, ignore_errors=True)


def serve(connection: Connection) -> None:
    """Set-up, pool size, then steps, one reply each, until the engine closes the connection."""
    setup: RankSetup = connection.recv()
    watch = threading.Thread(target=leave_with_engine, args=(connection.fileno(), setup.rendezvous), daemon=True)
    watch.start()
    try:
        runner = build_runner(setup)
        connection.send(RankReply(runner.max_kvcache_blocks()))
        connection.send(RankReply(f"{runner.start(connection.recv())}, {runner.tp.summary}"))
        in_flight: deque[StepCopy] = deque()
        while True:
            # The next step is launched as soon as it is known, also while this one runs.
            if not in_flight or connection.poll(0 if in_flight[0].ready() else POLL_SECONDS):
                message = connection.recv()
                copy = runner.sample(message) if isinstance(message, SamplingInput) else runner.launch(message)
                if copy is not None:
                    in_flight.append(copy)
            elif in_flight[0].ready():
                connection.send(RankReply(in_flight.popleft().result()))
    finally:
        _remove(setup.rendezvous)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine decides when to end
    connection = Connection(int(sys.argv[1]))
    # Both ends are inside the handlers: after them the model would be freed, which waits for the GPU.
    try:
        serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        _leave(0)
    except Exception as error:
        user_error = isinstance(error, UserError)
        if not user_error:
            traceback.print_exc()
        line = (
            str(error) if user_error else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        with suppress(OSError):  # where the engine is gone there is nobody to tell
            connection.send(RankReply(error=line, user_error=user_error))
        _leave(1)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
