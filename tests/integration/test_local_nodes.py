"""The cluster on one machine that other tests rely on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil

from cluster.local_nodes import LocalNodes, alive, wait_gone
from tests.faults import members
from tests.integration.jobs import REPOSITORY

DRIVER = """
import json, ray
ray.init(logging_level="ERROR", log_to_driver=False)
alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
gpu = ray.remote(num_gpus=1)(lambda: ray.get_gpu_ids())
print(json.dumps({"nodes": alive, "gpus": len(ray.get(gpu.remote()))}))
"""
MAKER = """
import json, time
from cluster.local_nodes import LocalNodes, alive, wait_gone
from tests.faults import members
with LocalNodes() as nodes:
    nodes.add_node()
    print(json.dumps([process.pid for process in members(nodes)]), flush=True)
    time.sleep(600)
"""


def test_nodes_as_asked_for_and_on_loopback_only() -> None:
    with LocalNodes() as nodes:
        nodes.add_node(num_cpus=3, num_gpus=2, resources={"disk": 5})
        command = [sys.executable, "-c", DRIVER]
        done = subprocess.run(command, env=nodes.environment(), capture_output=True, text=True, timeout=100, check=True)
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["gpus"] == 1
        head, node = sorted(said["nodes"], key=lambda resources: resources.get("CPU", 0))
        assert "CPU" not in head
        assert (node["CPU"], node["GPU"], node["disk"]) == (3, 2, 5)
        family = members(nodes)
        pids = {process.pid for process in family}
        sockets = [socket for socket in psutil.net_connections("tcp") if socket.pid in pids]
        listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
        assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert alive(family) == []


def test_a_cluster_ends_with_its_maker() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    maker = subprocess.Popen([sys.executable, "-c", MAKER], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert maker.stdout is not None
        family = [psutil.Process(pid) for pid in json.loads(maker.stdout.readline())]
        assert len(family) > 3
    finally:
        maker.send_signal(signal.SIGKILL)
        maker.communicate()
    assert wait_gone(family, 60) == []
