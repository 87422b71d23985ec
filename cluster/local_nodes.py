"""A Ray cluster of many nodes on one machine, for tests and benchmarks: real raylets that can be killed one by one.

    with LocalNodes() as nodes:
        first = nodes.add_node(num_cpus=2)
        subprocess.run([sys.executable, "pipelines/generate.py", ...], env=nodes.environment())
        nodes.kill_node(first)

Nodes are started by `ray.cluster_utils.Cluster` in a process of its own, the keeper: `ray start` refuses nodes that listen on
127.0.0.1 alone and imports Ray anew for every node, and a cluster in the caller's process would share its settings and token.
The keeper ends with the pipe to it, so nothing of a cluster outlives the process that made it, however that one ended.
Needs psutil, which comes with the `dev` extra.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

OBJECT_STORE_BYTES = 80_000_000  # Ray refuses less than 75 MiB
STOP_S = 20.0
HOST = "127.0.0.1"
# What every process of the cluster and every driver finds in its environment.
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it Ray takes 127.0.0.1 for a mistake and uses an address that others can reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # A dead raylet is known after 2 s; by default after 15.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    # It would add faults of its own on a machine whose memory others fill.
    "RAY_memory_monitor_refresh_ms": "0",
}


class Node(NamedTuple):
    """A node of the cluster: its raylet, and what else was started with it (on the head). Workers are below the raylet."""

    name: str
    processes: list[psutil.Process]

    def members(self) -> list[psutil.Process]:
        """All processes of the node that live now, parents first."""
        found: list[psutil.Process] = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [process, *process.children(recursive=True)]
        return alive(found)


class LocalNodes:
    """A cluster: a head without CPUs when it is entered, and the nodes that `add_node` adds.

    Args:
        head_cpus: CPUs of the head.
        dashboard: with Ray's dashboard on the head, a dozen processes that start for some seconds. It writes
            `prometheus_targets`; metrics are exported without it too.

    Attributes:
        nodes: those that live, in the order they were added; without the head.
    """

    def __init__(self, head_cpus: int = 0, dashboard: bool = False) -> None:
        self.nodes: list[Node] = []
        self._head_cpus = head_cpus
        self._dashboard = dashboard
        self._head: Node | None = None
        self._added = 0
        self._address = ""
        self._keeper: subprocess.Popen[str] | None = None
        # Ray's sockets lie below it, and their paths may have 107 characters.
        self._directory = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp" if sys.platform != "win32" else None))
        token = self._directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))

    def __enter__(self) -> LocalNodes:
        """Start the head."""
        self.start_head()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the cluster and remove its files."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def head(self) -> Node:
        """The head node."""
        assert self._head is not None, "the head is not running"
        return self._head

    def environment(self) -> dict[str, str]:
        """The caller's own environment, with what a driver needs to connect to the cluster as it is now."""
        home = self._directory / "home"
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            **SETTINGS,
            "RAY_ADDRESS": self._address,
            "RAY_AUTH_TOKEN_PATH": str(self._directory / "token"),
            "RAY_TMPDIR": str(self._directory),
            "HOME": str(home),
        }

    @property
    def prometheus_targets(self) -> Path:
        """The file in which Ray's dashboard keeps the addresses that Prometheus scrapes. It comes some seconds after the head."""
        return self._directory / "ray" / "prom_metrics_service_discovery.json"

    def start_head(self) -> Node:
        """Start a head, after `kill_head` a new one that knows nothing of the cluster before it."""
        assert self._keeper is None, "the head is running"
        environment = self.environment()
        del environment["RAY_ADDRESS"]
        log = (self._directory / "keeper.log").open("a")
        with log:
            self._keeper = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C is the caller's
            )
        dashboard = {"include_dashboard": True, "dashboard_host": HOST} if self._dashboard else {}
        self._head = self._start(num_cpus=self._head_cpus, num_gpus=0, resources={}, **dashboard)
        return self._head

    def add_node(
        self,
        num_cpus: int = 2,
        num_gpus: int = 0,
        resources: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Node:
        """Start a node and wait until it takes work. CPUs and GPUs are what Ray believes in; the machine need not have them."""
        options = {"resources": dict(resources or {}), "labels": dict(labels or {})}
        node = self._start(num_cpus=num_cpus, num_gpus=num_gpus, **options)
        self.nodes.append(node)
        return node

    def kill_node(self, node: Node) -> None:
        """SIGKILL a node's raylet and everything below it at once, as a power cut does."""
        kill(node.members())
        self.nodes.remove(node)
        self._ask({"forget": node.name})

    def kill_head(self) -> None:
        """SIGKILL the head and all nodes, as a power cut of the whole cluster does."""
        if self._keeper is None:
            return
        keeper = psutil.Process(self._keeper.pid)
        kill([*keeper.children(recursive=True), keeper])
        self._close()

    def stop(self) -> None:
        """Stop everything; all processes have ended when this returns."""
        if self._keeper is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            keeper = psutil.Process(self._keeper.pid)
            members = [*keeper.children(recursive=True), keeper]
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            wait_gone([keeper], STOP_S)
            kill(members)
        self._close()

    def _close(self) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.wait()
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        self._keeper, self._head, self._address = None, None, ""
        self.nodes.clear()

    def _start(self, **options: Any) -> Node:
        self._added += 1
        name = f"node{self._added}"
        reply = self._ask({"add": name, "options": options})
        self._address = reply["address"]
        return Node(name, [psutil.Process(pid) for pid in reply["pids"]])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._keeper is not None and self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(json.dumps(request) + "\n")
        self._keeper.stdin.flush()
        line = self._keeper.stdout.readline()
        if not line:
            raise RuntimeError(f"the cluster's keeper died:\n{(self._directory / 'keeper.log').read_text()[-2000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that live. A zombie does not: it waits for its parent to notice."""
    living = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until none of them lives, or the time is up; those that still do."""
    deadline = time.monotonic() + timeout_s
    living = alive(processes)
    while living and time.monotonic() < deadline:
        time.sleep(0.02)
        living = alive(living)
    return living


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL some processes at once and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    living = wait_gone(processes, STOP_S)
    if living:
        raise RuntimeError(f"still alive after SIGKILL: {living}")


def keep() -> None:
    """The keeper: starts nodes as it is told on stdin, one JSON object a line, and stops them all when that ends."""
    from ray.cluster_utils import Cluster

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints
    cluster = Cluster(shutdown_at_exit=False)
    nodes: dict[str, Any] = {}
    me = psutil.Process()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            reply: dict[str, Any] = {}
            if "add" in request:
                before = me.children()
                nodes[request["add"]] = cluster.add_node(
                    node_ip_address=HOST,
                    object_store_memory=OBJECT_STORE_BYTES,
                    **{"include_dashboard": False, **request["options"]},
                )
                pids = [process.pid for process in me.children() if process not in before]
                reply = {"pids": pids, "address": cluster.address}
            else:
                cluster.remove_node(nodes.pop(request["forget"]), allow_graceful=False)
            print(json.dumps(reply), file=replies, flush=True)
    finally:
        family = me.children(recursive=True)
        cluster.shutdown()
        kill(family)


if __name__ == "__main__":
    keep()
