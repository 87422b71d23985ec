"""The input dataset: which files it has, how many rows they hold, and reading a row range of one of them.

`plan` lists and measures on the driver; `worker` reads shards with `read_rows`. One class of facts, four formats: Parquet, JSONL, CSV,
and JSONL of OpenAI's batch API, which is read as the columns of `BATCH_SCHEMA` whatever its lines hold.

Hive directories below the root (`date=2024-01-02/lang=de/x.parquet`) are columns, after those of the files and in path order:
int64 where every value is a whole number (as `pyarrow.dataset` infers, but wide enough for all), else string. Values are
URL-decoded, `__HIVE_DEFAULT_PARTITION__` is null, and files without the directory have null. A column that a file has itself
wins over its path; in JSONL, where any row may leave a key out, a row's own value does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from nanovllm import UserError
from pipelines.storage import Location, resolve, split_query

Format = Literal["parquet", "jsonl", "csv", "openai_batch"]

EXTENSIONS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
FOOTER_THREADS = 16
FILES_AT_ONCE = 64  # that a thread measures in one turn: a hundred thousand pending calls would cost more than footers
SCAN_BYTES = 16 << 20
TEXT_STRIDE = 16  # rows between the byte offsets remembered for JSONL and CSV, so shards are cut at multiples of it,
TEXT_STRIDE_BYTES = 1 << 20  # and where a row is the first to end in another MiB, for files of huge rows
MOST_ROW_BYTES = 256 << 20  # of JSONL and CSV
READ_ROWS = 4096  # most rows decoded at a time
READ_BUFFER = 4 << 20  # bytes of a column chunk fetched at a time
WILDCARDS = re.compile(r"[*?\[]")
HIDDEN = re.compile(r"(^|/)(\.|_(?![^/]*=[^/]*/))")  # a Hive directory may start with _, as in Spark
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_BLANK = bytes(range(33))  # what a blank line of JSONL may hold
WHOLE_NUMBER = re.compile(r"-?[0-9]+")
# All text: bodies differ from line to line, and no type of a column holds all of them. A line that is no request is in `body`.
BATCH_SCHEMA = pa.schema([(name, pa.string()) for name in ("custom_id", "method", "url", "body")])


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
            the number of rows. An int64 array, as is `offsets`.
        offsets: bytes at which the rows after 0 and after every end start (JSONL and CSV, which can be cut nowhere
            else); None for Parquet, which can be cut at any row.
        decoded_bytes: uncompressed size of its rows: the file's, or its row groups' with columns encoded; 0 if not known.
    """

    schema: pa.Schema
    ends: Sequence[int] | np.ndarray
    offsets: Sequence[int] | np.ndarray | None
    decoded_bytes: int = 0

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return int(self.ends[-1]) if len(self.ends) else 0


def list_dataset(address: str, file_format: Literal["auto", Format] = "auto") -> Dataset:
    """List the files behind a file, directory or glob. Names that start with `.` or `_` are skipped, as Spark and Hive do.

    Raises:
        UserError: nothing is there, nothing matches, or the files are not all Parquet, all JSONL or all CSV, or by their names not
            of the format that was given.
    """
    root, infos = _find(address)
    if not infos:
        raise UserError(f"input {address!r} holds no data files; give a Parquet, JSONL or CSV file, directory or glob")
    files = [
        InputFile(info.path[len(root.path.rstrip("/")) + 1 :], info.size or 0, info.mtime_ns or 0)
        for info in sorted(infos, key=lambda info: str(info.path))
    ]
    if file_format != "auto":
        _check_endings(files, file_format)
        return Dataset(root, file_format, files)
    formats = {_format_of(root, file): file.path for file in files}
    if len(formats) > 1:
        examples = ", ".join(f"{path!r} is {name}" for name, path in sorted(formats.items()))
        raise UserError(f"input {address!r} mixes formats ({examples}); give a glob that matches one of them")
    return Dataset(root, next(iter(formats)), files)


def _find(address: str) -> tuple[Location, list[pafs.FileInfo]]:
    """The root of the dataset and its data files, unsorted."""
    uri = "://" in address
    plain, options = split_query(address)
    try:
        if WILDCARDS.search(plain.split("://", 1)[-1]) and (uri or not os.path.exists(os.path.expanduser(address))):
            return _glob(plain, options)
        place = resolve(address)
        info = place.fs.get_file_info(place.path)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"input {address!r} does not exist")
        if info.type == pafs.FileType.File:
            return Location(place.fs, place.path.rsplit("/", 1)[0]), [info]
        return place, _data_files(place)
    except OSError as error:
        raise UserError(f"input {address!r} cannot be listed: {_one_line(error)}") from None


def _glob(address: str, options: str) -> tuple[Location, list[pafs.FileInfo]]:
    scheme, separator, path = address.rpartition("://")
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if WILDCARDS.search(part))
    root = resolve(scheme + separator + ("/".join(parts[:first]) or "/") + options)
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
        if info.type == pafs.FileType.File and not HIDDEN.search(info.path[start:])
    ]


def _check_endings(files: Sequence[InputFile], file_format: Format) -> None:
    """Refuse files that are named as another format. Other names say nothing."""
    ending = "jsonl" if file_format == "openai_batch" else file_format
    for file in files:
        named = _format_by_name(file)
        if named not in (None, ending):
            raise UserError(
                f"input file {file.path!r} is named as {named}, and format={file_format} was given; leave it out, or give a glob "
                "that matches the right files"
            )


def _format_by_name(file: InputFile) -> Format | None:
    name = file.path.lower()
    return next((known for extension, known in EXTENSIONS.items() if name.endswith(extension)), None)


def _format_of(root: Location, file: InputFile) -> Format:
    named = _format_by_name(file)
    if named is not None:
        return named
    place = root.child(file.path)
    try:
        with place.fs.open_input_file(place.path) as stream:
            if stream.read(4) == b"PAR1":
                return "parquet"
    except OSError as error:
        raise UserError(f"input file {file.path!r} cannot be read: {_one_line(error)}") from None
    raise UserError(
        f"input file {file.path!r} is not known to be Parquet, JSONL or CSV (known endings: {', '.join(EXTENSIONS)}); "
        "rename it, give a glob that leaves it out, or say what it is with format=..."
    )


def measure(dataset: Dataset) -> tuple[pa.Schema, list[FileFacts]]:
    """Read footers (Parquet) or scan once (JSONL, CSV), a few files at a time.

    Returns:
        The schema that all files fit, without schema metadata, and the facts of each file.

    Raises:
        UserError: a file cannot be read as its format, there are no rows, or schemas contradict one another.
    """

    interned: dict[pa.Schema, pa.Schema] = {}  # a hundred thousand files have one schema, or a few

    def some(files: Sequence[InputFile]) -> list[FileFacts]:
        facts = []
        for file in files:
            try:
                fact = _measure_file(dataset, file)
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                raise UserError(
                    f"input file {file.path!r} is not readable {dataset.format}: {_one_line(error)}"
                ) from None
            facts.append(fact._replace(schema=interned.setdefault(fact.schema, fact.schema)))
        return facts

    starts = range(0, len(dataset.files), FILES_AT_ONCE)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        parts = pool.map(some, (dataset.files[start : start + FILES_AT_ONCE] for start in starts))
        facts = [fact for part in parts for fact in part]
    if not any(fact.rows for fact in facts):
        raise UserError(f"input has no rows ({len(facts)} files in {dataset.root.path!r}); nothing to do")
    return _add_partitions(_unify(dataset.files, facts), dataset.files, facts), facts


def _unify(files: Sequence[InputFile], facts: Sequence[FileFacts]) -> pa.Schema:
    """The columns of all files, in order of appearance, each of a type that holds what every file has there."""
    first_with: dict[pa.Schema, str] = {}
    unified = facts[0].schema
    for file, fact in zip(files, facts, strict=True):
        if fact.schema in first_with:
            continue
        names = fact.schema.names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"input file {file.path!r} has several columns named {twice!r}; rename them")
        try:
            unified = _unify_two(unified, fact.schema)
        except pa.ArrowException as error:
            other = next(
                (path for schema, path in first_with.items() if not _agree(schema, fact.schema)), files[0].path
            )
            raise UserError(f"columns of {file.path!r} contradict those of {other!r}: {_one_line(error)}") from None
        first_with[fact.schema] = file.path
    lacking = {name for schema in first_with for name in unified.names if name not in schema.names}
    return pa.schema([field.with_nullable(field.nullable or field.name in lacking) for field in unified])


def _unify_two(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Permissively; where a column is a dictionary in one file and plain in another, it is plain."""
    try:
        return pa.unify_schemas([one, other], promote_options="permissive")
    except pa.ArrowException:
        plain = [pa.schema([f.with_type(_plain_type(f.type)) for f in schema]) for schema in (one, other)]
        return pa.unify_schemas(plain, promote_options="permissive")


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _agree(one: pa.Schema, other: pa.Schema) -> bool:
    try:
        _unify_two(one, other)
        return True
    except pa.ArrowException:
        return False


def partition_values(path: str) -> dict[str, str | None]:
    """Keys and values of the Hive directories in `path`, which is relative to the input's root."""
    if "=" not in path:
        return {}
    pairs = (part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)
    return {key: None if value == HIVE_NULL else unquote(value) for key, value in pairs if key}


def _add_partitions(schema: pa.Schema, files: Sequence[InputFile], facts: Sequence[FileFacts]) -> pa.Schema:
    """`schema` with a column for every Hive key that no file has as a column of its own.

    Raises:
        UserError: a file without a column that others have gets a value from its path that does not fit its type.
    """
    values: dict[str, set[str]] = {}
    seen: set[tuple[str, int]] = set()
    for file, fact in zip(files, facts, strict=True):
        kind = (file.path.rpartition("/")[0], id(fact.schema))
        if "=" not in kind[0] or kind in seen:
            continue
        seen.add(kind)
        for key, value in partition_values(file.path).items():
            if key not in schema.names:
                values.setdefault(key, set()).update(() if value is None else (value,))
            elif key not in fact.schema.names and _constant(value, schema.field(key).type, 1) is None:
                raise UserError(
                    f"the directory of {file.path!r} says {key}={value}, which is no {schema.field(key).type}, the type of "
                    f"column {key!r} in other files; rename one of them"
                )
    columns = [pa.field(key, _partition_type(found)) for key, found in values.items()]
    return pa.schema([*schema, *columns])


def _partition_type(values: set[str]) -> pa.DataType:
    whole = values and all(WHOLE_NUMBER.fullmatch(value) and -(2**63) <= int(value) < 2**63 for value in values)
    return pa.int64() if whole else pa.string()


def _constant(value: str | None, kind: pa.DataType, rows: int) -> pa.Array | None:
    """`rows` times a value of a path; None where it does not fit the type."""
    if value is None:
        return pa.nulls(rows, kind)
    try:
        return pa.repeat(pa.scalar(value, pa.string()), rows).cast(kind)
    except pa.ArrowException:
        return None


def _measure_file(dataset: Dataset, file: InputFile) -> FileFacts:
    place = dataset.root.child(file.path)
    if dataset.format != "parquet":
        return _scan_text(place, dataset.format)
    with place.fs.open_input_file(place.path) as stream:
        footer = pq.ParquetFile(stream)
        metadata = footer.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return FileFacts(
            footer.schema_arrow.remove_metadata(),
            np.cumsum([group.num_rows for group in groups], dtype=np.int64),
            None,
            sum(group.total_byte_size for group in groups),
        )


def _scan_text(place: Location, text_format: Format) -> FileFacts:
    """Count the rows of a file of lines and remember where every `TEXT_STRIDE`th one starts."""
    schema = BATCH_SCHEMA if text_format == "openai_batch" else pa.schema([])
    ends: list[np.ndarray] = []  # of rows that a shard may end with: their numbers, counted from 1, and
    places: list[np.ndarray] = []  # the bytes they end at
    rows = position = start = last = 0
    names: list[str] = []
    with place.fs.open_input_stream(place.path) as stream:
        for chunk in _whole_rows(stream, text_format):
            row_ends = _row_ends(np.frombuffer(chunk, dtype=np.uint8), text_format)
            end, data = int(row_ends[-1]) if len(row_ends) else 0, chunk
            if text_format == "csv" and len(row_ends) and not names:  # the header is no row
                start = int(row_ends[0])
                names = _csv_names(chunk[:start])
                schema = pa.schema([(name, pa.string()) for name in names])  # CSV has no types: columns stay text
                row_ends, data = row_ends[1:], chunk[start:]
            if len(row_ends):
                if text_format != "openai_batch":  # where a line that is no JSON is a row like another
                    table = _parse_csv(data, names) if text_format == "csv" else _parse_json(data, None)
                    if table.num_rows != len(row_ends):
                        raise pa.ArrowInvalid(_miscounted(text_format, len(row_ends), table.num_rows))
                    if text_format == "jsonl":
                        schema = pa.unify_schemas([schema, _text_for_dates(table.schema)], promote_options="permissive")
                row_ends = row_ends + position
                numbers = np.arange(rows + 1, rows + len(row_ends) + 1)
                stretches = row_ends // TEXT_STRIDE_BYTES
                cuts = (numbers % TEXT_STRIDE == 0) | (np.diff(stretches, prepend=last // TEXT_STRIDE_BYTES) > 0)
                ends.append(numbers[cuts])
                places.append(row_ends[cuts])
                rows, last = int(numbers[-1]), int(row_ends[-1])
            if chunk[end:].strip():
                raise pa.ArrowInvalid("a quote opens a field that never ends")
            position += len(chunk)
    if rows and (not len(ends[-1]) or ends[-1][-1] != rows):
        ends.append(np.array([rows]))
        places.append(np.array([last]))
    offsets = np.concatenate([np.array([start]), *places]).astype(np.int64)
    return FileFacts(schema, np.concatenate([np.empty(0), *ends]).astype(np.int64), offsets, last - start)


def _miscounted(text_format: Format, lines: int, found: int) -> str:
    if text_format == "jsonl":
        return f"{lines} lines hold {found} JSON objects; write one a line"
    return f"{lines} rows by its quotes, {found} by its fields; put fields that hold quotes in quotes, and double them"


def _whole_rows(stream: pa.NativeFile, text_format: Format, size: int = SCAN_BYTES) -> Iterable[bytes]:
    """The file in pieces of about `size` bytes that each end where a row does."""
    rest = b""
    while piece := stream.read(size):
        rest += piece
        row_ends = _row_ends(np.frombuffer(rest, dtype=np.uint8), text_format, blank_too=True)
        if len(row_ends):
            yield rest[: row_ends[-1]]
            rest = rest[row_ends[-1] :]
        elif len(rest) > MOST_ROW_BYTES:
            raise pa.ArrowInvalid(f"a row of more than {MOST_ROW_BYTES >> 20} MiB; is a quote missing?")
    if rest:
        yield rest + b"\n"


def _row_ends(data: np.ndarray, text_format: Format, blank_too: bool = False) -> np.ndarray:
    """Positions after the newlines that end a row. In CSV a newline inside quotes ends none; blank lines are no rows."""
    ends = np.flatnonzero(data == ord("\n")) + 1
    if text_format == "csv":
        quotes = np.cumsum(data == ord('"'), dtype=np.uint8)  # modulo 256, which keeps them odd or even
        ends = ends[quotes[ends - 1] % 2 == 0]
    if blank_too or not len(ends):
        return ends
    starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1]))
    if text_format != "csv":
        blank = np.maximum.reduceat(data[: ends[-1]], starts) <= ord(" ")
    else:
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
        pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer"),
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
        try:
            table = _read_parquet(place, wanted, schema)
        except UnicodeDecodeError as error:  # a damaged footer has names of any bytes
            raise pa.ArrowInvalid(f"{wanted.file}: {_one_line(error)}") from None
    else:
        with place.fs.open_input_file(place.path) as stream:
            stream.seek(wanted.offset)
            data = stream.read(wanted.length)
        if file_format == "csv":
            table = _parse_csv(data, _read_csv_names(place))
        else:
            table = _parse_json(data, schema) if file_format == "jsonl" else _parse_batch(data)
    if table.num_rows != wanted.rows:
        raise pa.ArrowInvalid(f"{wanted.file}: expected {wanted.rows} rows, found {table.num_rows}")
    return _conform(table, schema, partition_values(wanted.file), fill=file_format == "jsonl")


def _conform(table: pa.Table, schema: pa.Schema, from_path: dict[str, str | None], fill: bool) -> pa.Table:
    """The columns of `schema`, in its order and types; what the path says, or null, where the table lacks one.

    Where `fill`, what the path says also takes the place of nulls.
    """
    names = [name for name in schema.names if name in table.column_names]
    if any(table.schema.field(name).type != schema.field(name).type for name in names):
        table = table.take(
            pa.array(range(table.num_rows))
        )  # pyarrow's cast misreads slices of structs with null fields
    columns = []
    for field in schema:
        given = _constant(from_path.get(field.name), field.type, table.num_rows)
        if field.name not in names:
            columns.append(pa.nulls(table.num_rows, field.type) if given is None else given)
        elif fill and from_path.get(field.name) is not None and given is not None:
            columns.append(pc.coalesce(table[field.name], given))
        elif table.schema.field(field.name).type == field.type:
            columns.append(table[field.name])
        else:
            columns.append(table[field.name].cast(field.type))
    return pa.table(columns, schema=schema)


def _read_parquet(place: Location, wanted: RowRange, schema: pa.Schema) -> pa.Table:
    """Decode only the row groups that hold wanted rows, in batches, so a huge row group is never in memory whole."""
    with place.fs.open_input_file(place.path) as stream:
        file = pq.ParquetFile(
            stream,
            buffer_size=READ_BUFFER,
            pre_buffer=False,  # it would fetch column chunks whole, whatever the buffer's size
            page_checksum_verification=True,
        )
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
        at_once = max(16, min(READ_ROWS, wanted.rows))  # a shard of few rows has heavy ones
        for batch in file.iter_batches(batch_size=at_once, row_groups=groups, columns=names, use_threads=False):
            piece = batch.select(names).slice(skip, missing)  # asked for "a.b", it reads field b of a struct a too
            skip = max(0, skip - batch.num_rows)
            missing -= piece.num_rows
            if piece.num_rows:  # an empty slice would keep its batch in memory
                batches.append(piece)
            if not missing:
                break
        return pa.Table.from_batches(batches, pa.schema([file.schema_arrow.field(name) for name in names]))


def _read_csv_names(place: Location) -> list[str]:
    with place.fs.open_input_stream(place.path) as stream:
        start = next(iter(_whole_rows(stream, "csv", size=1 << 16)))
    return _csv_names(start[: _row_ends(np.frombuffer(start, dtype=np.uint8), "csv")[0]])


def _csv_names(header: bytes) -> list[str]:
    names: list[str] = pacsv.read_csv(
        pa.py_buffer(header), parse_options=pacsv.ParseOptions(newlines_in_values=True)
    ).column_names
    return names


def _parse_csv(data: bytes, names: list[str]) -> pa.Table:
    return pacsv.read_csv(
        pa.BufferReader(data),
        pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
        pacsv.ParseOptions(newlines_in_values=True),
        pacsv.ConvertOptions(column_types={name: pa.string() for name in names}),
    )


def _parse_batch(data: bytes) -> pa.Table:
    rows = [_parse_request(line) for line in data.split(b"\n") if line.strip(_BLANK)]
    columns = zip(*rows, strict=True) if rows else [()] * len(BATCH_SCHEMA)
    return pa.table([pa.array(list(column), pa.string()) for column in columns], schema=BATCH_SCHEMA)


def _parse_request(line: bytes) -> tuple[str | None, str | None, str | None, str | None]:
    """A line of a batch as a row of `BATCH_SCHEMA`; the line itself as its body where it is no JSON object."""
    text = line.decode("utf-8", "replace").strip()
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        return None, None, None, text
    texts = (request.get(name) for name in ("custom_id", "method", "url"))
    custom_id, method, url = (value if isinstance(value, str) and _storable(value) else None for value in texts)
    body = request.get("body")
    return custom_id, method, url, None if body is None else json.dumps(body)  # with escapes: all texts can be stored


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
