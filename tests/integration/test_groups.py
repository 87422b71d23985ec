"""Engines whose ranks are on several nodes of a real cluster, which lose ranks and nodes; and nodes chosen by their labels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local_nodes import LocalNodes, Node, alive, kill
from tests.counting import computed
from tests.faults import actors, members, named, ranks, suspend
from tests.integration.jobs import COUNTED, REPOSITORY, SLOW, leases, parts, start, table_of, wait_for

LIMIT_S = 300.0
pytestmark = pytest.mark.timeout(900)  # several jobs and drivers each, on machines that may be loaded
HOST = "RankHost"
APART = ["unshare", "--net", "--mount", "--fork", "--pid", "--kill-child", "--mount-proc"]
# Reads the cluster's state as its operators do.
STATE = """
import json, ray
ray.init(logging_level="ERROR", log_to_driver=False)
groups = ray.util.placement_group_table().values()
print(json.dumps([[group["state"], len(group["bundles"])] for group in groups]))
"""


def groups_ever(nodes: LocalNodes) -> list[tuple[str, int]]:
    """State and number of bundles of all placement groups that the cluster ever had."""
    command = [sys.executable, "-c", STATE]
    done = subprocess.run(command, env=nodes.environment(), capture_output=True, text=True, timeout=100, check=True)
    return [(state, bundles) for state, bundles in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture
def nodes() -> Iterator[LocalNodes]:
    """A head without CPUs; tests add nodes."""
    with LocalNodes() as nodes:
        yield nodes
        family = members(nodes)
    assert alive(family) == []


class Job:
    """A job whose engines have two ranks, and which counts what they compute."""

    def __init__(self, nodes: LocalNodes, place: Path, model: Path, dataset: Path, *settings: str) -> None:
        self.nodes = nodes
        self.output, self.counts = place / "output", place / "counts"
        arguments = [str(self.counts), "--model", str(model), "--input", str(dataset), "--output", str(self.output)]
        arguments += [*SLOW, "engine.tensor_parallel_size=2", "engine.device=cpu", *settings]
        self.process = start(arguments, place, script=COUNTED, env=nodes.environment())

    def wait_for(self, what: Any) -> Any:
        return wait_for(what, self.process, LIMIT_S)

    def goes_on(self) -> None:
        """Wait until engines have computed some more rows."""
        before = computed(self.counts).rows.total()
        self.wait_for(lambda: computed(self.counts).rows.total() >= before + 10)

    def end(self, undisturbed: Path) -> str:
        try:
            out, err = self.process.communicate(timeout=LIMIT_S)
        finally:
            self.process.kill()
        print(out, err, sep="\n")
        assert self.process.returncode == 0
        assert parts(self.output) == parts(undisturbed)
        assert table_of(self.output)["id"].to_pylist() == list(range(240))
        assert leases(self.output) == []
        return out + err


def other_than(node: Node, nodes: list[Node]) -> Node:
    return next(one for one in nodes if one is not node)


def with_engine(nodes: list[Node]) -> Node:
    """The one node of some that has an engine's actor."""
    (found,) = (node for node in nodes if actors(node))
    return found


def listening_on(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which any of them accepts connections."""
    pids = {process.pid for process in processes}
    sockets = [s for s in psutil.net_connections("inet") if s.pid in pids and s.status == psutil.CONN_LISTEN]
    return {s.laddr.ip.removeprefix("::ffff:") for s in sockets}


# Where Ray Data puts actors with the options that a job gives it: one that fits into one node, then two nodes' worth of one that fails to
# start at first, with room for no second group.
PLACED = """
import json, os, sys, ray
from cluster.groups import actor_options
from cluster.placement import Placement
ray.init(logging_level="ERROR", log_to_driver=False)
ray.data.DataContext.get_current().issue_detectors_config.detectors = []
ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = 3
class Where:
    def __init__(self, mark):
        if mark and not os.path.exists(mark):
            open(mark, "w").close()
            raise RuntimeError("not yet")
    def __call__(self, batch):
        here = ray.get_runtime_context().get_node_id()
        return {"pool": [node["Labels"].get("pool", "") for node in ray.nodes() if node["NodeID"] == here]}
def place(mark, *arguments):
    with actor_options(*arguments) as options:
        dataset = ray.data.from_items([1], override_num_blocks=1)
        pool = ray.data.ActorPoolStrategy(size=1)
        return dataset.map_batches(Where, fn_constructor_args=(mark,), compute=pool, **options).take_all()[0]["pool"]
found = [place("", Placement(1, 1, 0), 0, {"pool": "large"}, [{"pool": "in(small,other)"}])]
found.append(place(sys.argv[1], Placement(1, 1, 0, True, 2), 0, {"pool": "spare"}, []))
print(json.dumps(found))
"""


def test_a_group_over_two_nodes_loses_one(
    nodes: LocalNodes, tmp_path: Path, chat_model_dir: Path, dataset: Path, undisturbed: Path
) -> None:
    """The nodes asked for first do not exist, those asked for next have room for one rank each, another is not for us."""
    strange = nodes.add_node(num_cpus=2, labels={"pool": "other"})
    spare = [nodes.add_node(num_cpus=1, labels={"pool": "spare"}) for _ in range(2)]
    labels = ["run.label_selector={pool: large}", "run.label_fallbacks=[{pool: spare}]"]
    job = Job(nodes, tmp_path, chat_model_dir, dataset, "run.group=cluster", *labels)
    job.goes_on()
    engine = with_engine(spare)
    (actor,) = actors(engine)
    suspend(actor)  # the job stands still while it is looked at
    other = other_than(engine, spare)
    assert [len(ranks(node)) for node in (strange, engine, other)] == [0, 1, 1]
    assert named(HOST, members(other))
    assert listening_on([*members(engine), *members(other)]) == {"127.0.0.1"}
    before = ranks(nodes)

    nodes.kill_node(other)
    actor.resume()
    third = nodes.add_node(num_cpus=1, labels={"pool": "spare"})
    job.wait_for(lambda: ranks(third))
    assert ranks(strange) == []
    job.end(undisturbed)
    assert alive(before) == []
    assert groups_ever(nodes) == [("REMOVED", 2)]  # one engine, one group, in which it came back

    environment = {**nodes.environment(), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PLACED, str(tmp_path / "mark")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["other", "spare"]
    assert groups_ever(nodes) == [("REMOVED", 2)] * 3  # of the actor that failed, and of the one in its place


@pytest.mark.long  # test_a_group_over_two_nodes_loses_one stands for it
def test_groups_share_nothing_and_die_alone(
    nodes: LocalNodes, tmp_path: Path, chat_model_dir: Path, dataset: Path, undisturbed: Path
) -> None:
    """Two engines on four nodes of one GPU each: `auto` spans them. One loses a rank, then the node of its engine."""
    four = [nodes.add_node(num_cpus=1, num_gpus=1) for _ in range(4)]
    settings = ["run.num_gpus=2", "run.replicas=2", "engine.num_kvcache_blocks=4"]
    job = Job(nodes, tmp_path, chat_model_dir, dataset, *settings)
    job.wait_for(lambda: all(len(ranks(node)) == 1 for node in four) and job.goes_on() is None)
    engines = [node for node in four if actors(node)]
    assert len(engines) == 2
    victim, survivor = engines
    untouched = actors(survivor)
    # Of the ranks elsewhere, the victim's is the one that is connected to it.
    elsewhere = [node for node in four if node not in engines]
    mine = [node for node in elsewhere if connected(ranks(node), actors(victim))]
    assert len(mine) == 1
    assert not connected(ranks(mine[0]), [*actors(survivor), *ranks(survivor)])
    kept = [*ranks(survivor), *ranks(other_than(mine[0], elsewhere))]

    lost = [*ranks(victim), *ranks(mine[0])]
    kill(ranks(mine[0]))
    job.wait_for(lambda: not alive(lost) and ranks(victim) and ranks(mine[0]))
    job.goes_on()
    assert alive(kept) == kept

    nodes.kill_node(victim)
    fifth = nodes.add_node(num_cpus=1, num_gpus=1)
    job.wait_for(lambda: actors(fifth) and ranks(fifth) and ranks(mine[0]))
    assert alive([*untouched, *kept]) == [*untouched, *kept]
    job.end(undisturbed)
    assert groups_ever(nodes) == [("REMOVED", 2)] * 2


def connected(some: list[psutil.Process], others: list[psutil.Process]) -> bool:
    """Whether a TCP connection leads from any of these processes to any of those."""
    pids = {process.pid for process in some}, {process.pid for process in others}
    sockets = [s for s in psutil.net_connections("tcp") if s.status == psutil.CONN_ESTABLISHED]
    ends = {(s.laddr, s.raddr) for s in sockets if s.pid in pids[0]}
    return any((s.raddr, s.laddr) in ends for s in sockets if s.pid in pids[1])


@pytest.mark.long  # tests/unit/test_placement.py stands for it
def test_two_engines_on_one_node_see_their_own_devices(
    nodes: LocalNodes, tmp_path: Path, chat_model_dir: Path, dataset: Path, undisturbed: Path
) -> None:
    """A node with GPUs enough for each: ranks are child processes, and what Ray gave their engine is what they see."""
    node = nodes.add_node(num_cpus=1, num_gpus=4)
    job = Job(nodes, tmp_path, chat_model_dir, dataset, "run.num_gpus=2", "run.replicas=auto")
    job.wait_for(lambda: len(ranks(node)) == 4)
    seen = sorted(process.environ()["CUDA_VISIBLE_DEVICES"] for process in ranks(node))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert set(seen[0].split(",")) | set(seen[2].split(",")) == {"0", "1", "2", "3"}
    assert not named(HOST, members(nodes))
    assert listening_on(members(node)) == {"127.0.0.1"}
    job.end(undisturbed)
    assert groups_ever(nodes) == []


def may_have_namespaces() -> bool:
    """Whether this machine lets us make networks of our own."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    tried = "ip link add cable type veth peer name end && ip link add switch type bridge && mkdir -p /run/netns && mount -t tmpfs none /run/netns"
    return subprocess.run([*APART, "sh", "-c", tried], capture_output=True, timeout=60).returncode == 0


@pytest.mark.long  # test_a_group_over_two_nodes_loses_one stands for it, on nodes that share a loopback interface
def test_nodes_with_networks_of_their_own(
    tmp_path: Path, chat_model_dir: Path, dataset: Path, undisturbed: Path
) -> None:
    """As on several machines: ranks meet over the nodes' own addresses, and listen on nothing else."""
    if not may_have_namespaces():
        pytest.skip("needs root, unshare and ip, and a kernel with network namespaces, veth and bridges")
    output = tmp_path / "output"
    arguments = [str(tmp_path / "counts"), "--model", str(chat_model_dir), "--input", str(dataset)]
    arguments += ["--output", str(output), *SLOW, "engine.tensor_parallel_size=2", "engine.device=cpu"]
    command = [*APART, sys.executable, "-m", "tests.integration.namespaces", *arguments, "run.group=cluster"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["status"], seen["ranks"]) == (0, 2)
    assert parts(output) == parts(undisturbed)
    addresses = {"first": "10.77.0.2", "second": "10.77.0.3"}
    for node, other in (("first", "second"), ("second", "first")):
        ends = seen["sockets"][node]
        assert {local for status, local, _ in ends if status == "LISTEN"} <= {addresses[node]}
        assert addresses[other] in {remote for status, _, remote in ends if status == "ESTABLISHED"}
    assert any(status == "LISTEN" for node in addresses for status, _, _ in seen["sockets"][node])
