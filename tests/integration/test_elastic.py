"""Engines come and go with the nodes of a real cluster, and those that cannot start are tried again."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import psutil

from cluster.local_nodes import LocalNodes, Node
from tests.faults import actors
from tests.integration.jobs import SLOW, end, leases, members, parts, report, start, wait_for

TIMEOUT_S = 200.0


def loaded(node: Node) -> list[psutil.Process]:
    """Engine actors of a node that are through their constructor."""
    found = []
    for actor in actors(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "__init__" not in " ".join(actor.cmdline()):
                found.append(actor)
    return found


def test_nodes_join_and_leave(undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path) -> None:
    """One GPU and a minimum of two engines: it starts with one. Workers are held, so that each node's turn comes for sure."""
    output = workplace / "elastic"
    arguments = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW]
    arguments += ["engine.device=cpu", "run.num_gpus=1", "run.replicas=[2,3]"]
    with LocalNodes() as nodes:
        nodes.add_node(num_cpus=1, num_gpus=1)
        job = start(arguments, workplace, env=nodes.environment())
        try:
            held: list[psutil.Process] = []
            for number in range(3):
                node = nodes.nodes[number] if number == 0 else nodes.add_node(num_cpus=1, num_gpus=1)
                worker = wait_for(lambda node=node: loaded(node), job, TIMEOUT_S)[0]  # type: ignore[misc]
                before = len(parts(output))
                wait_for(lambda before=before: len(parts(output)) > before, job, TIMEOUT_S)  # type: ignore[misc]
                if number < 2:
                    worker.suspend()
                    held.append(worker)
            nodes.kill_node(nodes.nodes[1])
            held[0].resume()
        finally:
            done = end(job)
    assert done.returncode == 0
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
    finally:
        done = end(job)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
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
        for process in members(job, "ShardWorker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if len(killed) < 3 and "__init__" in " ".join(process.cmdline()) and process.pid not in killed:
                    process.kill()
                    killed.add(process.pid)
        return len(killed) == 3

    try:
        wait_for(kill_three, job, TIMEOUT_S)
    finally:
        done = end(job)
    assert done.returncode == 0
    assert parts(output) == parts(undisturbed)
