"""Ranks that connect over TCP, without Ray: separate processes on this machine, which meet as those of several machines do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm import LLM, AsyncLLM, EngineDeadError, SamplingParams, UserError
from nanovllm.engine import ranks as module
from nanovllm.engine.ranks import (
    ChildRank,
    RankEnd,
    RankHandle,
    RankListener,
    RemoteRanks,
    connect,
    interface_to,
    rank_end,
    start_remote_rank,
)
from tests.faults import RANK, named
from tests.unit.test_engine_tensor_parallel import ROOT, gone, wait_until

HOST = "127.0.0.1"


class RankElsewhere(RankHandle):
    """A rank that this process pretends not to be able to look at but through its handle."""

    here = False

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.name = f"pid {process.pid} elsewhere"

    def end(self, timeout_s: float) -> RankEnd | None:
        try:
            return rank_end(self.process.wait(timeout=timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self.process.kill()


class Elsewhere(RemoteRanks):
    """Ranks but the first by TCP over the loopback interface. `before`: what is done before they start."""

    def __init__(self, before: Callable[[str, int], None] = lambda address, port: None, wrong: bool = False) -> None:
        self.before = before
        self.wrong = wrong
        self.port = 0

    def address(self) -> str:
        return HOST

    def start(self, ranks: Sequence[int], address: str, port: int, secret: bytes) -> list[RankHandle]:
        self.port = port
        self.before(address, port)
        given = bytes(32) if self.wrong else secret
        return [RankElsewhere(start_remote_rank(address, port, given, rank)) for rank in ranks]


def rank_tree() -> list[psutil.Process]:
    return named(RANK, psutil.Process().children(recursive=True))


def test_ranks_over_tcp_sample_as_one_and_listen_on_one_address(model_dir: Path) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(257) for _ in range(rng.randint(1, 30))] for _ in range(8)]
    params = [SamplingParams(temperature=0.9, max_tokens=16, seed=i) for i in range(8)]
    one = LLM(str(model_dir), kvcache_block_size=16).generate(prompts, params, use_tqdm=False)
    launcher = Elsewhere()
    llm = LLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16, launcher=launcher)
    processes = rank_tree()
    assert len(processes) == 2
    assert llm.executor.summary.startswith("2 ranks, each: ")
    two = llm.generate(prompts, params, use_tqdm=False)
    assert [o["token_ids"] for o in two] == [o["token_ids"] for o in one]
    sockets = [s for p in [psutil.Process(), *processes] for s in p.net_connections("inet")]
    listening = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    assert listening == {HOST}, listening
    with socket.socket() as probe:  # the engine's own listener is closed
        assert probe.connect_ex((HOST, launcher.port)) != 0
    llm.exit()
    assert all(map(gone, processes))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_every_request_with_its_name(victim: int, model_dir: Path) -> None:
    engine = AsyncLLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16, launcher=Elsewhere())
    processes = sorted(rank_tree(), key=lambda p: "--connect" in p.cmdline())
    futures = [engine.submit([i], SamplingParams(temperature=0, max_tokens=500)) for i in range(8)]
    wait_until(lambda: engine.stats().generated_tokens > 20, 60)
    processes[victim].kill()
    for future in futures:
        with pytest.raises(
            EngineDeadError, match=rf"rank {victim} \(pid {processes[victim].pid}.*\) was killed by SIGKILL"
        ) as died:
            future.result(timeout=60)
        assert died.value.killed
    wait_until(lambda: all(map(gone, processes)), 60)
    engine.shutdown()


PROGRAM = """
import sys
from nanovllm import LLM
from tests.unit.test_ranks import Elsewhere
llm = LLM(sys.argv[1], tensor_parallel_size=2, kvcache_block_size=16, launcher=Elsewhere())
print("ready", flush=True)
llm.generate([[1, 2, 3]] * 4, use_tqdm=False) and sys.stdin.read()
"""


def test_ranks_end_with_their_engine(model_dir: Path) -> None:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", PROGRAM, str(model_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as parent:  # type: ignore[call-overload]
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert len(processes) >= 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: all(map(gone, processes)), 60)


HOLDER = """
import sys
from nanovllm.engine.ranks import start_remote_rank
process = start_remote_rank(sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3]), 1)
print(process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("suspended", [False, True])
def test_a_rank_ends_with_the_process_that_started_it(suspended: bool) -> None:
    """On another machine that is an actor, and what kills it must not leave a rank on its GPU. It may not have its set-up yet."""
    with RankListenerThread() as served:
        listener = served.listener
        command = [sys.executable, "-c", HOLDER, HOST, str(listener.port), listener.secret.hex()]
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, env=environment, **pipes) as holder:  # type: ignore[call-overload]
            assert holder.stdout is not None
            rank = psutil.Process(int(holder.stdout.readline()))
            assert served.wait() == {1}
            assert not gone(rank)
            if suspended:
                rank.suspend()
            holder.kill()
            holder.wait()
            try:
                wait_until(lambda: gone(rank), 60)
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()


class RankListenerThread:
    """A listener that waits for rank 1 in a thread."""

    def __enter__(self) -> RankListenerThread:
        self.listener = RankListener(HOST)
        self.found: dict[int, Connection] = {}
        self.stop = False
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def _serve(self) -> None:
        with contextlib.suppress(EOFError):
            self.found = self.listener.accept([1], self._check)

    def _check(self) -> None:
        if self.stop:
            raise EOFError

    def wait(self, seconds: float = 60) -> set[int]:
        self.thread.join(seconds)
        return set(self.found)

    def __exit__(self, *_: object) -> None:
        self.stop = True
        self.thread.join(60)
        self.listener.close()
        for connection in self.found.values():
            connection.close()


class Mark:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_strangers_get_nowhere_and_hold_nobody_up(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    with RankListenerThread() as served:
        listener = served.listener
        silent = socket.create_connection((HOST, listener.port))
        loud = socket.create_connection((HOST, listener.port))
        connection = Connection(os.dup(loud.fileno()))
        for _ in range(3):
            connection.send_bytes(pickle.dumps(Mark(str(mark))))
        with pytest.raises(AuthenticationError):
            connect(HOST, listener.port, bytes(32), 1)
        with pytest.raises((OSError, EOFError)):  # told that it is wrong, and cut off
            deque(iter(connection.recv_bytes, None))
        assert served.wait(0.2) == set()
        other = connect(HOST, listener.port, listener.secret, 7)  # of no rank that is waited for
        with pytest.raises((OSError, EOFError)):
            other.recv_bytes()
        mine = connect(HOST, listener.port, listener.secret, 1)
        assert served.wait() == {1}
        served.found[1].send("hello")
        assert mine.recv() == "hello"
        for opened in (silent, loud, connection, other, mine):
            opened.close()
    assert not mark.exists()


def test_an_early_rank_need_not_wait_to_be_known() -> None:
    """The others may come much later than its patience lasts: when Ray has found a node for them, or a model was fetched."""
    with contextlib.closing(RankListener(HOST)) as listener:
        early = connect(HOST, listener.port, listener.secret, 2)
        late = connect(HOST, listener.port, listener.secret, 1)
        found = listener.accept([1, 2], lambda: None)
        found[2].send("you are 2")
        assert early.recv() == "you are 2"
        for connection in (early, late, *found.values()):
            connection.close()
    with socket.socket() as probe:
        assert probe.connect_ex((HOST, listener.port)) != 0


def test_a_rank_without_the_secret_is_an_error_not_a_wait(model_dir: Path) -> None:
    with pytest.raises(
        EngineDeadError, match=r"rank 1 \(pid \d+ elsewhere\) exited with status 1 before it was connected"
    ):
        LLM(str(model_dir), tensor_parallel_size=2, kvcache_block_size=16, launcher=Elsewhere(wrong=True))
    wait_until(lambda: not rank_tree(), 60)


def test_the_listener_must_know_the_secret_too() -> None:
    """A rank that came to another listener on that port does not take orders from it."""
    with RankListenerThread() as served:
        served.listener.secret = bytes(32)
        with pytest.raises(AuthenticationError):
            connect(HOST, served.listener.port, bytes([1]) * 32, 1)


def test_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface_to("127.0.0.1") == module.LOOPBACK
    for name, addresses in psutil.net_if_addrs().items():
        mine = [a.address for a in addresses if a.family == socket.AF_INET and not a.address.startswith("127.")]
        if mine and psutil.net_if_stats()[name].isup:
            # A machine reaches its own address over loopback, but listens for others on the interface that has it.
            assert interface_to(mine[0]) == name
    monkeypatch.setattr(module, "_interface_of", lambda own, family: None)
    with pytest.raises(UserError, match="set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"):
        interface_to("127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert interface_to("127.0.0.1") == "eth7"


def test_how_a_process_ended() -> None:
    assert rank_end(-signal.SIGKILL) == RankEnd("was killed by SIGKILL", True, True)
    assert rank_end(-signal.SIGSEGV) == RankEnd("was killed by SIGSEGV", False, True)
    assert rank_end(3) == RankEnd("exited with status 3", False, False)
    ours, _ = multiprocessing.Pipe()
    child = ChildRank(subprocess.Popen(["sleep", "60"]), ours)
    assert child.end(0) is None
    child.kill()
    assert child.end(60) == RankEnd("was killed by SIGKILL", True, True)
    ours.close()


def test_nothing_about_ranks_needs_torch() -> None:
    """Who starts a rank on another machine is a process of its own, and need not be large."""
    program = "import sys, nanovllm.engine.ranks; print('torch' in sys.modules)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
