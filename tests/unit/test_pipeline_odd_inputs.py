"""Inputs as people have them: Hive directories, odd types and names, torn and damaged files, files of very many or very few rows."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from nanovllm import UserError
from pipelines.commit import parquet_bytes
from pipelines.inputs import FileFacts, InputFile, RowRange, list_dataset, measure, read_rows
from pipelines.job import JobConfig, build
from pipelines.plan import AUTO_BYTES, Shard, cut, make_shards
from pipelines.prompts import Prompts, check_prompt_value
from pipelines.row_values import RowError, column_values

REPOSITORY = Path(__file__).resolve().parents[2]
Content = bytes | pa.Table


def write(root: Path, files: Mapping[str, Content], **writer: object) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path, **writer)
    return str(root)


def read_all(address: str, most: int = 40, least: int = 3) -> pa.Table:
    """All rows as workers read them, shard by shard."""
    dataset = list_dataset(address)
    schema, facts = measure(dataset)
    shards = cut(dataset.files, facts, most, least)
    tables = [read_rows(dataset.root, dataset.format, shard.row_range, schema) for shard in shards]
    assert all(table.schema.equals(schema) for table in tables)
    whole = pa.concat_tables(tables)
    written = pq.read_table(pa.BufferReader(parquet_bytes(whole)))  # as the output carries them
    assert written.schema.equals(schema)
    assert written.equals(whole)
    return whole


def prompts(*values: str | None) -> pa.Table:
    return pa.table({"prompt": pa.array(values, pa.string())})


# Hive directories


def test_hive_directories_are_columns(tmp_path: Path) -> None:
    root = tmp_path / "above=the root"  # no partition
    table = read_all(
        write(
            root,
            {
                "date=2024-01-02/lang=de/x.parquet": prompts("a", "b"),
                "date=2024-01-02/lang=%C3%A9%20f%2Fg/x.parquet": prompts("c"),
                "date=2024-01-03/lang=__HIVE_DEFAULT_PARTITION__/x.parquet": prompts("d"),
                "date=2024-01-03/x.parquet": prompts("e"),
                "plain/=/x.parquet": prompts("f"),
                "_hidden/date=2024-01-04/x.parquet": prompts("never read"),
            },
        )
    )
    assert table.schema == pa.schema([("prompt", pa.string()), ("date", pa.string()), ("lang", pa.string())])
    assert sorted(map(tuple, (row.values() for row in table.to_pylist())), key=str) == [
        ("a", "2024-01-02", "de"),
        ("b", "2024-01-02", "de"),
        ("c", "2024-01-02", "é f/g"),
        ("d", "2024-01-03", None),
        ("e", "2024-01-03", None),
        ("f", None, None),
    ]
    (below,) = list_dataset(str(root / "date=2024-01-02" / "lang=de")).files
    assert below.path == "x.parquet"
    assert read_all(str(root / "date=2024-01-02")).schema.names == ["prompt", "lang"]
    assert read_all(str(root / "date=*" / "lang=de" / "*.parquet")).schema.names == ["prompt", "date", "lang"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "2"], [1, 2]),
        (["007", "-5"], [7, -5]),
        (["1", "__HIVE_DEFAULT_PARTITION__"], [1, None]),
        (["1", str(2**40)], [1, 2**40]),  # pyarrow.dataset has int32 and strings only
        (["1", str(2**63)], None),
        (["1", "+2"], None),
        (["1", "2.5"], None),
        (["1", "a=b"], None),
        (["1", " 2"], None),
        (["1", ""], None),
    ],
)
def test_hive_values_are_numbers_where_all_are(
    tmp_path: Path, values: list[str], expected: list[object] | None
) -> None:
    address = write(tmp_path, {f"k={value}/x.parquet": prompts(value) for value in values})
    table = read_all(address)
    assert table.schema.field("k").type == (pa.string() if expected is None else pa.int64())
    wanted = dict(zip(values, expected or values, strict=True))
    assert {row["prompt"]: row["k"] for row in table.to_pylist()} == wanted
    theirs = pads.dataset(address, partitioning="hive").to_table()
    if str(2**40) not in values:
        assert {row["prompt"]: row["k"] for row in theirs.to_pylist()} == wanted


def test_a_files_own_column_wins_over_its_path(tmp_path: Path) -> None:
    own = pa.table({"k": pa.array([70], pa.int16()), "prompt": ["own"]})
    table = read_all(write(tmp_path / "a", {"k=1/x.parquet": own, "k=2/x.parquet": prompts("path")}))
    assert table.schema == pa.schema([("k", pa.int16()), ("prompt", pa.string())])
    assert table.to_pylist() == [{"k": 70, "prompt": "own"}, {"k": 2, "prompt": "path"}]
    with pytest.raises(UserError, match=r"the directory of 'k=many/x\.parquet' says k=many, which is no int16"):
        read_all(write(tmp_path / "a", {"k=many/x.parquet": prompts("z")}))


def test_hive_directories_of_text_files(tmp_path: Path) -> None:
    lines = b"".join(b'{"prompt": "%d"%s}\n' % (n, b', "k": 70' if n == 30 else b"") for n in range(50))
    table = read_all(write(tmp_path / "j", {"k=1/x.jsonl": lines, "k=2/m=q/x.jsonl": b'{"prompt": "last"}'}))
    assert table.schema == pa.schema([("prompt", pa.string()), ("k", pa.int64()), ("m", pa.string())])
    assert table["k"].to_pylist() == [1] * 30 + [70] + [1] * 19 + [2]
    assert table["m"].to_pylist() == [None] * 50 + ["q"]
    csv = read_all(write(tmp_path / "c", {"k=1/x.csv": b"prompt\na\n", "k=2/x.csv": b"prompt,k\nb,007\n"}))
    assert csv.to_pylist() == [{"prompt": "a", "k": "1"}, {"prompt": "b", "k": "007"}]


def test_a_hive_column_can_be_the_prompt(tmp_path: Path) -> None:
    dataset = list_dataset(write(tmp_path, {"text=hello%20you/x.parquet": pa.table({"id": [1, 2, 3]})}))
    schema, facts = measure(dataset)
    config = build({"model": "m", "input": "i", "output": "o", "prompt": {"column": "text"}})
    assert Prompts(config.prompt, schema).columns == ["text"]
    (shard,) = make_shards(config, dataset.files, facts)
    table = read_rows(dataset.root, "parquet", shard.row_range, pa.schema([schema.field("text")]))
    assert table.to_pydict() == {"text": ["hello you"] * 3}


# Types, names and schemas


def test_every_type_is_carried_through(tmp_path: Path) -> None:
    utc = datetime(2024, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)
    columns = {
        "prompt": pa.array(["a", None, ""], pa.large_string()),
        "structs": pa.array(
            [[{"x": 1, "y": None}, None], [], None], pa.list_(pa.struct([("x", pa.int8()), ("y", pa.null())]))
        ),
        "map": pa.array([[("k", 1.5)], [], None], pa.map_(pa.string(), pa.float32())),
        "struct": pa.array(
            [{"a": {"b": [None]}}, None, {"a": None}], pa.struct([("a", pa.struct([("b", pa.list_(pa.int64()))]))])
        ),
        "dictionary": pa.array(["p", None, "p"]).dictionary_encode(),
        "decimal": pa.array([Decimal("1.10"), None, Decimal("-99999.99")], pa.decimal128(20, 2)),
        "zoned": pa.array([utc, None, utc], pa.timestamp("us", tz="Europe/Berlin")),
        "naive": pa.array([1, None, 3], pa.timestamp("ns")),
        "date": pa.array([date(2024, 1, 2), None, date(1, 1, 1)]),
        "time": pa.array([1, None, 2], pa.time64("us")),
        "duration": pa.array([1, None, 2], pa.duration("ms")),
        "binary": pa.array([b"\x00\xff", None, b""]),
        "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
        "large_list": pa.array([[1], None, []], pa.large_list(pa.int32())),
        "fixed_list": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int32(), 2)),
        "bool": pa.array([True, None, False]),
        "half": pa.array(np.array([1, 2, 3], np.float16)),
        "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
        "null": pa.nulls(3),
        "a.b": pa.array([1, 2, 3]),
        "a": pa.array([4, 5, 6]),
        "größe in % #1/2": pa.array([7, 8, 9]),
    }
    source = pa.table(columns)
    table = read_all(write(tmp_path, {"ä b%20c#d/ü 100%.parquet": source}, row_group_size=2), most=2, least=1)
    assert table.equals(source)
    assert table.schema == source.schema


def test_schemas_that_differ(tmp_path: Path) -> None:
    strict = pa.schema([pa.field("prompt", pa.string()), pa.field("must", pa.int32(), nullable=False)])
    table = read_all(
        write(
            tmp_path,
            {
                "a.parquet": pa.table([pa.array(["a"]), pa.array([1], pa.int32())], schema=strict),
                "b.parquet": pa.table({"must": pa.array([2**40]), "prompt": ["b"], "more": [0.5]}),
                "c.parquet": pa.table({"prompt": pa.array(["c"]).dictionary_encode()}),
                "d.parquet": pa.table({"prompt": pa.nulls(1)}),
                "e.parquet": pa.table({"prompt": pa.array([], pa.string()), "only in no row": pa.array([], pa.int8())}),
            },
        )
    )
    assert table.schema.types == [pa.string(), pa.int64(), pa.float64(), pa.int8()]
    assert table.to_pydict() == {
        "prompt": ["a", "b", "c", None],
        "must": [1, 2**40, None, None],
        "more": [None, 0.5, None, None],
        "only in no row": [None] * 4,
    }
    write(tmp_path, {"f.parquet": pa.table({"prompt": ["f"], "more": [["x"]]})})
    with pytest.raises(UserError, match=r"columns of 'f\.parquet' contradict those of 'b\.parquet': .*more"):
        measure(list_dataset(str(tmp_path)))


def test_a_column_that_may_not_be_null_is_null_where_a_file_lacks_it(tmp_path: Path) -> None:
    strict = pa.schema([pa.field("prompt", pa.string()), pa.field("must", pa.int32(), nullable=False)])
    full = pa.table([pa.array(["a"]), pa.array([1], pa.int32())], schema=strict)
    assert read_all(write(tmp_path, {"a.parquet": full})).schema == strict
    assert read_all(write(tmp_path, {"b.parquet": prompts("b")}))["must"].to_pylist() == [1, None]


def test_a_column_with_the_name_of_a_struct_field(tmp_path: Path) -> None:
    address = write(tmp_path, {"x.parquet": pa.table({"a": [{"b": "wrong"}], "a.b": ["right"]})})
    wanted, schema = RowRange("x.parquet", 0, 1, 0, 0), pa.schema([("a.b", pa.string())])
    assert read_rows(list_dataset(address).root, "parquet", wanted, schema).to_pydict() == {"a.b": ["right"]}


def test_a_path_that_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    address = write(tmp_path / "[old] *", {"what?.parquet": prompts("a")})
    assert read_all(address)["prompt"].to_pylist() == ["a"]
    assert read_all(address + "/what?.parquet")["prompt"].to_pylist() == ["a"]


def test_prompts_that_are_no_text_are_error_rows() -> None:
    broken = pa.array([b"fine", b"\xff\xfe", None]).view(pa.string())
    for column in (broken, pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), broken)):
        values = column_values(pa.chunked_array([column]))
        assert check_prompt_value(values[0]) == "fine"
        for value, message in ((values[1], "not valid UTF-8"), (values[2], "null")):
            with pytest.raises(RowError, match=message):
                check_prompt_value(value)


# CSV and JSONL


def test_awkward_csv(tmp_path: Path) -> None:
    head = b'\xef\xbb\xbf"prompt","n, x"\r\n'
    rows = b'"a\r\n\r\nb ""c""",1\r\n\r\n"",2\r\n,"3"\r\nNULL,4\r\n  ,5\r\n' + "é\u2028ü".encode() + b",6\r\nlast,7"
    table = read_all(write(tmp_path, {"a.csv": head + rows, "b.csv": b"", "c.csv": b"prompt\n"}))
    assert table["prompt"].to_pylist() == ['a\r\n\r\nb "c"', "", "", "NULL", "  ", "é\u2028ü", "last"]
    assert table["n, x"].to_pylist() == list("1234567")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'prompt,n\na,1\n5" disk,2\nb,3\n', "a quote opens a field that never ends"),
        (b'prompt,n\na,1\n5" disk,2\nb,3\n6" disk,4\n', "2 rows by its quotes, 4 by its fields"),
        (b"prompt,n\na,1\nb\n", "Expected 2 columns, got 1"),
        (b"prompt,n\n\xff,1\n", "invalid UTF8"),
        (b"prompt,prompt\na,b\n", "several columns named 'prompt'"),
    ],
)
def test_csv_that_would_lose_rows_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        measure(list_dataset(write(tmp_path, {"good.csv": b"prompt,n\na,1\n", "odd.csv": text})))
    assert "'odd.csv'" in str(caught.value)


def test_awkward_jsonl(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    rows = [
        {"prompt": "a\nb\u2028é😀", "deep": {"r": [{"s": 1}, None]}},
        {"prompt": None, "deep": None},
        {"prompt": "", "deep": {"r": [{"t": "2020-01-01"}]}},
        {"prompt": long},
        {"deep": {}},
    ]
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows)]
    text = "\ufeff" + "\r\n \t \r\n\r\n".join(lines)  # no newline at the end
    table = read_all(write(tmp_path, {"a.jsonl": text.encode(), "b.jsonl": b"\n  \n", "c.jsonl": b""}), most=2, least=1)
    assert table["prompt"].to_pylist() == ["a\nb\u2028é😀", None, "", long, None]
    assert table["deep"].to_pylist() == [
        {"r": [{"s": 1, "t": None}, None]},
        None,
        {"r": [{"s": None, "t": "2020-01-01"}]},
        None,
        {"r": None},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"prompt": "a"}{"prompt": "b"}\n', "1 lines hold 2 JSON objects"),
        (b'{\n"prompt": "a"\n}\n', "lines hold|JSON parse error"),
        (b'["a"]\n', "JSON parse error"),
        (b'{"prompt": "a"}\n{"prompt": "b', "JSON parse error"),
        (b'{"prompt": "a"}\n{"prompt": 1}\n', "changed from string to number"),
    ],
)
def test_jsonl_that_is_none_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        measure(list_dataset(write(tmp_path, {"odd.jsonl": text})))
    assert "'odd.jsonl'" in str(caught.value)


def test_long_lines_are_cut_oftener(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * 600_000}).encode() + b"\n"
    dataset = list_dataset(write(tmp_path, {"a.jsonl": line * 16}))
    _, facts = measure(dataset)
    shards = list(cut(dataset.files, facts, 1000, 1000, most_bytes=2 << 20))
    assert sum(shard.rows for shard in shards) == 16
    assert max(shard.length for shard in shards) <= 3 << 20


# Torn and damaged files


def damaged(path: Path, group: int, column: int) -> bytes:
    """The file with the pages of one column chunk overwritten; its footer and its size stay as they are."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xa5" * chunk.total_compressed_size
    return bytes(data)


def test_a_damaged_row_group_spoils_its_own_rows_only(tmp_path: Path) -> None:
    table = pa.table({"id": range(300), "prompt": [f"row {n}" for n in range(300)]})
    dataset = list_dataset(write(tmp_path, {"a.parquet": table}, row_group_size=100))
    schema, facts = measure(dataset)
    shards = list(cut(dataset.files, facts, 50, 50))
    (tmp_path / "a.parquet").write_bytes(damaged(tmp_path / "a.parquet", 1, 1))
    for shard in shards:
        if 100 <= shard.first_row < 200:
            with pytest.raises((OSError, pa.ArrowException)):
                read_rows(dataset.root, "parquet", shard.row_range, schema)
        else:
            rows = read_rows(dataset.root, "parquet", shard.row_range, schema)
            assert rows.equals(table.slice(shard.first_row, shard.rows))
    # Another column's damage is no matter where only the prompt is wanted.
    ids = pa.schema([schema.field("id")])
    assert read_rows(dataset.root, "parquet", RowRange("a.parquet", 100, 100, 0, 0), ids).num_rows == 100


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"row {n}" for n in range(100)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    dataset = list_dataset(write(tmp_path, {"a.parquet": table}, **options))
    schema, _ = measure(dataset)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[data.index(b"row 50")] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum"):
        read_rows(dataset.root, "parquet", RowRange("a.parquet", 0, 100, 0, 0), schema)


def test_random_damage_is_an_error_or_rows_and_never_something_else(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"row {n % 7}" for n in range(500)], "l": [[n] for n in range(500)]})
    dataset = list_dataset(write(tmp_path, {"a.parquet": table}, row_group_size=250))
    schema, _ = measure(dataset)
    good = (tmp_path / "a.parquet").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good)
        for place in rng.integers(4, len(good), 3):
            data[place] = rng.integers(256)
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            rows = read_rows(dataset.root, "parquet", RowRange("a.parquet", 100, 300, 0, 0), schema)
        except (OSError, pa.ArrowException):
            continue
        assert rows.num_rows == 300
        assert len(column_values(rows["prompt"])) == 300


@pytest.mark.parametrize("length", [0, 3, 100, -1, -9])
def test_a_torn_parquet_file_is_refused(tmp_path: Path, length: int) -> None:
    write(tmp_path, {"a.parquet": prompts("a"), "torn.parquet": prompts("b")})
    data = (tmp_path / "torn.parquet").read_bytes()
    (tmp_path / "torn.parquet").write_bytes(data[:length])
    with pytest.raises(UserError, match=r"'torn\.parquet' is not readable parquet"):
        measure(list_dataset(str(tmp_path)))


# Many rows and few


def settings(**run: object) -> JobConfig:
    return build({"model": "m", "input": "i", "output": "o", "run": run})


def plan(address: str, **run: object) -> list[Shard]:
    dataset = list_dataset(address)
    return make_shards(settings(**run), dataset.files, measure(dataset)[1])


def test_ten_million_rows_in_one_file(tmp_path: Path) -> None:
    rows, group = 10_000_000, 1_000_000
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(group, np.int8)), ["the same prompt"])
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("n", pa.int32()), ("prompt", text.type)])) as writer:
        for start in range(0, rows, group):
            numbers = pa.array(np.arange(start, start + group, dtype=np.int32))
            writer.write_table(pa.table({"n": numbers, "prompt": text}), row_group_size=group)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shards = plan(str(tmp_path))
    assert sum(shard.rows for shard in shards) == rows
    assert len(shards) < 20_000
    dataset = list_dataset(str(tmp_path))
    schema, _ = measure(dataset)
    pool = pa.default_memory_pool()
    held = pool.bytes_allocated()
    for shard in (shards[0], shards[len(shards) // 2], shards[-1]):
        table = read_rows(dataset.root, "parquet", shard.row_range, schema)
        assert table["n"].to_pylist() == list(range(shard.first_row, shard.first_row + shard.rows))
        del table
        assert pool.bytes_allocated() - held < 10 << 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 200  # MiB; the rows are 400


READ_THE_END = """
import sys
import pyarrow as pa
from pipelines.inputs import RowRange, list_dataset, measure, read_rows
dataset = list_dataset(sys.argv[1])
schema, (facts,) = measure(dataset)
table = read_rows(dataset.root, "parquet", RowRange(dataset.files[0].path, facts.rows - 100, 100, 0, 0), schema)
print(table["n"].to_pylist()[-1], pa.default_memory_pool().max_memory() >> 20)
"""


def test_reading_the_end_of_a_long_row_group_holds_little(tmp_path: Path) -> None:
    rows = 100_000
    table = pa.table({"n": range(rows), "prompt": [f"{n:0500d}" for n in range(rows)]})  # 50 MB in one row group
    write(tmp_path, {"a.parquet": table}, row_group_size=rows, compression="none", use_dictionary=False)
    command = [sys.executable, "-c", READ_THE_END, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    last, held_mib = map(int, done.stdout.split())
    assert last == rows - 1
    assert held_mib < 25


def test_row_groups_of_one_row(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"row {n}" for n in range(10_000)]})
    address = write(tmp_path, {"a.parquet": table}, row_group_size=1)
    shards = plan(address)
    assert sum(shard.rows for shard in shards) == 10_000
    assert len(shards) < 60
    dataset = list_dataset(address)
    rows = read_rows(dataset.root, "parquet", shards[-2].row_range, table.schema)
    assert rows.equals(table.slice(shards[-2].first_row, shards[-2].rows))


def test_files_of_one_row_among_empty_ones(tmp_path: Path) -> None:
    files = {f"{n:03d}.parquet": prompts(str(n)) if n % 3 == 1 else prompts() for n in range(200)}
    shards = plan(write(tmp_path, files))
    assert [shard.file for shard in shards] == [name for n, name in enumerate(files) if n % 3 == 1]
    assert read_all(str(tmp_path))["prompt"].to_pylist() == [str(n) for n in range(200) if n % 3 == 1]


def test_auto_shards_hold_no_more_than_memory_does(tmp_path: Path) -> None:
    def shards(rows: int, size: int, files: int = 1, **run: object) -> list[Shard]:
        fact = FileFacts(pa.schema([]), np.array([rows]), None, size)
        return make_shards(settings(**run), [InputFile(f"f{n}", 1, 0) for n in range(files)], [fact] * files)

    light = shards(50_000, 50_000 * 100)
    assert max(shard.rows for shard in light) == 1000
    heavy = shards(50_000, 50_000 << 20)  # a MiB a row
    assert max(shard.rows for shard in heavy) == 256 == AUTO_BYTES >> 20
    assert shards(50_000, 50_000 << 20, shard_rows=700)[0].rows == 700
    assert [shard.rows for shard in shards(3, 3 << 30)] == [1, 1, 1]  # rows of a GiB
    many = shards(100_000, 100_000 * 100, files=10_000)  # a billion rows
    assert 30_000 < len(many) < 55_000
    assert max(shard.rows for shard in many) <= 32_768
    assert sum(shard.rows for shard in many) == 10**9


def test_shard_rows_is_a_number_or_auto() -> None:
    assert settings().run.shard_rows == "auto"
    assert settings(shard_rows=7).run.shard_rows == 7
    for wrong in (0, -1, "many", 1.5, True, [1, 2]):
        with pytest.raises(UserError, match=r"run\.shard_rows=.*must be a number of rows of at least 1, or auto"):
            settings(shard_rows=wrong)


def test_a_hundred_files_share_one_schema(tmp_path: Path) -> None:
    _, facts = measure(list_dataset(write(tmp_path, {f"{n:03d}.parquet": prompts("a") for n in range(100)})))
    assert len({id(fact.schema) for fact in facts}) == 1


def test_a_file_written_again_with_as_many_bytes_is_noticed(tmp_path: Path) -> None:
    (shard,) = plan(write(tmp_path, {"a.parquet": prompts("a")}))
    assert shard.mtime_ns == os.stat(tmp_path / "a.parquet").st_mtime_ns
