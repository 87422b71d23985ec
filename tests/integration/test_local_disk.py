"""Jobs on a disk that is full, that tears writes, and whose writer is killed in the middle of one; and clocks that jump."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.commit import parse_records
from tests.integration.jobs import (
    REPOSITORY,
    SLOW,
    end,
    journalled_rows,
    kill_everything,
    leases,
    members,
    parts,
    report,
    run,
    start,
    wait_for,
)

ROWS = 240
HOUR = 3600


@pytest.fixture
def arguments(dataset: Path, chat_model_dir: Path) -> list[str]:
    return ["--model", str(chat_model_dir), "--input", str(dataset), *SLOW]


@pytest.fixture(scope="session")
def preload(workplace: Path) -> str:
    """The library that `preload.c` describes."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler here, or no Linux")
    source, library = REPOSITORY / "tests" / "integration" / "preload.c", workplace / "preload.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return str(library)


class SmallDisk:
    """A disk of a few megabytes in a mount namespace of its own, which processes enter with `enter` before their command.

    Attributes:
        path: where it is mounted, for those inside.
        seen: the same place for everybody else.
    """

    def __init__(self, path: Path, size: str) -> None:
        path.mkdir()
        user = [] if os.geteuid() == 0 else ["-Ur"]
        script = f"mount -t tmpfs -o size={size} tmpfs '{path}' && echo mounted && exec sleep 1000"
        self._holder = subprocess.Popen(
            ["unshare", *user, "-m", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "mounted\n":
            _, reason = self._holder.communicate(timeout=30)
            pytest.skip(f"no mount namespaces here: {reason.strip()}")
        self.path = path
        self.seen = Path(f"/proc/{self._holder.pid}/root{path}")
        self.enter = ["nsenter", "-t", str(self._holder.pid), "-m", *(["-U", "--preserve-credentials"] if user else [])]

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.seen / "filler").open("ab", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

    def free(self) -> None:
        (self.seen / "filler").unlink()

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate(timeout=30)


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[SmallDisk]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no mount namespaces here: unshare or nsenter is missing")
    disk = SmallDisk(workplace / "small-disk", "8m")
    yield disk
    disk.close()


class Errors:
    """Reads a job's stderr while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.text = ""
        self._stream, process.stderr = process.stderr, None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._stream is not None
        for line in self._stream:
            self.text += line

    def last(self) -> str:
        self._thread.join(timeout=60)
        return self.text.splitlines()[-1]


def test_a_full_disk(undisturbed: Path, workplace: Path, arguments: list[str], small_disk: SmallDisk) -> None:
    command = [*arguments, "--output", str(small_disk.path / "out")]
    output = small_disk.seen / "out"
    whole = parts(undisturbed)

    process = start([*command, "run.write_retries=1"], workplace, small_disk.enter)
    errors = Errors(process)
    wait_for(lambda: len(parts(output)) >= 1, process)
    small_disk.fill()
    end(process)
    assert process.returncode == 1
    assert re.match(r"error: .*No space left on device.*start the same command again to go on$", errors.last())
    committed = parts(output)
    assert len(committed) < len(whole)
    assert committed == {name: whole[name] for name in committed}
    assert not (output / "_SUCCESS").exists()

    small_disk.free()
    process = start(command, workplace, small_disk.enter)
    errors = Errors(process)
    wait_for(lambda: len(parts(output)) > len(committed), process)
    small_disk.fill()
    wait_for(lambda: "No space left on device" in errors.text, process)
    small_disk.free()
    end(process)
    assert process.returncode == 0, errors.last()
    assert parts(output) == whole


def torn(output: Path) -> list[Path]:
    """Journal files that end in the middle of a record."""
    found = []
    for path in (output / "_run" / "journal").glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            if sum(20 + len(payload) for payload in parse_records(data)) < len(data):
                found.append(path)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are set on Linux only")
def test_writes_that_are_torn(undisturbed: Path, workplace: Path, arguments: list[str]) -> None:
    output = workplace / "torn-writes"
    process = start([*arguments, "--output", str(output), "run.replicas=1"], workplace)
    wait_for(lambda: len(parts(output)) >= 1 and journalled_rows(output) >= 1, process)
    (worker,) = members(process, "ShardWorker")
    before = parts(output)
    _, most = worker.rlimit(resource.RLIMIT_FSIZE)
    worker.rlimit(resource.RLIMIT_FSIZE, (1000, most))  # a write beyond is cut there, and the next one fails
    wait_for(lambda: len(torn(output)) >= 2, process)
    journals = torn(output)
    assert parts(output).keys() - before.keys() <= {"part-00000.parquet", "part-00001.parquet", "part-00002.parquet"}
    worker.rlimit(resource.RLIMIT_FSIZE, (most, most))
    worker.kill()
    done = end(process)
    assert journals
    assert done.returncode == 0
    assert parts(output) == parts(undisturbed)


@pytest.mark.parametrize("where", ["commit", pytest.param("journal", marks=pytest.mark.long)])
def test_killed_in_the_middle_of_a_write(
    where: str, undisturbed: Path, workplace: Path, arguments: list[str], preload: str
) -> None:
    output = workplace / f"killed-in-{where}"
    slow = {"LD_PRELOAD": preload, "RAY_LD_PRELOAD_ON_WORKERS": "1", "TEST_SLOW_WRITES": "1"}
    process = start([*arguments, "--output", str(output)], workplace, **slow)

    def unfinished() -> list[Path]:
        return list((output / "_run" / "tmp").glob("part-*")) if where == "commit" else torn(output)

    wait_for(lambda: len(unfinished()) > 0, process)
    (worker,) = members(process, "ShardWorker")
    worker.kill()
    worker.wait(timeout=30)
    left = unfinished()
    before = parts(output)
    done = end(process)
    assert left, "the write was over when the kill came"
    assert before.keys().isdisjoint(re.sub(r"\.[0-9a-f]+$", "", path.name) for path in left)
    assert done.returncode == 0
    assert parts(output) == parts(undisturbed)
    assert not (output / "_run" / "tmp").exists()


class Clock:
    """The wall clock of the processes that are started with `environment`."""

    def __init__(self, path: Path, preload: str) -> None:
        self._path = path
        self.set(0)
        self.environment = {
            "LD_PRELOAD": preload,
            "RAY_LD_PRELOAD_ON_WORKERS": "1",
            "TEST_CLOCK_FILE": str(path),
        }

    def set(self, hours: float) -> None:
        with self._path.open("r+b" if self._path.exists() else "wb", buffering=0) as stream:
            stream.write(struct.pack("q", int(hours * HOUR)))


@pytest.mark.long
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 counts timed waits on the wall clock")
def test_clocks_that_jump(undisturbed: Path, workplace: Path, arguments: list[str], preload: str) -> None:
    output = workplace / "clocks"
    command = [*arguments, "--output", str(output), "run.lease_s=3"]
    clock, other = Clock(workplace / "clock", preload), Clock(workplace / "other-clock", preload)
    seen = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, **other.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert abs(float(seen.stdout) - time.time()) < HOUR / 2
    other.set(-7)
    ended = threading.Event()

    def jump() -> None:
        for number in range(10_000):
            clock.set((0, 5, -3, 30, -30, 0.5)[number % 6])
            if ended.wait(0.3):
                return

    jumping = threading.Thread(target=jump, daemon=True)
    jumping.start()
    try:
        first = start(command, workplace, **clock.environment)
        wait_for(lambda: len(leases(output)) == 1, first)
        second = run(command, workplace, **other.environment)
        assert (second.returncode, second.stdout) == (2, "")
        assert f"pid {first.pid}" in second.stderr
        wait_for(lambda: len(parts(output)) >= 2 and journalled_rows(output) >= 5, first)
        kill_everything(first)
        journalled = journalled_rows(output)
        done = run(command, workplace, **clock.environment)
    finally:
        ended.set()
        jumping.join(timeout=30)
    assert done.returncode == 0
    assert parts(output) == parts(undisturbed)
    now = report(output)["this_start"]
    assert now["reused_rows"] == journalled
    assert 0 < now["seconds"] < HOUR / 2
    assert all(0 <= shard["seconds"] < HOUR / 2 for shard in now["shards"])
