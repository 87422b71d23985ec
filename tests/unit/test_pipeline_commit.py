"""The journal survives a cut at any byte and any flipped bit, and a commit is all or nothing, on disks and object stores."""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.storage
from nanovllm import UserError
from pipelines.commit import Journal, OutputDirectory, RecordLog, parse_records, read_journal, read_records, retrying
from pipelines.plan import Shard
from pipelines.results import RowResult, Sample
from pipelines.storage import Location, children, resolve


@pytest.fixture(params=["local", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory on a local disk, and on a store without renames or appends."""
    return str(tmp_path / "out") if request.param == "local" else f"memory://bucket-{uuid.uuid4().hex}/out"


def result(number: int, error: str | None = None) -> RowResult:
    sample = Sample(None, "error", 0) if error else Sample(f"text {number}", "stop", 2)
    return RowResult((sample,), number, 0, error)


def shard(index: int, rows: int) -> Shard:
    return Shard(index, "a.parquet", 1, 0, rows, 0, 0)


def test_records_survive_a_cut_at_every_byte(tmp_path: Path) -> None:
    place = resolve(str(tmp_path))
    log = RecordLog(place)
    payloads = [b"", b"one", b"two" * 20, bytes(range(200))]
    for payload in payloads:
        log.append(payload)
    log.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    ends = [0, *itertools.accumulate(20 + len(payload) for payload in payloads)]
    assert ends[-1] == len(data)
    for length in range(len(data) + 1):
        whole = sum(1 for end in ends[1:] if end <= length)
        assert list(parse_records(data[:length])) == payloads[:whole]


def test_a_corrupt_record_hides_nothing_before_it(tmp_path: Path) -> None:
    log = RecordLog(resolve(str(tmp_path)))
    payloads = [b"first", b"second", b"third"]
    for payload in payloads:
        log.append(payload)
    log.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0x10
        found = list(parse_records(bytes(broken)))
        assert found == payloads[: len(found)]
        assert len(found) == position // (20 + 5) if position < 25 else len(found) >= 1


def test_journal_gives_back_what_was_flushed(address: str) -> None:
    place = resolve(address).child("journal", "00003")
    first = Journal(place)
    first.flush()
    assert children(place) == []  # nothing finished, nothing written
    first.add(4, result(4))
    first.add(1, result(1, "prompt is null"))
    first.flush()
    first.add(2, result(2))
    first.flush()
    written = sum(entry.size for entry in children(place))
    first.flush()  # nothing new, nothing written
    assert sum(entry.size for entry in children(place)) == written
    first.add(0, result(0))  # never flushed
    first.close()
    first.flush()
    second = Journal(place)  # another attempt writes its own file
    second.add(3, result(3))
    second.flush()
    assert read_journal(place, 5) == {4: result(4), 1: result(1, "prompt is null"), 2: result(2), 3: result(3)}
    assert read_journal(place, 3) == {1: result(1, "prompt is null"), 2: result(2)}
    assert read_journal(resolve(address).child("journal", "nowhere"), 5) == {}


def test_journal_with_a_torn_tail(tmp_path: Path) -> None:
    place = resolve(str(tmp_path / "journal"))
    journal = Journal(place)
    journal.add(0, result(0))
    journal.flush()
    (file,) = (tmp_path / "journal").iterdir()
    whole = file.stat().st_size
    journal.add(1, result(1))
    journal.flush()
    journal.close()
    data = file.read_bytes()
    for length in range(whole, len(data), 7):
        file.write_bytes(data[:length])
        assert read_journal(place, 2) == {0: result(0)}


def test_after_a_failed_write_the_next_record_starts_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = resolve(str(tmp_path / "log"))
    log = RecordLog(place)
    log.append(b"kept")

    class Full:
        def __init__(self, stream: pa.NativeFile) -> None:
            self._stream = stream

        def write(self, data: bytes) -> None:
            self._stream.write(data[:10])
            raise OSError("no space left on device")

        def close(self) -> None:
            self._stream.close()

    monkeypatch.setattr(log, "_stream", Full(log._stream))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no space"):
        log.append(b"torn")
    log.append(b"torn")
    log.close()
    assert sorted(read_records(place)) == [b"kept", b"torn"]


def test_commit_is_whole_and_drops_the_journal(address: str) -> None:
    output = OutputDirectory(address)
    shards = [shard(0, 2), shard(1, 3)]
    schema = pa.schema([("prompt", pa.string())])
    job = output.create({"run.seed": 0}, "parquet", schema, shards)
    again = OutputDirectory(address)
    assert again.job() == job
    assert again.shards() == shards
    assert again.has_token(job.token)
    assert not again.has_token("other")
    journal = Journal(output.journal(0))
    journal.add(0, result(0))
    journal.flush()
    journal.close()
    table = pa.table({"prompt": ["a", "b"]})
    output.commit(0, table)
    assert again.committed() == {0}
    assert again.part_rows(0) == 2
    assert again.part_rows(1) is None
    assert read_journal(output.journal(0), 2) == {}
    with pytest.raises(OSError, match="part-00001"):
        output.finish(shards)
    assert not output.succeeded()
    output.commit(1, pa.table({"prompt": ["c", "d"]}))
    with pytest.raises(OSError, match="3 rows planned"):
        output.finish(shards)
    output.commit(1, pa.table({"prompt": ["c", "d", "e"]}))
    with pytest.raises(OSError, match="does not hold the 4 rows planned"):
        output.finish(shards, rows_each=2)
    output.finish(shards)
    assert again.succeeded()
    assert children(output.run.child("journal")) == []
    assert output.read_part(1, ["prompt"])["prompt"].to_pylist() == ["c", "d", "e"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = OutputDirectory(str(tmp_path / "out"))
    output.create({}, "parquet", pa.schema([("prompt", pa.string())]), [shard(0, 1)])
    output.commit(0, pa.table({"prompt": ["old"]}))

    def fail(place: Location) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pipelines.storage, "_sync", fail)
    with pytest.raises(OSError, match="disk full"):
        output.commit(0, pa.table({"prompt": ["new"]}))
    assert output.read_part(0, ["prompt"])["prompt"].to_pylist() == ["old"]
    assert list((tmp_path / "out" / "_run" / "tmp").iterdir()) == []


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    output = OutputDirectory(str(tmp_path / "out"))
    output.create({}, "parquet", pa.schema([("prompt", pa.string())]), [shard(0, 1), shard(1, 1)])
    for index in (0, 1):
        output.commit(index, pa.table({"prompt": ["a"]}))
    files = sorted((tmp_path / "out").glob("part-*"))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_directories_of_others_are_refused(tmp_path: Path) -> None:
    assert OutputDirectory(str(tmp_path / "nothing")).job() is None
    (tmp_path / "_run" / "tmp").mkdir(parents=True)  # what a start that was killed at once leaves behind
    assert OutputDirectory(str(tmp_path)).job() is None
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.doc"):
        OutputDirectory(str(tmp_path)).job()
    with pytest.raises(UserError, match="is a file"):
        OutputDirectory(str(tmp_path / "thesis.doc")).job()


def test_retrying_waits_longer_each_time() -> None:
    waits: list[float] = []
    outcomes = iter([OSError("a"), OSError("b"), None])

    def write() -> str:
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome
        return "written"

    assert retrying(write, 5, waits.append) == "written"
    assert waits == [1.0, 2.0]

    def never() -> None:
        raise OSError("full")

    waits.clear()
    with pytest.raises(OSError, match="full"):
        retrying(never, 7, waits.append)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_parts_are_plain_parquet(tmp_path: Path) -> None:
    output = OutputDirectory(str(tmp_path / "out"))
    output.create({}, "parquet", pa.schema([("prompt", pa.string())]), [shard(0, 1)])
    output.commit(0, pa.table({"prompt": ["a"]}))
    assert pq.read_table(tmp_path / "out").to_pydict() == {"prompt": ["a"]}


def test_a_journal_that_goes_while_it_is_read_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt has committed the shard between the list of files and the reads."""
    output = OutputDirectory(str(tmp_path / "out"))
    journal = Journal(output.journal(3))
    journal.add(0, RowResult((Sample("text", "stop", 2),), 3, 0, None))
    journal.flush()
    assert set(read_journal(output.journal(3), 5)) == {0}
    listed = children(output.journal(3))
    monkeypatch.setattr("pipelines.commit.children", lambda place: listed)
    output.forget(3)
    assert read_journal(output.journal(3), 5) == {}
