"""One job writes to an output at a time, and one that is stopped or suspended leaves nothing torn: on a real local Ray."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.commit import OutputDirectory, read_journal
from pipelines.stop import END_S
from tests.integration.jobs import (
    SLOW,
    journalled_rows,
    kill_everything,
    leases,
    members,
    parts,
    report,
    run,
    start,
    table_of,
    wait_for,
)

ROWS = 240
SLACK_S = 30.0  # for a busy machine, in every bound on time here


class Listener:
    """Reads what a job prints while it runs: how many rows are done."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.rows = 0
        self._thread = threading.Thread(target=self._listen, args=(process.stdout,), daemon=True)
        self._thread.start()

    def _listen(self, stream: object) -> None:
        for line in stream:  # type: ignore[attr-defined]
            progress = re.match(r"([\d,]+)/240 rows", line)
            if progress:
                self.rows = int(progress[1])

    def end(self) -> None:
        self._thread.join(timeout=60)


@pytest.fixture
def arguments(dataset: Path, chat_model_dir: Path) -> list[str]:
    return ["--model", str(chat_model_dir), "--input", str(dataset), *SLOW]


def test_a_second_start_is_refused_and_a_stopped_first_goes_on(
    undisturbed: Path, workplace: Path, arguments: list[str]
) -> None:
    output = workplace / "contended"
    arguments = [*arguments, "--output", str(output)]
    first = start([*arguments, "run.journal_flush_s=1000"], workplace)  # no flush but the one that the signal causes
    heard = Listener(first)
    wait_for(lambda: len(leases(output)) == 1, first)
    began = time.monotonic()
    second = run(arguments, workplace)
    assert time.monotonic() - began < SLACK_S
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.count("\n") == 1
    assert re.match(
        rf"error: output '{output}' is being written by another start that lives: host \S+, pid {first.pid}, since "
        r"\d{4}-.* UTC, last heartbeat \d{4}-.* UTC; let it finish or stop it",
        second.stderr,
    )

    # A shard that is generated and cannot be committed, so that there are finished rows in flight whatever the moment.
    wait_for((output / "_run" / "job.json").exists, first)
    blocked = output / "part-00003.parquet"
    blocked.mkdir()
    wait_for(lambda: all((output / f"part-{index:05d}.parquet").is_file() for index in (0, 1, 2, 4, 5, 6)), first)
    first.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert first.wait(timeout=END_S + SLACK_S) == 1
    assert time.monotonic() - began < END_S + SLACK_S
    assert first.stderr is not None
    assert first.stderr.read().splitlines()[-1] == "error: stopped; start the same command again to go on"
    heard.end()
    assert leases(output) == []
    assert not (output / "_SUCCESS").exists()
    blocked.rmdir()
    journalled, committed = journalled_rows(output), table_of(output).num_rows
    assert (
        len(read_journal(OutputDirectory(str(output)).journal(3), 1000))
        == OutputDirectory(str(output)).shards()[3].rows
    )
    assert journalled + committed >= heard.rows > 0  # whatever was shown as done is kept

    done = run(arguments, workplace)
    assert done.returncode == 0
    assert "taking over" not in done.stdout
    assert parts(output) == parts(undisturbed)
    assert leases(output) == []
    summary = report(output)
    now = summary["this_start"]
    assert now["reused_rows"] == journalled
    assert now["generated_tokens"] <= (ROWS - now["resumed_rows"] - journalled) * 24
    assert [start["status"] for start in summary["starts"]] == ["stopped", "finished"]
    assert {"begin", "stopping", "stopped"} <= {event["kind"] for event in summary["events"] if event["start"] == 0}


def test_a_suspended_job_is_taken_over_and_marks_nothing(
    undisturbed: Path, workplace: Path, arguments: list[str]
) -> None:
    output = workplace / "suspended"
    arguments = [*arguments, "--output", str(output), "run.lease_s=2"]
    first = start(arguments, workplace)
    wait_for(lambda: len(parts(output)) >= 1, first)
    first.send_signal(signal.SIGSTOP)
    try:
        claims = leases(output)
        assert len(claims) == 1
        looks = run([*arguments, "--dry-run"], workplace)
        assert (looks.returncode, leases(output)) == (0, claims)
        done = run(arguments, workplace)
        assert done.returncode == 0
        assert re.search(rf"taking over from host \S+, pid {first.pid}, since", done.stdout)
        assert parts(output) == parts(undisturbed)
        marks = [output / "_SUCCESS", *(output / "_run" / name for name in ("report.json", "report.html", "job.json"))]
        before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in marks]
    finally:
        first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=END_S + SLACK_S)
    assert first.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith(f"error: the lease on output '{output}' was taken over by another start")
    assert "was suspended or cut off" in last
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in marks] == before
    assert parts(output) == parts(undisturbed)
    assert leases(output) == []
    again = run(arguments, workplace)
    assert again.returncode == 0
    assert again.stdout.startswith("already finished")


def test_a_signal_while_ray_starts(workplace: Path, arguments: list[str]) -> None:
    """Ray has handlers of its own then."""
    output = workplace / "starting"
    process = start([*arguments, "--output", str(output)], workplace)
    wait_for(lambda: bool(members(process, "raylet/raylet")), process)
    time.sleep(0.7)  # by now it most likely waits, deaf to signals, for the node to register
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=END_S + SLACK_S)
    assert process.returncode == 1
    assert err.splitlines()[-1].endswith("; start the same command again to go on")
    assert leases(output) == []


def test_a_signal_ends_a_job_whose_ray_hangs(workplace: Path, arguments: list[str]) -> None:
    output = workplace / "hanging"
    process = start([*arguments, "--output", str(output)], workplace)
    wait_for(lambda: bool(members(process, "ShardWorker")), process)
    everyone = members(process, "")
    try:
        for member in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=END_S + SLACK_S) == 1
        assert time.monotonic() - began < END_S + SLACK_S
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1].endswith("; start the same command again to go on")
        assert leases(output) == []
    finally:
        for member in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if process.poll() is None:
            kill_everything(process)
