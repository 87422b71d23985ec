"""The plan of a job: which shards it is cut into, and the identity that says whether a second start is the same job.

`generate.py` makes or loads it on the driver; workers only see single shards of it. No data is read for Parquet.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import xxhash

from pipelines.inputs import Dataset, FileFacts, Format, InputFile, RowRange, read_rows
from pipelines.job import JobConfig
from pipelines.models import EDGE_BYTES, is_address, look, model_name
from pipelines.requests import Requests
from pipelines.rows import ROW_PATH_VERSION
from pipelines.storage import Location, retrying

# Engine options that change speed or memory and not what a row generates (up to the last bits of its arithmetic).
# Every other option, those to come included, belongs to the identity of a job.
SPEED_OPTIONS = {
    "model",
    "max_num_batched_tokens",
    "max_num_seqs",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "enforce_eager",
    "kvcache_block_size",
    "num_kvcache_blocks",
    "device",
    "attention_backend",
    "enable_prefix_caching",
    "seed",
    "trust_remote_code",
}
# What settings that came later are where they are not used: outputs begun before there was such a setting go on.
UNUSED: dict[str, Any] = {
    "prompt.add_generation_prompt": True,
    "prompt.chat": False,
    "prompt.chat_template_kwargs": {},
    "output.order": "input",
    "run.group_by": None,
    "run.prefix_sort": "off",
    "sampling_columns": {},
}
# A shard stays in flight until its longest row is done, most of its rows having ended long before. So an engine is full while its shards
# in flight hold as many batches as the longest row is longer than the mean one; outputs whose lengths differ by more than this are rare.
BATCHES_IN_FLIGHT = 8

# `run.shard_rows: auto`. A shard costs the driver about 5 ms and 7 KB, a crash at most the rows of those in flight.
AUTO_ROWS = 1_000
AUTO_SHARDS = 20_000  # above so many shards of AUTO_ROWS, they grow
AUTO_MOST_ROWS = 26_214  # a quarter more where a row group ends: 32,768
AUTO_BYTES = 256 << 20  # uncompressed, so that `shards_in_flight` of them and their results fit in memory
TAPER = 16  # the last shards are so much smaller, where that still fills the engine

Identity = dict[str, Any]
Place = tuple[str, int]  # of an input row: its file, and its number there


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows of one file: the unit of work, retry and commit.

    Attributes:
        index: position in the plan, and the name of the output file.
        file: path relative to the input's root.
        size: bytes of the whole file when it was planned.
        first_row: number of the first row in the file.
        rows: how many rows.
        offset, length: their bytes in the file for JSONL and CSV; 0 for Parquet.
        mtime_ns: time stamp of the file when it was planned; 0 where the store keeps none.
    """

    index: int
    file: str
    size: int
    first_row: int
    rows: int
    offset: int
    length: int
    mtime_ns: int = 0

    @property
    def row_range(self) -> RowRange:
        """What to read."""
        return RowRange(self.file, self.first_row, self.rows, self.offset, self.length)

    def place(self, position: int) -> Place:
        """Where the row at a position of the shard is."""
        return self.file, self.first_row + position


SHARD_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("size", pa.int64()),
        ("first_row", pa.int64()),
        ("rows", pa.int64()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)


# Of rows that run in another order than that of the input (`routing`): their place there, and their position among all rows.
PLACES = pa.schema([("_input_file", pa.string()), ("_input_row", pa.int64()), ("_input_position", pa.int64())])


class Stage(NamedTuple):
    """What engines work on: the input as it is, or its rows in another order (`routing`).

    Attributes:
        root, format, schema: of the files that shards are parts of.
        kept: columns that they carry over into the files they write.
        parts: directory of these files, below the output; "" for the output itself.
        routed: rows are in another order than in the input; `PLACES` are among the columns.
    """

    root: Location
    format: Format
    schema: pa.Schema
    kept: tuple[str, ...]
    parts: str = ""
    routed: bool = False

    def places(self, shard: Shard, table: pa.Table, rows_each: int = 1) -> Callable[[int], Place] | None:
        """Where the rows of a shard are in the input, by position; None where `table` does not say. It has `rows_each` rows of each."""
        if not self.routed:
            return shard.place
        if PLACES.names[0] not in table.column_names:
            return None
        files, rows = (table[name].to_pylist() for name in PLACES.names[:2])
        return lambda position: (files[position * rows_each], rows[position * rows_each])


def read_shard(root: Location, file_format: Format, shard: Shard, schema: pa.Schema, retries: int) -> pa.Table:
    """Read the rows of a shard, from the file that it was planned from; a store that fails is asked again `retries` times.

    Raises:
        OSError, pa.ArrowException: the file is another one now, or cannot be read.
    """
    place = root.child(shard.file)
    retries = 0 if place.appends else retries  # a local disk that fails once fails again
    info = retrying(lambda: place.fs.get_file_info(place.path), retries)
    if info.size != shard.size:
        now = "is gone" if info.size is None else f"has {info.size} bytes"
        raise OSError(f"{shard.file} had {shard.size} bytes when it was planned and {now}")
    if place.appends and shard.mtime_ns and info.mtime_ns != shard.mtime_ns:  # object stores round theirs
        raise OSError(f"{shard.file} was written again since it was planned")
    return retrying(lambda: read_rows(root, file_format, shard.row_range, schema), retries)


def read_head(stage: Stage, shard: Shard, rows: int, schema: pa.Schema) -> pa.Table:
    """The first rows of a shard, at most so many.

    Raises:
        OSError, pa.ArrowException: they cannot be read.
    """
    wanted = shard.row_range
    if stage.format == "parquet":  # text is cut at rows whose bytes are known
        wanted = wanted._replace(rows=min(rows, shard.rows))
    return read_rows(stage.root, stage.format, wanted, schema).slice(0, rows)


def read_schema(stage: Stage, requests: Requests) -> pa.Schema:
    """The columns of a stage that its shards are read for: those that are kept, and those that requests are made of."""
    wanted = [*stage.kept, *(PLACES.names if stage.routed else ()), *requests.columns]
    return pa.schema([stage.schema.field(name) for name in dict.fromkeys(wanted)])


FILE_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64())])


def cut(
    files: Sequence[InputFile], facts: Sequence[FileFacts], most: int, least: int, most_bytes: int = 0
) -> Iterator[Shard]:
    """Cut files into shards of about `most` rows, and of ever fewer, down to `least`, over the last quarter of the job.

    Guided self-scheduling (Polychronopoulos and Kuck, 1987): a shard gets a fixed fraction of what remains, so that
    actors which take the last shards finish together. A shard ends at the end of a row group where one is near, and may
    then have a quarter more rows. Where `most_bytes` is given, it has about so many uncompressed bytes at most.
    """
    remaining = sum(fact.rows for fact in facts)
    fraction = min(4096, max(8, remaining // most // 4))
    index = 0
    for file, fact in zip(files, facts, strict=True):
        start, rows = 0, fact.rows
        heaviest = max(1, most_bytes * rows // fact.decoded_bytes) if most_bytes and fact.decoded_bytes else most
        while start < rows:
            target = min(most, heaviest, max(least, -(-remaining // fraction)))
            end = _end(fact, start, target)
            offset, length = _bytes(fact, start, end)
            yield Shard(index, file.path, file.size, start, end - start, offset, length, file.mtime_ns)
            remaining -= end - start
            index += 1
            start = end


def _end(fact: FileFacts, start: int, target: int) -> int:
    """The row after a shard that starts at `start` and should have about `target` rows."""
    boundary = bisect_right(fact.ends, start + target + target // 4) - 1
    if boundary >= 0 and fact.ends[boundary] >= start + (target + 1) // 2:
        return int(fact.ends[boundary])
    if fact.offsets is None:
        return min(start + target, fact.rows)
    return int(fact.ends[max(boundary, bisect_right(fact.ends, start))])


def _bytes(fact: FileFacts, start: int, end: int) -> tuple[int, int]:
    if fact.offsets is None:
        return 0, 0
    first = fact.offsets[bisect_right(fact.ends, start)]
    return int(first), int(fact.offsets[bisect_right(fact.ends, end)] - first)


def make_shards(config: JobConfig, files: Sequence[InputFile], facts: Sequence[FileFacts]) -> list[Shard]:
    """The shards of a job. `shards_in_flight` of the smallest ones still keep an engine full.

    Several samples of a row are as much work, and as many texts to keep, as several rows.
    """
    n = config.sampling.n
    fill = -(-BATCHES_IN_FLIGHT * config.engine.max_num_seqs // (config.run.shards_in_flight * n))
    if config.run.shard_rows == "auto":
        rows = sum(fact.rows for fact in facts)
        most = min(-(-AUTO_MOST_ROWS // n), max(-(-AUTO_ROWS // n), -(-rows // AUTO_SHARDS)))
        most_bytes = AUTO_BYTES // n
    else:
        most, most_bytes = config.run.shard_rows, 0
    return list(cut(files, facts, most, min(most, max(fill, most // TAPER)), most_bytes))


def identity(config: JobConfig, dataset: Dataset) -> Identity:
    """All that decides the result of a job, as flat names and plain values. Equal identities resume one another."""
    settings = config.as_dict()
    engine = {key: value for key, value in settings["engine"].items() if key not in SPEED_OPTIONS}
    if (structure := settings["sampling"]["structured_outputs"]) is not None:
        # As text: properties of a schema are generated in their order, which a comparison of mappings does not see.
        settings["sampling"]["structured_outputs"] = json.dumps(structure, ensure_ascii=False)
    settled = {
        "row path version": ROW_PATH_VERSION,
        "model": model_identity(config.model, config.run.model_cache),
        "input": _digest_files(dataset.files),
        **{f"prompt.{key}": value for key, value in settings["prompt"].items()},
        "format": "openai_batch" if config.format == "openai_batch" else None,  # the others say what `input` does
        **{key: settings[key] for key in ("sampling_columns", "sampling_column")},
        **{f"sampling.{key}": value for key, value in settings["sampling"].items()},
        **{f"columns.{key}": value for key, value in settings["columns"].items()},
        **{f"engine.{key}": value for key, value in engine.items()},
        "output.order": config.output_order,
        **{f"run.{key}": settings["run"][key] for key in ("seed", "group_by", "prefix_sort")},
    }
    return {key: value for key, value in settled.items() if key not in UNUSED or value != UNUSED[key]}


def model_identity(model: str, cache: str | None = None) -> str:
    """A digest of a model directory that moves with it, onto a store too: file names, sizes, and the content of small files and of
    both ends of large ones. A hub id stands for itself. `cache` as in `look`.

    Raises:
        UserError: a model on a store is not there, or the store cannot be reached.
    """
    root = look(model, cache) if is_address(model) else Path(model)
    if not root.is_dir():
        return model
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(root.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".txt", ".model", ".jinja") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(EDGE_BYTES))
            if size > EDGE_BYTES:
                stream.seek(max(EDGE_BYTES, size - EDGE_BYTES), os.SEEK_SET)
                digest.update(stream.read())
    name = model_name(model) if is_address(model) else root.name
    return f"{name} (content {digest.hexdigest()})"


def _digest_files(files: Sequence[InputFile]) -> str:
    """Stands for the files with their sizes and time stamps; the files themselves are stored apart, as they may be many."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update("\0".join(map(str, file)).encode("utf-8", "surrogatepass") + b"\0")
    return f"{len(files)} files (digest {digest.hexdigest()})"


def differences(
    before: Identity, now: Identity, files_before: Callable[[], Sequence[InputFile]], files_now: Sequence[InputFile]
) -> list[str]:
    """What differs between the identity of the job an output belongs to and this one, in words.

    `files_before` is called only where the files differ.
    """
    found = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "input":
            found.append(_input_difference(files_before(), files_now))
        else:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found


def _input_difference(before: Sequence[InputFile], now: Sequence[InputFile]) -> str:
    old = {path: (size, mtime) for path, size, mtime in before}
    new = {path: (size, mtime) for path, size, mtime in now}
    gone = sorted(set(old) - set(new))
    added = sorted(set(new) - set(old))
    if gone or added:
        path = (gone or added)[0]
        more = f" (and {len(gone) + len(added) - 1} more)" if len(gone) + len(added) > 1 else ""
        return f"input file {path!r} {'is gone' if gone else 'is new'}{more}"
    path = next(path for path in sorted(new) if new[path] != old[path])
    return (
        f"input file {path!r} has changed since ({old[path][0]} bytes then, {new[path][0]} now, or another time stamp)"
    )


def shards_to_table(shards: Sequence[Shard]) -> pa.Table:
    """Shards as they are stored in `_run/plan.parquet`."""
    arrays = [
        pa.array([getattr(shard, field.name) for shard in shards], pa.string() if field.name == "file" else field.type)
        for field in SHARD_SCHEMA
    ]
    return pa.table(arrays, names=SHARD_SCHEMA.names).cast(SHARD_SCHEMA)


def shards_from_table(table: pa.Table) -> list[Shard]:
    """The reverse of `shards_to_table`."""
    return [Shard(*row) for row in zip(*(table[name].to_pylist() for name in SHARD_SCHEMA.names), strict=True)]


def files_to_table(files: Sequence[InputFile]) -> pa.Table:
    """Input files as they are stored in `_run/input.parquet`."""
    columns = zip(*files, strict=True) if files else [()] * len(FILE_SCHEMA)
    return pa.table([pa.array(list(c), f.type) for c, f in zip(columns, FILE_SCHEMA, strict=True)], schema=FILE_SCHEMA)


def files_from_table(table: pa.Table) -> list[InputFile]:
    """The reverse of `files_to_table`."""
    return [InputFile(*row) for row in zip(*(table[name].to_pylist() for name in FILE_SCHEMA.names), strict=True)]
