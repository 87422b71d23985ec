"""The input dataset: which files it has, how many rows they hold, and reading a row range of one of them.

`plan` lists and measures on the driver; `worker` reads shards with `read_rows`. One class of facts, three formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from nanovllm import UserError
from pipelines.storage import Location, resolve, split_query

Format = Literal["parquet", "jsonl", "csv"]

EXTENSIONS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
FOOTER_THREADS = 16
SCAN_BYTES = 16 << 20
TEXT_STRIDE = 16  # rows between the byte offsets remembered for JSONL and CSV, so shards are cut at multiples of it
WILDCARDS = re.compile(r"[*?\[]")


class InputFile(NamedTuple):
    """One input file. `path` is relative to the dataset's root; `mtime_ns` is 0 where the store keeps none."""

    path: str
    size: int
    mtime_ns: int


class Dataset(NamedTuple):
    """The files of an input, in sorted order, all of one format, below one root."""

    root: Location
    format: Format
    files: list[InputFile]


class FileFacts(NamedTuple):
    """What planning knows about a file.

    Attributes:
        schema: its columns.
        ends: row numbers after which it may be cut: ends of row groups, or of every `TEXT_STRIDE` rows. The last one is
            the number of rows.
        offsets: bytes at which the rows after 0 and after every end start (JSONL and CSV, which can be cut nowhere
            else); None for Parquet, which can be cut at any row.
    """

    schema: pa.Schema
    ends: Sequence[int]
    offsets: Sequence[int] | None

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return int(self.ends[-1]) if len(self.ends) else 0


def list_dataset(address: str) -> Dataset:
    """List the files behind a file, directory or glob. Names that start with `.` or `_` are skipped, as Spark and Hive do.

    Raises:
        UserError: nothing is there, nothing matches, or the files are not all Parquet, all JSONL or all CSV.
    """
    root, infos = _find(address)
    if not infos:
        raise UserError(f"input {address!r} holds no data files; give a Parquet, JSONL or CSV file, directory or glob")
    files = [
        InputFile(info.path[len(root.path.rstrip("/")) + 1 :], info.size or 0, info.mtime_ns or 0)
        for info in sorted(infos, key=lambda info: str(info.path))
    ]
    formats = {_format_of(root, file): file.path for file in files}
    if len(formats) > 1:
        examples = ", ".join(f"{path!r} is {name}" for name, path in sorted(formats.items()))
        raise UserError(f"input {address!r} mixes formats ({examples}); give a glob that matches one of them")
    return Dataset(root, next(iter(formats)), files)


def _find(address: str) -> tuple[Location, list[pafs.FileInfo]]:
    """The root of the dataset and its data files, unsorted."""
    pattern = WILDCARDS.search(split_query(address)[0].split("://", 1)[-1])
    try:
        if pattern:
            return _glob(address)
        place = resolve(address)
        info = place.fs.get_file_info(place.path)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"input {address!r} does not exist")
        if info.type == pafs.FileType.File:
            return Location(place.fs, place.path.rsplit("/", 1)[0]), [info]
        return place, _data_files(place)
    except OSError as error:
        raise UserError(f"input {address!r} cannot be listed: {_one_line(error)}") from None


def _glob(address: str) -> tuple[Location, list[pafs.FileInfo]]:
    path_of, query = split_query(address)
    scheme, separator, path = path_of.rpartition("://")
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if WILDCARDS.search(part))
    root = resolve(scheme + separator + ("/".join(parts[:first]) or "/") + query)
    if root.fs.get_file_info(root.path).type != pafs.FileType.Directory:
        raise UserError(f"input {address!r}: the directory {root.path!r} does not exist")
    matches = re.compile(_glob_pattern(parts[first:])).fullmatch
    start = len(root.path.rstrip("/")) + 1
    return root, [info for info in _data_files(root) if matches(info.path[start:])]


def _glob_pattern(parts: Sequence[str]) -> str:
    """A regular expression for a glob: `*` and `?` stay inside one directory, `**` spans any number of them."""
    pieces = []
    for number, part in enumerate(parts):
        if part == "**":
            pieces.append(r".*" if number == len(parts) - 1 else r"(?:.*/)?")
            continue
        words = re.split(r"(\*|\?|\[[^\]]+\])", part)
        translated = {"*": "[^/]*", "?": "[^/]"}
        pieces.append(
            "".join(
                translated.get(word) or (word.replace("[!", "[^") if word.startswith("[") else re.escape(word))
                for word in words
            )
            + ("/" if number < len(parts) - 1 else "")
        )
    return "".join(pieces)


def _data_files(root: Location) -> list[pafs.FileInfo]:
    start = len(root.path.rstrip("/")) + 1
    return [
        info
        for info in root.fs.get_file_info(pafs.FileSelector(root.path, recursive=True))
        if info.type == pafs.FileType.File and not re.search(r"(^|/)[._]", info.path[start:])
    ]


def _format_of(root: Location, file: InputFile) -> Format:
    name = file.path.lower()
    for extension, name_of_format in EXTENSIONS.items():
        if name.endswith(extension):
            return name_of_format
    place = root.child(file.path)
    try:
        with place.fs.open_input_file(place.path) as stream:
            if stream.read(4) == b"PAR1":
                return "parquet"
    except OSError as error:
        raise UserError(f"input file {file.path!r} cannot be read: {_one_line(error)}") from None
    raise UserError(
        f"input file {file.path!r} is not known to be Parquet, JSONL or CSV (known endings: {', '.join(EXTENSIONS)}); "
        "rename it, or give a glob that leaves it out"
    )


def measure(dataset: Dataset) -> tuple[pa.Schema, list[FileFacts]]:
    """Read footers (Parquet) or scan once (JSONL, CSV), a few files at a time.

    Returns:
        The schema that all files fit, without schema metadata, and the facts of each file.

    Raises:
        UserError: a file cannot be read as its format, there are no rows, or schemas contradict one another.
    """

    def one(file: InputFile) -> FileFacts:
        try:
            return _measure_file(dataset, file)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"input file {file.path!r} is not readable {dataset.format}: {_one_line(error)}") from None

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        facts = list(pool.map(one, dataset.files))
    if not any(fact.rows for fact in facts):
        raise UserError(f"input has no rows ({len(facts)} files in {dataset.root.path!r}); nothing to do")
    return _unify([fact.schema for fact in facts], dataset.files), facts


def _unify(schemas: Sequence[pa.Schema], files: Sequence[InputFile]) -> pa.Schema:
    unified = schemas[0]
    for schema, file in zip(schemas[1:], files[1:], strict=True):
        if schema.equals(unified):
            continue
        try:
            unified = pa.unify_schemas([unified, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"columns of {file.path!r} contradict the files before it: {_one_line(error)}") from None
    names = unified.names
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"input has several columns named {twice[0]!r}; rename them")
    return unified


def _measure_file(dataset: Dataset, file: InputFile) -> FileFacts:
    place = dataset.root.child(file.path)
    if dataset.format != "parquet":
        return _scan_text(place, dataset.format)
    with place.fs.open_input_file(place.path) as stream:
        footer = pq.ParquetFile(stream)
        groups = [footer.metadata.row_group(number).num_rows for number in range(footer.metadata.num_row_groups)]
        return FileFacts(footer.schema_arrow.remove_metadata(), np.cumsum(groups, dtype=np.int64).tolist(), None)


def _scan_text(place: Location, text_format: Format) -> FileFacts:
    """Count the rows of a JSONL or CSV file and remember where every `TEXT_STRIDE`th one starts."""
    schema = pa.schema([])
    ends: list[int] = []
    offsets: list[int] = []
    rows = position = 0
    with place.fs.open_input_stream(place.path) as stream:
        for chunk in _whole_rows(stream, text_format):
            data = np.frombuffer(chunk, dtype=np.uint8)
            row_ends = _row_ends(data, text_format)
            if not offsets:
                offsets.append(int(row_ends[0]) if text_format == "csv" and len(row_ends) else 0)
                if text_format == "csv":  # the header is no row; CSV has no types, so every column stays text
                    header = pacsv.read_csv(pa.py_buffer(chunk[: offsets[0]]))
                    schema = pa.schema([(name, pa.string()) for name in header.column_names])
                    row_ends = row_ends[1:]
            if text_format == "jsonl" and len(row_ends):
                table = _parse_json(chunk, None)
                if table.num_rows != len(row_ends):
                    raise pa.ArrowInvalid(f"{len(row_ends)} lines hold {table.num_rows} JSON objects; write one a line")
                schema = pa.unify_schemas([schema, _text_for_dates(table.schema)], promote_options="permissive")
            numbers = np.arange(rows + 1, rows + len(row_ends) + 1)
            cuts = numbers % TEXT_STRIDE == 0
            ends.extend(numbers[cuts].tolist())
            offsets.extend((row_ends[cuts] + position).tolist())
            rows += len(row_ends)
            if len(row_ends) and not cuts[-1]:  # the end of the file so far, replaced if more rows follow
                last = int(row_ends[-1]) + position
            elif len(row_ends):
                last = -1
            position += len(chunk)
    if rows % TEXT_STRIDE:
        ends.append(rows)
        offsets.append(last)
    return FileFacts(schema, ends, offsets)


def _whole_rows(stream: pa.NativeFile, text_format: Format, size: int = SCAN_BYTES) -> Iterable[bytes]:
    """The file in pieces of about `size` bytes that each end where a row does."""
    rest = b""
    while piece := stream.read(size):
        rest += piece
        row_ends = _row_ends(np.frombuffer(rest, dtype=np.uint8), text_format, blank_too=True)
        if len(row_ends):
            yield rest[: row_ends[-1]]
            rest = rest[row_ends[-1] :]
    if rest:
        yield rest + b"\n"


def _row_ends(data: np.ndarray, text_format: Format, blank_too: bool = False) -> np.ndarray:
    """Positions after the newlines that end a row. In CSV a newline inside quotes ends none; blank lines are no rows."""
    ends = np.flatnonzero(data == ord("\n")) + 1
    if text_format == "csv":
        quotes = np.cumsum(data == ord('"'))
        ends = ends[quotes[ends - 1] % 2 == 0]
    if blank_too or not len(ends):
        return ends
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    lengths = ends - starts
    blank = (lengths == 1) | ((lengths == 2) & (data[starts] == ord("\r")))
    row_ends: np.ndarray = ends[~blank]
    return row_ends


def _text_for_dates(schema: pa.Schema) -> pa.Schema:
    """JSON has no dates: what pyarrow takes for one is a string, and stays it."""
    return pa.schema([pa.field(f.name, _text_for_date_type(f.type)) for f in schema])


def _text_for_date_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_text_for_date_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _text_for_date_type(field.type)) for field in kind])
    return kind


def _parse_json(data: bytes, schema: pa.Schema | None) -> pa.Table:
    return pajson.read_json(
        pa.BufferReader(data),
        pajson.ReadOptions(use_threads=False, block_size=len(data) + 1),
        pajson.ParseOptions(explicit_schema=schema),
    )


class RowRange(NamedTuple):
    """Rows `first_row` to `first_row + rows` of a file; `offset` and `length` are their bytes in JSONL and CSV, else 0."""

    file: str
    first_row: int
    rows: int
    offset: int
    length: int


def read_rows(root: Location, file_format: Format, wanted: RowRange, schema: pa.Schema) -> pa.Table:
    """Read a row range as a table of `schema`; columns that the file lacks are null.

    Raises:
        OSError, pa.ArrowException: the file is gone, unreadable, or holds other rows than planned.
    """
    place = root.child(wanted.file)
    if file_format == "parquet":
        table = _read_parquet(place, wanted, schema)
    else:
        with place.fs.open_input_file(place.path) as stream:
            stream.seek(wanted.offset)
            data = stream.read(wanted.length)
        table = _parse_json(data, schema) if file_format == "jsonl" else _parse_csv(place, data)
    if table.num_rows != wanted.rows:
        raise pa.ArrowInvalid(f"{wanted.file}: expected {wanted.rows} rows, found {table.num_rows}")
    return _conform(table, schema)


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, in its order and types; null where the table lacks one."""
    names = [name for name in schema.names if name in table.column_names]
    if any(table.schema.field(name).type != schema.field(name).type for name in names):
        table = table.take(
            pa.array(range(table.num_rows))
        )  # pyarrow's cast misreads slices of structs with null fields
    columns = []
    for field in schema:
        if field.name not in names:
            columns.append(pa.nulls(table.num_rows, field.type))
        elif table.schema.field(field.name).type == field.type:
            columns.append(table[field.name])
        else:
            columns.append(table[field.name].cast(field.type))
    return pa.table(columns, schema=schema)


def _read_parquet(place: Location, wanted: RowRange, schema: pa.Schema) -> pa.Table:
    """Decode only the row groups that hold wanted rows, in batches, so a huge row group is never in memory whole."""
    with place.fs.open_input_file(place.path) as stream:
        file = pq.ParquetFile(stream)
        groups: list[int] = []
        skip = position = 0
        last = wanted.first_row + wanted.rows
        for number in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            if position < last and position + rows > wanted.first_row:
                if not groups:
                    skip = wanted.first_row - position
                groups.append(number)
            position += rows
        names = [name for name in schema.names if name in file.schema_arrow.names]
        batches, missing = [], wanted.rows
        for batch in file.iter_batches(batch_size=4096, row_groups=groups, columns=names, use_threads=False):
            piece = batch.slice(skip, missing)
            skip = max(0, skip - batch.num_rows)
            missing -= piece.num_rows
            batches.append(piece)
            if not missing:
                break
        return pa.Table.from_batches(batches, pa.schema([file.schema_arrow.field(name) for name in names]))


def _parse_csv(place: Location, data: bytes) -> pa.Table:
    with place.fs.open_input_stream(place.path) as stream:
        header = next(iter(_whole_rows(stream, "csv", size=1 << 16)))
    first = _row_ends(np.frombuffer(header, dtype=np.uint8), "csv")[0]
    names = pacsv.read_csv(pa.py_buffer(header[:first])).column_names
    return pacsv.read_csv(
        pa.BufferReader(data),
        pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
        pacsv.ParseOptions(newlines_in_values=True),
        pacsv.ConvertOptions(column_types={name: pa.string() for name in names}),
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
