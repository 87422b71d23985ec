"""A cluster whose nodes have a network of their own each, and a job on it: `python -m tests.integration.namespaces ARGUMENTS...`

To be started as root by `unshare --net --mount --fork --pid --kill-child --mount-proc`, so that nothing of it outlives the call. The
nodes' namespaces hang on a bridge, as machines do on a switch; none can reach another over loopback. The job is `tests/counting.py` with
ARGUMENTS. While it runs, what ranks listen on and are connected to is looked at, then a rank is killed. One line of JSON is the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.local_nodes import SETTINGS
from tests.faults import RANK, named
from tests.integration.jobs import COUNTED, REPOSITORY

NODES = ["head", "first", "second"]
DEADLINE_S = 150.0


def address(node: str) -> str:
    return f"10.77.0.{NODES.index(node) + 1}"


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True)


def connect_nodes() -> None:
    """A namespace for each node, with one end of a cable whose other end is in the bridge."""
    Path("/run/netns").mkdir(exist_ok=True)
    command("mount", "-t", "tmpfs", "none", "/run/netns")  # of this mount namespace alone
    command("ip", "link", "add", "switch", "type", "bridge")
    command("ip", "link", "set", "switch", "up")
    for node in NODES:
        command("ip", "netns", "add", node)
        command("ip", "link", "add", f"to-{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
        command("ip", "link", "set", f"to-{node}", "master", "switch", "up")
        command("ip", "-n", node, "addr", "add", f"{address(node)}/24", "dev", "eth0")
        command("ip", "-n", node, "link", "set", "eth0", "up")
        command("ip", "-n", node, "link", "set", "lo", "up")


def start_ray(node: str, environment: dict[str, str], scratch: Path) -> None:
    """A raylet of one CPU, or the head without any."""
    options = ["--node-ip-address", address(node), "--object-store-memory=80000000", "--disable-usage-stats"]
    if node == "head":
        options += ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={scratch}"]
    else:
        options += ["--num-cpus=1", f"--address={address('head')}:6379"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    subprocess.run(
        ["ip", "netns", "exec", node, *ray], env=environment, check=True, stdout=sys.stderr, timeout=DEADLINE_S
    )


def ranks() -> list[psutil.Process]:
    return named(RANK, list(psutil.process_iter()))


SOCKETS = """
import json, psutil, sys
found = [c for c in psutil.net_connections("inet") if c.pid in map(int, sys.argv[1:]) and c.type == 1]
print(json.dumps([[c.status, c.laddr.ip, c.raddr.ip if c.raddr else ""] for c in found]))
"""


def sockets(node: str, processes: list[psutil.Process]) -> list[tuple[str, str, str]]:
    """State and both ends of the TCP sockets of some processes in a node's namespace."""
    look = ["ip", "netns", "exec", node, sys.executable, "-c", SOCKETS, *(str(process.pid) for process in processes)]
    done = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=True, timeout=DEADLINE_S)
    return [(status, local, remote) for status, local, remote in json.loads(done.stdout)]


def wait_for(what: Callable[[], bool], job: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert job.poll() is None, f"the job ended first, with status {job.returncode}"
        assert time.monotonic() < deadline, "the job never came so far"
        time.sleep(0.05)


def main(arguments: list[str], scratch: Path) -> None:
    """Run the job on a cluster of two nodes."""
    connect_nodes()
    environment = {
        **os.environ,
        **SETTINGS,
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
    }
    environment["HOME"] = str(scratch)
    del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # here nodes do listen on what others can reach
    (scratch / "token").write_text("0123456789abcdef" * 4)
    for node in NODES:
        start_ray(node, environment, scratch)
    job = subprocess.Popen(
        ["ip", "netns", "exec", "head", sys.executable, str(COUNTED), *arguments],
        env={**environment, "RAY_ADDRESS": f"{address('head')}:6379"},
        stdout=sys.stderr,
    )
    counts = Path(arguments[0])
    wait_for(lambda: any(path.stat().st_size for path in counts.glob("*")), job)
    before = ranks()
    seen = {node: sockets(node, before) for node in NODES}
    victim = next(process for process in before if "--connect" in process.cmdline())
    victim.kill()
    wait_for(lambda: len(ranks()) == 2 and not set(before) & set(ranks()), job)
    job.wait(timeout=DEADLINE_S)
    print(json.dumps({"status": job.returncode, "ranks": len(before), "sockets": seen}), flush=True)


if __name__ == "__main__":
    import tempfile

    # Ray's sockets lie in it, whose paths may have 107 characters.
    with (
        contextlib.suppress(FileNotFoundError),
        tempfile.TemporaryDirectory(prefix="ns-", dir="/tmp", ignore_cleanup_errors=True) as made,
    ):
        main(sys.argv[1:], Path(made))
