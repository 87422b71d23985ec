"""What stands in `cluster/` and runs without a cloud: the script for Slurm with real Ray nodes, and the hook that stops a head's jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.local_nodes import LocalNodes
from tests.integration.jobs import (
    GENERATE,
    REPOSITORY,
    SLOW,
    end,
    environment,
    journalled_rows,
    leases,
    report,
    run,
    start,
    table_of,
    wait_for,
    write_prompts,
)
from tests.integration.test_elastic import loaded
from tests.integration.test_predictor import head

__all__ = ["head"]  # the fixture

SCRIPT = REPOSITORY / "cluster" / "slurm.sh"
# In place of Slurm's own commands: every node is this machine. `srun` becomes the command, as a signal to the one is one to the other.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do printf '%s ' "$1" >> "$CALLS"; shift; done
echo >> "$CALLS"
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[ "$1" != show ] || for ((node = 1; node <= NODES; node++)); do echo "node$node"; done
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as a job of some nodes; Slurm's commands write down how they are called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)

    def submit(nodes: int, *arguments: str) -> subprocess.Popen[str]:
        env = {
            **environment(),
            "PATH": f"{commands}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "NODES": str(nodes),
            "PYTHON": sys.executable,
            "HEAD_ADDRESS": "127.0.0.1",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_CPUS_PER_TASK": "1",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return submit


def left_over() -> list[str]:
    """Command lines of Ray processes of the script's clusters that still live."""
    mark = f"/tmp/ray-{os.getpid()}"
    return [
        " ".join(each.info["cmdline"])
        for each in psutil.process_iter(["cmdline"])
        if mark in " ".join(each.info["cmdline"] or [])
    ]


@pytest.mark.long
def test_slurm_out_of_time_goes_on(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, chat_model_dir: Path
) -> None:
    rows = write_prompts(tmp_path / "in", {"a.parquet": 300})
    output = tmp_path / "out"
    job = ["--model", str(chat_model_dir), "--input", str(tmp_path / "in"), *SLOW]
    first = slurm(2, *job, "--output", str(output))
    wait_for(lambda: journalled_rows(output) > 0, first)
    first.send_signal(signal.SIGUSR1)  # as Slurm does before the time is up
    done = end(first)
    assert done.returncode == 1
    assert "cluster  2 nodes" in done.stdout
    assert "queued again" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split("--nodelist=")[1].strip() for call in calls if "--nodelist" in call] == ["node1", "node2"]
    assert calls[-1] == f"scontrol requeue {os.getpid()}"
    assert left_over() == []
    assert not Path(f"/tmp/ray-{os.getpid()}").exists()

    done = run([*job, "--output", str(output)], tmp_path)  # what Slurm would start is this, on a cluster again
    assert done.returncode == 0
    assert report(output)["this_start"]["reused_rows"] > 0
    assert table_of(output)["id"].to_pylist() == list(range(rows))


@pytest.mark.long
def test_slurm_gets_the_status_of_a_refusal(slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    done = end(slurm(1, "--model", "m", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "out")))
    assert done.returncode == 2
    assert "none" in done.stderr
    assert left_over() == []


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the files for clusters: `ray job stop` waits for what a job has to do; without it, three seconds."""
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "10")


@pytest.mark.long
def test_the_hook_of_a_head_stops_its_jobs(
    patience: None, head: dict[str, str], tmp_path: Path, chat_model_dir: Path
) -> None:
    write_prompts(tmp_path / "in", {"a.parquet": 300})
    output = tmp_path / "out"
    env = {**head, "PYTHONPATH": str(REPOSITORY)}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    job = ["--model", str(chat_model_dir), "--input", str(tmp_path / "in"), *SLOW]
    submit = [*ray, "job", "submit", "--no-wait", "--submission-id", "slow", "--", sys.executable, str(GENERATE), *job]
    deadline = time.monotonic() + 120
    while (done := command([*submit, "--output", str(output)], env)).returncode:  # the job server comes up later
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(1)
    while not journalled_rows(output):
        assert time.monotonic() < deadline, "the job never came so far"
        time.sleep(0.1)
    asked = time.monotonic()
    done = command([sys.executable, "-m", "cluster.pre_stop", "12"], env)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - asked < 30
    finished = journalled_rows(output)
    assert finished > 0
    assert leases(output) == []  # the driver came to its own end
    log = command([*ray, "job", "logs", "slow"], env).stdout
    assert "stopped; start the same command again to go on" in log
    again = command([sys.executable, "-m", "cluster.pre_stop", "12"], env)
    assert again.returncode == 0  # nothing to stop
    nowhere = {**env, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    none = command([sys.executable, "-m", "cluster.pre_stop", "12"], nowhere)
    assert none.returncode == 1
    assert "no job is stopped" in none.stderr


WHICH = """
import ray
ray.init(logging_level="ERROR")
print(next(node["NodeID"] for node in ray.nodes() if "going" in node["Resources"]))
"""


@pytest.mark.long
def test_a_node_that_is_about_to_go_hands_over(tmp_path: Path, chat_model_dir: Path) -> None:
    """The job itself journals nothing in time, so what its node had finished is there because the node was drained."""
    rows = write_prompts(tmp_path / "in", {"a.parquet": 120})
    output = tmp_path / "out"
    arguments = ["--model", str(chat_model_dir), "--input", str(tmp_path / "in"), "--output", str(output), *SLOW]
    arguments += [
        "engine.device=cpu",
        "run.num_gpus=1",
        "run.replicas=1",
        "sampling.max_tokens=100",
        "engine.max_num_seqs=1",
        "run.journal_flush_s=1000",
    ]
    with LocalNodes() as nodes:
        going = nodes.add_node(num_cpus=1, num_gpus=1, resources={"going": 1})
        env = nodes.environment()
        which = command([sys.executable, "-c", WHICH], env).stdout.split()[-1]
        job = start(arguments, tmp_path, env=env)
        try:
            (worker,) = wait_for(lambda: loaded(going), job, 240)
            time.sleep(2)
            worker.suspend()  # while this is said: it takes longer than the job
            assert journalled_rows(output) == 0
            drain = ["drain-node", "--node-id", which, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            drain += ["--reason-message", "test", "--deadline-remaining-seconds", "60", "--address", env["RAY_ADDRESS"]]
            done = command([sys.executable, "-m", "ray.scripts.scripts", *drain], env)
            assert done.returncode == 0, done.stdout + done.stderr
            worker.resume()
            wait_for(lambda: journalled_rows(output), job)
            assert worker.is_running()
            nodes.kill_node(going)
            kept = journalled_rows(output)
            nodes.add_node(num_cpus=1, num_gpus=1)
        finally:
            done = end(job)
    assert done.returncode == 0
    assert report(output)["this_start"]["reused_rows"] >= kept > 0
    assert table_of(output)["id"].to_pylist() == list(range(rows))


def command(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
