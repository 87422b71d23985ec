"""The child process of one tensor-parallel rank: `python -m nanovllm.engine.rank_worker FD`, started by `MultiprocExecutor`.

It leaves when its socket closes, so no rank outlives its engine however that ended.
"""

from __future__ import annotations

import shutil
import signal
import sys
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from nanovllm.engine.executor import RankReply, RankSetup
from nanovllm.engine.model_runner import ModelRunner, resolve_device
from nanovllm.errors import UserError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.utils.transfer import HostCopy

# How long a rank waits for its next message before it looks whether its step is done: short against any step.
POLL_SECONDS = 50e-6


def build_runner(setup: RankSetup) -> ModelRunner:
    """Join the process group and load this rank's shard."""
    torch.set_num_threads(setup.num_threads)
    device = resolve_device(setup.config, setup.rank)
    size = setup.config.tensor_parallel_size
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{setup.rendezvous}",
        rank=setup.rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
    )
    return ModelRunner(
        setup.config, setup.model_config, setup.max_model_len, TensorParallel(setup.rank, size, dist.group.WORLD)
    )


def serve(connection: Connection) -> None:
    """Set-up, pool size, then steps, one reply each, until the engine closes the connection."""
    setup = connection.recv()
    try:
        runner = build_runner(setup)
        connection.send(RankReply(runner.max_kvcache_blocks()))
        connection.send(RankReply(runner.start(connection.recv())))
        in_flight: deque[HostCopy] = deque()
        while True:
            # The next step is launched as soon as it is known, also while this one runs.
            if not in_flight or connection.poll(0 if in_flight[0].ready() else POLL_SECONDS):
                in_flight.append(runner.launch(connection.recv()))
            elif in_flight[0].ready():
                connection.send(RankReply(in_flight.popleft().tolist()))
    finally:
        # The engine removes it too, but not where it was killed or dropped.
        shutil.rmtree(Path(setup.rendezvous).parent, ignore_errors=True)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the engine decides when to end
    connection = Connection(int(sys.argv[1]))
    try:
        serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        user_error = isinstance(error, UserError)
        if not user_error:
            traceback.print_exc()
        line = (
            str(error) if user_error else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        with suppress(OSError):  # where the engine is gone there is nobody to tell
            connection.send(RankReply(error=line, user_error=user_error))
        sys.exit(1)


if __name__ == "__main__":
    main()
