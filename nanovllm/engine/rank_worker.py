"""The process of one tensor-parallel rank, started by `nanovllm.engine.ranks`.

    python -m nanovllm.engine.rank_worker FD                             a child of its engine, at the other end of a socket pair
    python -m nanovllm.engine.rank_worker --connect ADDRESS PORT RANK    anywhere; the group's secret comes in on stdin

It leaves when its connection closes, so no rank outlives its engine however that ended: at once and without clean-up, since the
GPU may be waiting for a rank that is gone, and nothing that waits for the GPU would then return.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from nanovllm.engine.executor import RankReply, RankSetup
from nanovllm.engine.model_runner import GpuMemory, ModelRunner, resolve_device
from nanovllm.engine.ranks import connect
from nanovllm.engine.row_sampling import SamplingInput
from nanovllm.engine.step_result import StepCopy
from nanovllm.errors import UserError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.utils.heap import settle_heap

# How long a rank waits for its next message before it looks whether its step is done: short against any step.
POLL_SECONDS = 50e-6
TCP = "tcp://"


def join_ranks(
    rank: int, size: int, device: torch.device, rendezvous: str, listening: int | None = None
) -> TensorParallel:
    """Meet the other ranks, which know the same `rendezvous`, a file or `tcp://host:port`, and nothing else.

    Args:
        listening: for rank 0, the open file of the socket that listens at that address.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # first of all: NCCL sends objects through the current device
    store = None
    if rendezvous.startswith(TCP):
        place = urlsplit(rendezvous)
        assert place.hostname is not None and place.port is not None
        # By itself it would listen on all interfaces.
        options = {"is_master": True, "master_listen_fd": listening} if rank == 0 else {}
        store = dist.TCPStore(place.hostname, place.port, size, wait_for_workers=False, **options)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if store else f"file://{rendezvous}",
        store=store,
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    return TensorParallel.join(rank, size, dist.group.WORLD, device)


def build_runner(setup: RankSetup) -> ModelRunner:
    """Join the process group and load this rank's shard."""
    torch.set_num_threads(setup.num_threads)
    device = resolve_device(setup.config, setup.rank, setup.apart)
    # Before the ranks meet: what NCCL and the ranks' common memory take is the engine's.
    memory = GpuMemory(device, setup.config.gpu_memory_utilization) if device.type == "cuda" else None
    tp = join_ranks(setup.rank, setup.config.tensor_parallel_size, device, setup.rendezvous, setup.store)
    return ModelRunner(setup.config, setup.model_config, setup.max_model_len, tp, memory, device)


def leave_with_engine(descriptor: int, rendezvous: str, lifeline: int | None = None) -> None:
    """Wait until the other end of the socket is closed, or of the pipe `lifeline`, and end this process.

    For a thread of its own: the main one may be stuck in a launch, behind a kernel that waits for a rank that is gone.
    """
    poller = select.poll()
    # A hang-up is always reported, but of a TCP connection only where both sides hung up.
    poller.register(descriptor, getattr(select, "POLLRDHUP", 0))
    if lifeline is not None:
        poller.register(lifeline, 0)
    poller.poll()
    _remove(rendezvous)
    os._exit(0)


def _remove(rendezvous: str) -> None:
    # The engine removes it too, but not where it was killed or dropped.
    if not rendezvous.startswith(TCP):
        shutil.rmtree(Path(rendezvous).parent, ignore_errors=True)


def _watch(descriptor: int, rendezvous: str, lifeline: int | None = None) -> None:
    threading.Thread(target=leave_with_engine, args=(descriptor, rendezvous, lifeline), daemon=True).start()


def serve(connection: Connection) -> None:
    """Set-up, pool size, then steps, one reply each, until the engine closes the connection."""
    setup: RankSetup = connection.recv()
    if not setup.rendezvous.startswith(TCP) or setup.store is not None:  # else it is watched already
        _watch(connection.fileno(), setup.rendezvous)
    try:
        runner = build_runner(setup)
        connection.send(RankReply(runner.max_kvcache_blocks()))
        connection.send(RankReply(f"{runner.start(connection.recv())}, {runner.tp.summary}"))
        settle_heap()
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
    if sys.argv[1] == "--connect":
        address, port, rank = sys.argv[2:]
        _end_with_parent()
        try:
            connection = connect(address, int(port), bytes.fromhex(sys.stdin.readline()), int(rank))
        except (OSError, EOFError, AuthenticationError) as error:
            print(f"rank {rank} cannot connect to its engine at {address}:{port}: {error}", file=sys.stderr)
            _leave(1)
        _watch(connection.fileno(), TCP, sys.stdin.fileno())  # nobody may ever send a set-up
    else:
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


def _end_with_parent() -> None:
    """Let the kernel kill this process with the thread that started it, where it can: also while it is suspended."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
