"""The output directory: finished shards, the journal of unfinished ones, and the records that survive any crash.

Workers journal and commit through `OutputDirectory`; the driver creates it, asks it what is left to do, and finishes it.

    OUT/part-00000.parquet ...   committed shards, one file each, named by the plan
    OUT/_results.jsonl           answers to requests, where the input is of OpenAI's batch format; see `batch_results`
    OUT/_SUCCESS                 every shard is there and the row counts add up
    OUT/_run/                    job.json, plan.parquet, input.parquet, config.yaml, report.json, report.html
    OUT/_run/journal/<shard>/    finished rows of shards in flight, one file an attempt; <shard>.attempts: see `attempts`
    OUT/_run/ledger/             what each committed shard counted, one file a driver
    OUT/_run/history/            what happened in each start, for the report; see `history`
    OUT/_run/lease-*.json        who writes here; see `lease`
    OUT/_run/routing.json        whether rows run in another order, and why; OUT/_run/routed/: their files meanwhile; see `routing`
    OUT/_run/tmp/                files on their way to their name
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

from nanovllm import UserError
from pipelines.inputs import InputFile
from pipelines.plan import Shard, files_from_table, files_to_table, shards_from_table, shards_to_table
from pipelines.results import RowResult, results_from_table, results_to_table
from pipelines.storage import Location, children, delete_tree, exists, kind, pause_s, put, read, resolve, retrying

MAGIC = b"nvR1"
HEADER = struct.Struct("<4sQQ")  # magic, length of the payload, xxh64 of the payload
CHECK_THREADS = 32
LAYOUT_VERSION = 3


class JobFile(NamedTuple):
    """What `_run/job.json` says about the job that owns a directory."""

    identity: dict[str, Any]
    format: str
    schema: pa.Schema
    token: str


class RecordLog:
    """Append-only records with checksums, for one writer that may die at any byte.

    Each writer has its own file `<name>-<number>`. Where files can grow in place, a record is appended to the current
    one; on object stores every record is a new object. After a failed write the next record starts a new file, so that
    nothing is ever written behind a torn record.
    """

    def __init__(self, directory: Location) -> None:
        self._directory = directory
        self._name = uuid.uuid4().hex
        self._number = 0
        self._stream: pa.NativeFile | None = None

    def append(self, payload: bytes | pa.Buffer) -> None:
        """Write one record; it is with the operating system or the store when this returns.

        Raises:
            OSError: the record is not written; it may be appended again.
        """
        view = memoryview(payload)
        record = HEADER.pack(MAGIC, view.nbytes, xxhash.xxh64_intdigest(view)) + bytes(view)
        try:
            stream = self._stream or self._open()
            stream.write(record)
            if self._directory.appends:
                stream.flush()
                self._stream = stream
            else:
                stream.close()
        except OSError:
            self.close()
            raise

    def _open(self) -> pa.NativeFile:
        if self._directory.renames:
            self._directory.fs.create_dir(self._directory.path, recursive=True)
        path = self._directory.child(f"{self._name}-{self._number:06d}").path
        self._number += 1
        return self._directory.fs.open_output_stream(path)

    def close(self) -> None:
        """Close the current file. Every record in it has been flushed: a failure now says nothing about them."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def read_records(directory: Location) -> Iterator[bytes]:
    """Payloads of all whole records of all writers in `directory`; what follows a torn or corrupt one is left out.

    So is a file that goes between the list and the read: another attempt has committed the shard.
    """
    for entry in children(directory):
        if entry.type == pafs.FileType.File:
            try:
                data = read(Location(directory.fs, entry.path))
            except FileNotFoundError:
                continue
            yield from parse_records(data)


def parse_records(data: bytes) -> Iterator[bytes]:
    """Payloads of the whole records at the start of `data`."""
    position = 0
    while len(data) - position >= HEADER.size:
        magic, length, checksum = HEADER.unpack_from(data, position)
        payload = data[position + HEADER.size : position + HEADER.size + length]
        if magic != MAGIC or xxhash.xxh64_intdigest(payload) != checksum:
            return
        yield payload
        position += HEADER.size + length


class Journal:
    """Finished rows of one attempt at one shard. `add` rows as they finish and `flush` from time to time."""

    def __init__(self, directory: Location) -> None:
        self._log = RecordLog(directory)
        self._rows: dict[int, RowResult] = {}
        self._lock = threading.Lock()
        self._closed = False

    def add(self, position: int, result: RowResult) -> None:
        """Note a finished row; `position` counts from the shard's first row."""
        self._rows[position] = result

    def flush(self) -> None:
        """Write what was added since the last flush as one record; on failure it stays for the next flush.

        Raises:
            OSError: the store refused.
        """
        with self._lock:
            rows = dict(self._rows)
            if not rows or self._closed:
                return
            table = results_to_table(list(rows.values())).add_column(0, "position", pa.array(list(rows), pa.int32()))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            self._log.append(sink.getvalue())
            for position in rows:
                del self._rows[position]

    def close(self) -> None:
        """Close the file, after a flush that is under way; rows not flushed are dropped and later flushes do nothing."""
        with self._lock:
            self._closed = True
            self._log.close()


def read_journal(directory: Location, rows: int) -> dict[int, RowResult]:
    """Rows of a shard that earlier attempts finished, by position."""
    finished: dict[int, RowResult] = {}
    for payload in read_records(directory):
        table = pa.ipc.open_stream(payload).read_all()
        for position, result in zip(table["position"].to_pylist(), results_from_table(table), strict=True):
            if 0 <= position < rows:
                finished[position] = result
    return finished


def backoff_s(retries: int) -> float:
    """For how long `retrying` waits in all."""
    return sum(map(pause_s, range(retries)))


class OutputDirectory:
    """Names and operations of one job's output. Made from an address on every process that needs it.

    `parts` is the directory of the shards' files, below the output; "" for the output itself.
    """

    def __init__(self, address: str, parts: str = "") -> None:
        self.place = resolve(address)
        self.run = self.place.child("_run")
        self._parts = self.place.child(parts) if parts else self.place
        self.scratch = self.run.child("tmp")

    # What the driver asks

    def job(self) -> JobFile | None:
        """The job this directory belongs to; None where it belongs to none.

        Raises:
            UserError: it holds files that no job of ours wrote, or is a file.
        """
        found = kind(self.place)
        if found == pafs.FileType.NotFound:
            return None
        if found == pafs.FileType.File:
            raise UserError(f"output {self.place.path!r} is a file; give a directory")
        job_file = self.run.child("job.json")
        if not exists(job_file):
            strangers = [entry.base_name for entry in children(self.place) if entry.base_name != "_run"]
            if strangers:
                raise UserError(
                    f"output {self.place.path!r} is not empty and holds no job (found {strangers[0]!r}); "
                    "give a new or empty directory"
                )
            return None
        data = json.loads(read(job_file))
        if data["layout"] != LAYOUT_VERSION:
            raise UserError(f"output {self.place.path!r} was begun by another version of this program; give a new one")
        schema = pq.read_schema(pa.BufferReader(read(self.run.child("schema.parquet"))))
        return JobFile(data["identity"], data["format"], schema.remove_metadata(), data["token"])

    def create(
        self,
        identity: dict[str, Any],
        file_format: str,
        schema: pa.Schema,
        shards: Sequence[Shard],
        files: Sequence[InputFile] = (),
    ) -> JobFile:
        """Make the directory and store the plan and the input files; `job.json`, the mark of ownership, comes last.

        Raises:
            UserError: it cannot be written.
        """
        token = uuid.uuid4().hex
        job = {"layout": LAYOUT_VERSION, "token": token, "format": file_format, "identity": identity}
        try:
            self.place.fs.create_dir(self.run.path, recursive=True)
            self.put_run("schema.parquet", parquet_bytes(schema.empty_table()))
            self.put_run("input.parquet", parquet_bytes(files_to_table(files)))
            self.put_run("plan.parquet", parquet_bytes(shards_to_table(shards)))
            self.put_run("job.json", json.dumps(job).encode())
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"output {self.place.path!r} cannot be written: {reason}") from None
        return JobFile(identity, file_format, schema, token)

    def shards(self) -> list[Shard]:
        """The plan."""
        return shards_from_table(pq.read_table(pa.BufferReader(read(self.run.child("plan.parquet")))))

    def files(self) -> list[InputFile]:
        """The input files as they were planned."""
        return files_from_table(pq.read_table(pa.BufferReader(read(self.run.child("input.parquet")))))

    def committed(self) -> set[int]:
        """Indexes of the shards that have their file."""
        files = (entry.base_name for entry in children(self._parts) if entry.is_file)
        return {int(match[1]) for name in files if (match := re.fullmatch(r"part-(\d+)\.parquet", name))}

    def put_run(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file of `_run/`."""
        put(self.run.child(name), data, self.scratch)

    def put_top(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file beside the shards, piece by piece."""
        put(self.place.child(name), pieces, self.scratch)

    def ledger(self) -> Location:
        """Where drivers record what committed shards counted."""
        return self.run.child("ledger")

    def history(self) -> Location:
        """Where drivers record what happened in their start."""
        return self.run.child("history")

    def routed(self) -> Location:
        """Where rows are that run in another order; see `routing`."""
        return self.run.child("routed")

    def succeeded(self) -> bool:
        """Whether an earlier start finished the job."""
        return exists(self.place.child("_SUCCESS"))

    def finish(
        self,
        shards: Sequence[Shard],
        confirm: Callable[[], object] = lambda: None,
        retries: int = 0,
        rows_each: int = 1,
    ) -> None:
        """Check that every planned shard has a file with its number of rows, mark success, and tidy up.

        `confirm` is called between the check, which takes a while, and the mark, and raises where the mark is not due.
        `retries` is how often each request that fails is made again. `rows_each` is how many output rows an input row has.

        Raises:
            OSError: a file is missing, unreadable or has another number of rows; nothing is marked.
        """

        def rows_are(shard: Shard) -> bool:
            return retrying(lambda: self.part_rows(shard.index), retries) == shard.rows * rows_each

        with ThreadPoolExecutor(CHECK_THREADS) as pool:
            for shard, right in zip(shards, pool.map(rows_are, shards), strict=True):
                if not right:
                    rows = shard.rows * rows_each
                    raise OSError(f"{self.part(shard.index).path} does not hold the {rows} rows planned for it")
        confirm()
        summary = {"rows": sum(shard.rows for shard in shards) * rows_each, "files": len(shards)}
        mark = json.dumps(summary).encode() + b"\n"
        retrying(lambda: put(self.place.child("_SUCCESS"), mark, self.scratch), retries)
        with contextlib.suppress(OSError):  # what is left over harms nobody
            delete_tree(self.run.child("journal"))
            delete_tree(self.routed())
            delete_tree(self.scratch)

    # What workers ask

    def part(self, index: int) -> Location:
        """The file of a shard."""
        return self._parts.child(f"part-{index:05d}.parquet")

    def committed_at(self, index: int) -> int:
        """Seconds since 1970 at which a shard's file was written; 0 where the store does not say."""
        place = self.part(index)
        return (place.fs.get_file_info(place.path).mtime_ns or 0) // 1_000_000_000

    def part_rows(self, index: int) -> int | None:
        """Rows in a shard's file, from its footer; None where there is no file."""
        place = self.part(index)
        if not exists(place):
            return None
        with place.fs.open_input_file(place.path) as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)

    def read_part(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a shard's file."""
        place = self.part(index)
        with place.fs.open_input_file(place.path) as stream:
            return pq.ParquetFile(stream).read(columns=list(columns))

    def journal(self, index: int) -> Location:
        """Where attempts at a shard journal their rows."""
        return self.run.child("journal", f"{index:05d}")

    def commit(self, index: int, table: pa.Table) -> None:
        """Write a shard's file whole, then drop its journal.

        Raises:
            OSError: the store refused; the shard is as it was before.
        """
        put(self.part(index), parquet_bytes(table), self.scratch)
        self.forget(index)

    def forget(self, index: int) -> None:
        """Drop the journal of a committed shard."""
        delete_tree(self.journal(index))
        delete_tree(self.attempts(index))

    def attempts(self, index: int) -> Location:
        """Where attempts at a shard say that they begin; see `attempts`."""
        return self.run.child("journal", f"{index:05d}.attempts")

    def has_token(self, token: str) -> bool:
        """Whether this process sees the directory that the driver wrote, and not another one of the same name."""
        job_file = self.run.child("job.json")
        return exists(job_file) and json.loads(read(job_file))["token"] == token


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """A table as a Parquet file. Equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def output_schema(schema: pa.Schema, keep: Sequence[str] | None) -> pa.Schema:
    """The input columns that the output carries, in input order.

    Raises:
        UserError: a name in `keep` is no column.
    """
    missing = [name for name in keep or () if name not in schema.names]
    if missing:
        raise UserError(f"columns.keep names {missing[0]!r}, which the input lacks; it has {', '.join(schema.names)}")
    return pa.schema([field for field in schema if keep is None or field.name in keep])
