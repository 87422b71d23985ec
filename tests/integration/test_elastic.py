"""Engines come and go with the nodes of a real cluster, and those that cannot start are tried again."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.jobs import SLOW, environment, kill_everything, leases, parts, report, start, wait_for

TIMEOUT_S = 200.0


class Nodes:
    """A Ray cluster of nodes with one GPU each, as Ray believes, on this machine."""

    def __init__(self, home: Path) -> None:
        self._ports = iter(_free_ports(30))
        self.address = f"127.0.0.1:{next(self._ports)}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        # A dead node is noticed after 3 s, not 15. HOME: where Ray keeps the token of a cluster.
        self.variables = {"HOME": str(home), "RAY_ADDRESS": self.address}
        checks = {"initial_delay": "1000", "period": "1000", "timeout": "1000"}
        self._environment = {
            **environment(),
            "HOME": str(home),
            "RAY_health_check_failure_threshold": "3",
            **{f"RAY_health_check_{name}_ms": value for name, value in checks.items()},
        }
        del self._environment["RAY_ADDRESS"]
        self._log = home / "nodes.log"

    def join(self) -> None:
        """Start a node; the first is the cluster's head."""
        where = ["--address", self.address]
        if not self.nodes:
            where = ["--head", "--port", self.address.split(":")[1], "--include-dashboard=false"]
        kinds = ("node-manager", "object-manager", "runtime-env-agent", "dashboard-agent-grpc", "metrics-export")
        ports = [f"--{kind}-port={next(self._ports)}" for kind in kinds]
        ports += [f"--dashboard-agent-listen-port={next(self._ports)}", "--min-worker-port=0", "--max-worker-port=0"]
        size = ["--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"]
        with self._log.open("ab") as log:
            node = subprocess.Popen(
                [*command, *where, *ports, *size], env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        self.nodes.append(node)

    def workers(self, node: int) -> list[psutil.Process]:
        """Processes of the engine actors on a node that are through their constructor."""
        return [process for process in _family(self.nodes[node]) if _is_worker(process)]

    def leave(self, node: int) -> None:
        """SIGKILL a node: its raylet and all below it."""
        kill_everything(self.nodes[node])


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def _family(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


def _is_worker(process: psutil.Process) -> bool:
    title = _title(process)
    return "ShardWorker" in title and "__init__" not in title


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path)
    cluster.join()
    try:
        yield cluster
    finally:
        for number, node in reversed(list(enumerate(cluster.nodes))):
            if node.poll() is None:
                cluster.leave(number)


def test_nodes_join_and_leave(
    nodes: Nodes, undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path
) -> None:
    """One GPU and a minimum of two engines: it starts with one. Workers are held, so that each node's turn comes for sure."""
    output = workplace / "elastic"
    arguments = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW]
    arguments += ["engine.device=cpu", "run.num_gpus=1", "run.replicas=[2,3]"]
    time.sleep(5)
    job = start(arguments, workplace, **nodes.variables)
    try:
        held: list[psutil.Process] = []
        for number in range(3):
            if number:
                nodes.join()
            wait_for(lambda number=number: bool(nodes.workers(number)), job, TIMEOUT_S)  # type: ignore[misc]
            before = len(parts(output))
            wait_for(lambda before=before: len(parts(output)) > before, job, TIMEOUT_S)  # type: ignore[misc]
            if number < 2:
                held += nodes.workers(number)
                held[-1].suspend()
        nodes.leave(1)
        held[0].resume()
        out, err = job.communicate(timeout=TIMEOUT_S)
    finally:
        if job.poll() is None:
            kill_everything(job)
    print(out, err, sep="\n")
    assert job.returncode == 0
    assert parts(output) == parts(undisturbed)
    workers = {shard["worker"] for shard in report(output)["this_start"]["shards"]}
    assert len(workers) >= 3


def test_an_engine_that_cannot_load_fails_the_job_in_its_own_words(
    workplace: Path, dataset: Path, chat_model_dir: Path
) -> None:
    """The model's weights go away between the driver's check and the load."""
    output, model = workplace / "vanished", workplace / "vanishing"
    shutil.copytree(chat_model_dir, model)
    job = start(["--model", str(model), "--input", str(dataset), "--output", str(output), *SLOW], workplace)
    try:
        wait_for((output / "_run" / "job.json").exists, job)
        shutil.rmtree(model)
        out, err = job.communicate(timeout=TIMEOUT_S)
    finally:
        if job.poll() is None:
            kill_everything(job)
    print(out, err, sep="\n")
    assert job.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(model) in last
    assert leases(output) == []


def test_an_actor_killed_in_its_constructor_is_replaced(
    workplace: Path, dataset: Path, chat_model_dir: Path, undisturbed: Path
) -> None:
    output = workplace / "constructor"
    job = start(["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW], workplace)
    killed: set[int] = set()

    def kill_three() -> bool:
        for process in _family(job):
            title = _title(process)
            if len(killed) < 3 and "ShardWorker" in title and "__init__" in title and process.pid not in killed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
                    killed.add(process.pid)
        return len(killed) == 3

    try:
        wait_for(kill_three, job, TIMEOUT_S)
        out, err = job.communicate(timeout=TIMEOUT_S)
    finally:
        if job.poll() is None:
            kill_everything(job)
    print(out, err, sep="\n")
    assert job.returncode == 0
    assert parts(output) == parts(undisturbed)
