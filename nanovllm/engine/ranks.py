"""Where tensor-parallel ranks run, and how their engine reaches them. `RankedExecutor` asks a launcher for them.

`ChildRanks` makes them child processes, each with a private socket pair. Ranks on other machines connect over TCP to a `RankListener`,
which listens only while they do, and only takes those that know the group's secret. Nothing here imports torch: who starts a rank
need not be one.
"""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import NamedTuple

from nanovllm.errors import EngineDeadError, UserError

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# What ranks of one host find in their environment unless the user has set it. They share that host's kernel, nothing more.
RANK_ENVIRONMENT = {
    # Gloo and NCCL listen on a network interface to find each other, by default one that others can reach.
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
    # NVLink multicast is of no use to one-shot sums, and sets up the switch between the GPUs, which other jobs of a shared host
    # depend on; some machines offer it and then fail. "0" and "1" the other way round turn it on for NCCL and torch.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
GREETING_S = 10  # a stranger's silence at the listener; a rank's, whose engine does not answer
LOOK_S = 0.1
# A machine that is gone says nothing. One whose link is idle is missed after KEEP_IDLE_S + KEEP_TRIES * KEEP_EVERY_S; one that was sent
# something after UNHEARD_S, which must be longer than a rank that computes may leave its messages unread.
KEEP_IDLE_S, KEEP_EVERY_S, KEEP_TRIES = 5, 2, 3
UNHEARD_S = 30


class RankEnd(NamedTuple):
    """How a rank's process ended.

    Attributes:
        how: in words.
        killed: from outside, so that nothing it ran is to blame.
        signalled: by a signal, or with its machine: it had no time to say anything.
    """

    how: str
    killed: bool
    signalled: bool = False


def rank_end(status: int) -> RankEnd:
    """The end of a process with exit status `status`, negative where a signal ended it."""
    if status < 0:
        killed = -status in (signal.SIGKILL, signal.SIGTERM)
        return RankEnd(f"was killed by {signal.Signals(-status).name}", killed, True)
    return RankEnd(f"exited with status {status}", False)


class RankHandle(ABC):
    """A rank as its engine sees it.

    Attributes:
        connection: to the rank, in a group that was launched. A closed one is how either side learns that the other is gone.
        name: of its process, for people.
        here: it runs on the engine's machine.
    """

    connection: Connection
    name: str
    here: bool

    @abstractmethod
    def end(self, timeout_s: float) -> RankEnd | None:
        """Wait for the end of the process; None where it did not end, or nobody knows."""

    @abstractmethod
    def kill(self) -> None:
        """End the process at once, and do not wait for that. Does no harm where it has ended."""


class ChildRank(RankHandle):
    """A child process at the other end of a socket pair."""

    here = True

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.name = f"pid {process.pid}"

    @classmethod
    def start(cls, environment: Mapping[str, str], inherit: Sequence[int] = ()) -> ChildRank:
        """Start one that inherits some open files under their numbers."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = _command(str(theirs.fileno()))
            process = subprocess.Popen(command, pass_fds=[theirs.fileno(), *inherit], env=dict(environment))
        return cls(process, Connection(ours.detach()))

    def end(self, timeout_s: float) -> RankEnd | None:
        """See `RankHandle.end`."""
        try:
            return rank_end(self.process.wait(timeout=timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """See `RankHandle.kill`."""
        self.process.kill()


@dataclass
class RankGroup:
    """The ranks of one engine, connected and waiting for their set-up.

    Attributes:
        ranks: rank 0 first.
        rendezvous: where they meet: a path that does not exist yet, or `tcp://host:port` where they share no files.
        store: an open file of rank 0, the listening socket of that address.
        dissolve: frees what the group had beside its processes.
    """

    ranks: list[RankHandle]
    rendezvous: str
    store: int | None = None
    dissolve: Callable[[], None] = lambda: None


class RankLauncher(ABC):
    """Makes the ranks of an engine.

    Attributes:
        apart: each rank sees its own GPU and no other, and so does the engine; else all see all, and rank r has GPU r.
    """

    apart: bool

    @abstractmethod
    def launch(self, size: int) -> RankGroup:
        """Start `size` ranks.

        Raises:
            UserError: they cannot run here.
            EngineDeadError: one ended before it was connected.
        """


class ChildRanks(RankLauncher):
    """Ranks on this machine, as child processes."""

    apart = False

    def launch(self, size: int) -> RankGroup:
        """See `RankLauncher.launch`."""
        directory = Path(tempfile.mkdtemp(prefix="nanovllm-"))
        group = RankGroup([], str(directory / "store"), None, lambda: shutil.rmtree(directory, ignore_errors=True))
        try:
            for _ in range(size):
                group.ranks.append(ChildRank.start(rank_environment()))
        except BaseException:
            _end_all(group.ranks)
            group.dissolve()
            raise
        return group


class RemoteRanks(RankLauncher):
    """Ranks that may be on other machines, each with a process and a GPU for itself; rank 0 is a child of the engine."""

    apart = True

    @abstractmethod
    def address(self) -> str:
        """This machine's address, to which the others connect."""

    @abstractmethod
    def start(self, ranks: Sequence[int], address: str, port: int, secret: bytes) -> list[RankHandle]:
        """Have `start_remote_rank` called for each of `ranks` on its machine, with the other arguments as they are here.

        Raises:
            UserError: one cannot run there.
            EngineDeadError: it cannot be started.
        """

    def launch(self, size: int) -> RankGroup:
        """See `RankLauncher.launch`."""
        address = self.address()
        environment = rank_environment(interface_to(address))
        started: list[RankHandle] = []

        def check() -> None:
            for number, rank in enumerate(started):
                end = rank.end(timeout_s=0)
                if end is not None:
                    raise EngineDeadError(
                        f"tensor-parallel rank {number} ({rank.name}) {end.how} before it was connected", end.killed
                    )

        try:
            with listen(address) as store, closing(RankListener(address)) as listener:
                started.append(ChildRank.start(environment, [store.fileno()]))
                others = range(1, size)
                started += self.start(others, address, listener.port, listener.secret)
                for number, connection in listener.accept(others, check).items():
                    started[number].connection = connection
                host = f"[{address}]" if ":" in address else address
                rendezvous = f"tcp://{host}:{store.getsockname()[1]}"
                return RankGroup(started, rendezvous, store.fileno())
        except BaseException:
            _end_all(started)
            raise


def _end_all(ranks: Sequence[RankHandle]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.end(timeout_s=5)


def rank_environment(interface: str | None = None) -> dict[str, str]:
    """This process's environment with what a rank needs, which finds the others over `interface` (None: on this machine alone)."""
    ours = dict(RANK_ENVIRONMENT)
    if interface is not None:
        ours.update(
            GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=f"={interface}"
        )  # NCCL takes a bare name for a prefix
    paths = os.pathsep.join(path for path in [os.getcwd(), *sys.path] if path)
    return {**ours, **os.environ, "PYTHONPATH": paths}


def start_remote_rank(address: str, port: int, secret: bytes, rank: int) -> subprocess.Popen[bytes]:
    """Start a rank that connects to its engine's `RankListener`. It ends with the engine, and with the thread that calls this.

    Args:
        address, port, secret: of the listener; rank: which one of the group it is.

    Raises:
        UserError: no network interface of this machine leads to the engine.
    """
    environment = rank_environment(interface_to(address))
    command = _command("--connect", address, str(port), str(rank))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    # Not on the command line, which all users of a machine can read. The pipe stays open as long as this process lives.
    with suppress(OSError):  # it died; who waits for it will say so
        process.stdin.write(secret.hex().encode() + b"\n")
        process.stdin.flush()
    return process


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nanovllm.engine.rank_worker", *arguments]


def interface_to(address: str) -> str:
    """The network interface of this machine over which it reaches `address`, which may be its own.

    Raises:
        UserError: it is not to be found, and not given in the environment either.
    """
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    if given:
        return given
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            probe.connect((address, 9))  # sends nothing: the kernel chooses the way
        own = probe.getsockname()[0]
    found = _interface_of(own, family)
    if found is None:
        raise UserError(
            f"no network interface with the address {own} was found, over which ranks reach {address}; "
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its name on every node"
        )
    return found


def _interface_of(own: str, family: int) -> str | None:
    if own in ("127.0.0.1", "::1"):
        return LOOPBACK
    if not sys.platform.startswith("linux"):
        return None
    if family == socket.AF_INET6:
        wanted = socket.inet_pton(socket.AF_INET6, own.partition("%")[0]).hex()
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return next((line.split()[-1] for line in lines if line.split()[0] == wanted), None)
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(asking.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


def listen(address: str) -> socket.socket:
    """A socket that listens on a free port of this one address."""
    listening = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.bind((address, 0))
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening


class RankListener:
    """Takes the connections of an engine's ranks on other machines. To be closed as soon as all are there.

    Who connects must prove, both ways and before anything it sends is taken for more than bytes, that it knows `secret`; see
    "Authentication keys" of Python's `multiprocessing`.

    Attributes:
        address, port: where it listens.
    """

    def __init__(self, address: str, secret: bytes | None = None) -> None:
        self.secret = secret or secrets.token_bytes(32)
        self.address = address
        self._socket = listen(address)
        self.port: int = self._socket.getsockname()[1]
        self._arrived: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()
        self._over = threading.Event()
        # At once: a rank that is early may have to wait long for the others, but not for an answer.
        self._thread = threading.Thread(target=self._listen, name="rank-listener", daemon=True)
        self._thread.start()

    def accept(self, ranks: Collection[int], check: Callable[[], None]) -> dict[int, Connection]:
        """Wait until all `ranks` are connected. `check` is called every now and then and may raise to end that."""
        found: dict[int, Connection] = {}
        try:
            while len(found) < len(ranks):
                check()
                with suppress(queue.Empty):
                    rank, connection = self._arrived.get(timeout=LOOK_S)
                    if rank in ranks and rank not in found:
                        found[rank] = connection
                    else:
                        connection.close()
        except BaseException:
            for connection in found.values():
                connection.close()
            raise
        return found

    def close(self) -> None:
        """Listen no more. Connections stay."""
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        self._socket.settimeout(LOOK_S)
        while not self._over.is_set():
            try:
                caller, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:  # too many open files; who came is gone again
                self._over.wait(LOOK_S)
                continue
            threading.Thread(target=self._greet, args=(caller,), daemon=True).start()

    def _greet(self, caller: socket.socket) -> None:
        """Thread: let a caller in that knows the secret. A stranger may say nothing, or anything."""
        _tune(caller)
        _set_patience(caller, GREETING_S)
        connection = Connection(os.dup(caller.fileno()))
        try:
            deliver_challenge(connection, self.secret)
            answer_challenge(connection, self.secret)
            rank = int(connection.recv_bytes(8))
            _set_patience(caller, 0)
        except Exception:
            connection.close()
        else:
            self._arrived.put((rank, connection))
        finally:
            caller.close()


def connect(address: str, port: int, secret: bytes, rank: int) -> Connection:
    """Connect rank `rank` to its engine's `RankListener`.

    Raises:
        OSError: there is nobody.
        multiprocessing.AuthenticationError: it is not who has this secret.
    """
    with socket.create_connection((address, port), timeout=GREETING_S) as calling:
        calling.settimeout(None)
        _tune(calling)
        _set_patience(calling, GREETING_S)
        connection = Connection(os.dup(calling.fileno()))
        try:
            answer_challenge(connection, secret)
            deliver_challenge(connection, secret)
            connection.send_bytes(str(rank).encode())
            _set_patience(calling, 0)
        except BaseException:
            connection.close()
            raise
        return connection


def _tune(connected: socket.socket) -> None:
    """Send every message at once, and notice when the other machine is gone."""
    connected.setblocking(True)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    values = {
        "TCP_KEEPIDLE": KEEP_IDLE_S,
        "TCP_KEEPINTVL": KEEP_EVERY_S,
        "TCP_KEEPCNT": KEEP_TRIES,
        "TCP_USER_TIMEOUT": 1000 * UNHEARD_S,
    }
    for name, value in values.items():
        if hasattr(socket, name):  # not on every system
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _set_patience(connected: socket.socket, seconds: int) -> None:
    """Let reads and writes of this socket fail after so long; 0: never."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, 0))
