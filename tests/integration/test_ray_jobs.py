"""Jobs through Ray's job server, on a real head with token authentication: logs, exit status, stop, resubmission, `--address`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from cluster.local_nodes import SETTINGS, alive, kill, wait_gone
from tests.counting import computed
from tests.faults import ACTOR, RANK, kept_rows, named, suspend
from tests.integration.jobs import REPOSITORY, SLOW, end, journalled_rows, leases, parts, start, wait_for
from tests.integration.test_predictor import free_ports

pytestmark = pytest.mark.timeout(
    900
)  # each command of Ray's is a process that imports Ray, on a machine that tests fill

ROWS = 240
PATIENCE_S = 240.0
PACKAGES = ("nanovllm", "pipelines", "cluster")
MAX_UPLOAD = 20 << 20


class Head(NamedTuple):
    """A running head: its process, what its clients find in their environment, and the directory that users submit from."""

    process: psutil.Process
    environment: dict[str, str]
    address: str
    checkout: Path
    sessions: Path

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, as a user types it in the checkout."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *words],
            cwd=self.checkout,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        print(f"{time.monotonic() - began:.1f} s", *words, done.stdout, done.stderr, sep="\n")
        return done

    def submit(self, name: str, script: str, *words: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Submit a job; what comes back has its log, and its exit status where it is waited for."""
        options = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            done = self.ray("job", "submit", *options, "--", sys.executable, script, *words)
            # The job server comes up some seconds after the node, and the agent that starts jobs some after that.
            if not re.search("Failed to connect|No available agent", done.stdout + done.stderr):
                return done
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(0.5)

    def members(self) -> list[psutil.Process]:
        """Everything that runs on the node."""
        return alive([self.process, *self.process.children(recursive=True)])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    directory = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))  # short: Ray's sockets lie below it
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (directory / "home").mkdir()
    gcs, dashboard, client = free_ports(3)
    env = {
        **os.environ,
        **SETTINGS,
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",  # the files for clusters say 10, on machines that are not loaded with tests
        "HOME": str(directory / "home"),
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "PYTHONPATH"):  # what runs is what was submitted
        env.pop(name, None)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    command += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}", "--num-gpus=0"]
    command += [f"--temp-dir={directory / 'ray'}"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    running = Head(psutil.Process(process.pid), env, f"127.0.0.1:{gcs}", _checkout(directory), directory / "ray")
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (said := (directory / "log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield running
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill(running.members())
        process.wait(timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


def _checkout(directory: Path) -> Path:
    """What a user submits: the packages and, ignored by git, an environment and old results."""
    checkout = directory / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, checkout / package, ignore=unwanted)
    (checkout / "tests").mkdir()
    for name in ("__init__.py", "counting.py"):
        shutil.copy(REPOSITORY / "tests" / name, checkout / "tests" / name)
    shutil.copy(REPOSITORY / ".gitignore", checkout)
    for ignored in (".venv", "demo_output"):
        (checkout / ignored).mkdir()
        (checkout / ignored / "large").write_bytes(bytes(2 * MAX_UPLOAD))
    return checkout


@pytest.fixture(scope="module")
def job(chat_model_dir: Path, dataset: Path) -> list[str]:
    return ["--model", str(chat_model_dir), "--input", str(dataset), *SLOW]


@pytest.fixture(scope="module")
def whole(head: Head, job: list[str], workplace: Path) -> Path:
    """The output of a job that nobody disturbed, on the same cluster through `--address`."""
    output = workplace / "by-address"
    arguments = [*job, "--output", str(output), "--address", head.address]
    process = start(arguments, workplace, env=head.environment)
    try:
        wait_for(lambda: named(ACTOR, head.members()), process, PATIENCE_S)
    finally:
        done = end(process, PATIENCE_S)
    assert done.returncode == 0
    assert f"finished: {ROWS} rows (2 with an error)" in done.stdout
    return output


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which some processes wait for others. One look at all sockets: processes come and go."""
    pids = {process.pid for process in processes}
    sockets = [each for each in psutil.net_connections("inet") if each.pid in pids]
    open_ = [each for each in sockets if each.status == psutil.CONN_LISTEN or (each.type == 2 and not each.raddr)]
    return {each.laddr.ip.removeprefix("::ffff:") for each in open_}


def suspended_when(what: Callable[[], bool], head: Head) -> list[psutil.Process]:
    """The actors of the running job, standing still at a moment when `what` holds."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        while not what():
            assert time.monotonic() < deadline, "the job never came so far"
            time.sleep(0.05)
        actors = named(ACTOR, head.members())
        for actor in actors:
            suspend(actor)
        if actors and what():
            return actors
        for actor in actors:
            actor.resume()


def test_stopped_and_submitted_again_it_ends_the_same(head: Head, job: list[str], whole: Path, tmp_path: Path) -> None:
    output, counts = tmp_path / "out", tmp_path / "counts"
    words = ["tests/counting.py", str(counts), *job, "--output", str(output)]
    assert head.submit("first", *words, wait=False).returncode == 0
    actors = suspended_when(lambda: bool(output.exists() and parts(output) and journalled_rows(output)), head)
    driver = named("tests/counting.py", head.members())
    assert driver
    assert listening([*driver, *actors]) <= {"127.0.0.1", "::1"}
    uploads = list((head.sessions / "session_latest" / "runtime_resources" / "working_dir_files").glob("_ray_pkg_*/"))
    assert uploads
    sizes = [path.stat().st_size for upload in uploads for path in upload.rglob("*") if path.is_file()]
    assert sum(sizes) < MAX_UPLOAD

    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "first"]
    stop = subprocess.Popen(command, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert stop.stdout is not None
        next((line for line in stop.stdout if "Attempting to stop" in line), None)  # the command took a while to start
    finally:
        for actor in actors:
            actor.resume()
    out, _ = stop.communicate(timeout=PATIENCE_S)
    assert stop.returncode == 0, out
    assert "was stopped" in out
    assert wait_gone(driver, PATIENCE_S) == []
    kept = kept_rows(output)
    assert 0 < len(kept) < ROWS
    assert leases(output) == []  # and came to its own end
    logs = head.ray("job", "logs", "first").stdout
    assert re.search("error: stopped.*; start the same command again to go on", logs)

    done = head.submit("second", *words)
    assert done.returncode == 0
    assert f"finished: {ROWS} rows (2 with an error)" in done.stdout
    assert "succeeded" in done.stdout
    assert "resuming: " in done.stdout
    assert parts(output) == parts(whole)
    assert kept & computed(counts).repeated.keys() == set()


def test_refused_it_has_failed_with_our_line_and_status(head: Head, job: list[str], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    output = ["--output", str(tmp_path / "out")]
    done = head.submit("refused", "pipelines/generate.py", *job, "--input", gone, *output)
    assert done.returncode == 1  # Ray's own, of every job that failed
    assert f"error: input {gone!r} does not exist" in done.stdout
    status = head.ray("job", "status", "refused").stdout
    assert "Job 'refused' failed" in status
    assert "exit code 2" in status


def test_without_the_token_there_is_no_job(head: Head, job: list[str], tmp_path: Path) -> None:
    stranger = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": ""}
    submit = ["job", "submit", "--working-dir", ".", "--submission-id", "stranger", "--", sys.executable]
    done = head.ray(*submit, "pipelines/generate.py", *job, "--output", str(tmp_path / "out"), **stranger)
    assert done.returncode != 0
    assert re.search("(?i)unauthorized|unauthenticated|authentication token", done.stdout + done.stderr)
    assert "stranger" not in head.ray("job", "list").stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.long  # the refused job is its kind
def test_failed_it_has_failed_with_our_line_and_status(
    head: Head, job: list[str], dataset: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    shutil.copytree(dataset, source)
    damaged = bytearray((source / "b.parquet").read_bytes())
    damaged[4:2000] = b"\xff" * 1996  # the first pages
    (source / "b.parquet").write_bytes(damaged)
    done = head.submit(
        "failed", "pipelines/generate.py", *job, "--input", str(source), "--output", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert re.search(r"error: \d+ of \d+ shards failed, first b.parquet rows 0 to ", done.stdout)
    assert "exit code 1" in head.ray("job", "status", "failed").stdout


@pytest.mark.long  # 20 s of Ray trying; the stranger who submits is its kind
def test_without_the_token_no_driver_connects(head: Head, job: list[str], tmp_path: Path) -> None:
    arguments = [*job, "--output", str(tmp_path / "out"), "--address", head.address]
    env = {**head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    done = end(start(arguments, tmp_path, env=env), PATIENCE_S)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: no Ray cluster at RAY_ADDRESS={head.address!r}: ")
    assert "RAY_AUTH_TOKEN" in done.stderr
    # The output was looked at, and is nobody's.
    assert leases(tmp_path / "out") == []
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.long  # the look at driver and actor is its kind
def test_ranks_listen_on_loopback_alone(head: Head, job: list[str], tmp_path: Path) -> None:
    arguments = [*job, "--output", str(tmp_path / "out"), "--address", head.address, "engine.tensor_parallel_size=2"]
    process = start(arguments, tmp_path, env=head.environment)
    try:
        wait_for(lambda: journalled_rows(tmp_path / "out"), process, PATIENCE_S)
        ranks = named(RANK, head.members())
        assert len(ranks) >= 1
        assert listening([*ranks, *named(ACTOR, head.members()), psutil.Process(process.pid)]) <= {"127.0.0.1", "::1"}
    finally:
        done = end(process, PATIENCE_S)
    assert done.returncode == 0
