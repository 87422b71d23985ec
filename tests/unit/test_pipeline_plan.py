"""Plans: every row of every file exactly once, in order, in shards that shrink towards the end; identities name what differs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import UserError
from pipelines import plan
from pipelines.inputs import FileFacts, InputFile, list_dataset, measure
from pipelines.job import build
from pipelines.plan import (
    Shard,
    cut,
    files_from_table,
    files_to_table,
    identity,
    make_shards,
    shards_from_table,
    shards_to_table,
)

SCHEMA = pa.schema([("prompt", pa.string())])


def facts_of(groups: list[int]) -> FileFacts:
    return FileFacts(SCHEMA, np.cumsum(groups, dtype=np.int64).tolist(), None)


def cut_groups(files: list[list[int]], most: int, least: int) -> list[Shard]:
    listed = [InputFile(f"f{number}", 1, 0) for number in range(len(files))]
    return list(cut(listed, [facts_of(groups) for groups in files], most, least))


@given(
    files=st.lists(st.lists(st.integers(0, 3000), max_size=6), min_size=1, max_size=6),
    most=st.integers(1, 1200),
    least=st.integers(1, 300),
)
@settings(max_examples=100, deadline=None)
def test_every_row_is_in_one_shard_and_in_order(files: list[list[int]], most: int, least: int) -> None:
    least = min(least, most)
    shards = cut_groups(files, most, least)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for number, groups in enumerate(files):
        position = 0
        for shard in (shard for shard in shards if shard.file == f"f{number}"):
            assert shard.first_row == position
            assert 1 <= shard.rows <= most + most // 4
            position += shard.rows
        assert position == sum(groups)
    assert [shard.file for shard in shards] == sorted(shard.file for shard in shards)


def test_shards_taper() -> None:
    shards = cut_groups([[100_000]], 1000, 50)
    sizes = [shard.rows for shard in shards]
    assert sizes[:70] == [1000] * 70
    assert all(late <= early for early, late in pairwise(sizes[:-1]))
    assert sum(sizes[-3:]) <= 200
    assert len(shards) < 250


def test_shards_end_with_row_groups_where_they_fit() -> None:
    shards = cut_groups([[900] * 200], 1000, 50)
    ends = {shard.first_row + shard.rows for shard in shards[:100]}
    assert ends <= set(range(900, 900 * 201, 900))


def test_one_huge_row_group_is_cut() -> None:
    assert len(cut_groups([[1_000_000]], 1000, 128)) > 1000


def test_plan_survives_its_file() -> None:
    shards = cut_groups([[10, 20], [5]], 7, 2)
    assert shards_from_table(shards_to_table(shards)) == shards


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 500])
def test_text_shards_have_the_bytes_of_their_rows(tmp_path: Path, name: str, rows: int) -> None:
    from pipelines.inputs import read_rows

    prompts = [f'row {i}, "quoted"\nsecond line é' if i % 5 == 0 else f"row {i}" for i in range(rows)]
    if name.endswith("jsonl"):
        import json

        text = "".join(
            json.dumps({"prompt": p, "n": i}) + ("\n\n" if i % 7 == 0 else "\n") for i, p in enumerate(prompts)
        )
        text = text.rstrip("\n")  # the last line need not end
    else:
        text = "prompt,n\n" + "".join('"' + p.replace('"', '""') + f'",{i:03d}\n' for i, p in enumerate(prompts))
    (tmp_path / name).write_text(text)
    dataset = list_dataset(str(tmp_path / name))
    schema, facts = measure(dataset)
    shards = list(cut(dataset.files, facts, 40, 3))
    tables = [read_rows(dataset.root, dataset.format, shard.row_range, schema) for shard in shards]
    table = pa.concat_tables(tables)
    assert table["prompt"].to_pylist() == prompts
    numbers = [f"{i:03d}" for i in range(rows)] if name.endswith("csv") else list(range(rows))
    assert table["n"].to_pylist() == numbers


def test_json_strings_that_look_like_dates_stay_strings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "2020-01-01 00:00:00", "when": ["2020-01-01"]}\n')
    schema, _ = measure(list_dataset(str(tmp_path)))
    assert schema.field("prompt").type == pa.string()
    assert schema.field("when").type == pa.list_(pa.string())


def test_listing_skips_hidden_files_and_follows_globs(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"]})
    for name in ("b/two.parquet", "a/one.parquet", "_tmp/x.parquet", ".h.parquet", "a/_SUCCESS", "three.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name)
    paths = [file.path for file in list_dataset(str(tmp_path)).files]
    assert paths == ["a/one.parquet", "b/two.parquet", "three.parquet"]
    assert [f.path for f in list_dataset(str(tmp_path / "*" / "*.parquet")).files] == ["a/one.parquet", "b/two.parquet"]
    assert [f.path for f in list_dataset(str(tmp_path / "**" / "[ot]*.parquet")).files] == [
        "a/one.parquet",
        "b/two.parquet",
        "three.parquet",
    ]
    assert [f.path for f in list_dataset(str(tmp_path / "th?ee.parquet")).files] == ["three.parquet"]


def test_files_without_ending_are_known_by_their_content(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "000000_0")
    assert list_dataset(str(tmp_path)).format == "parquet"
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes.txt"):
        list_dataset(str(tmp_path))


def test_schemas_are_unified_or_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "n": pa.array([1], pa.int32())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "n": pa.array([1], pa.int64()), "more": [1.0]}), tmp_path / "b.parquet")
    schema, _ = measure(list_dataset(str(tmp_path)))
    assert schema == pa.schema([("prompt", pa.string()), ("n", pa.int64()), ("more", pa.float64())])
    pq.write_table(pa.table({"prompt": [[1]]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet.*contradict"):
        measure(list_dataset(str(tmp_path)))


def make_dataset(path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["c"]}), path / "b.parquet")


def test_identity_names_what_differs(tmp_path: Path) -> None:
    source, model = tmp_path / "in", tmp_path / "model"
    source.mkdir()
    model.mkdir()
    make_dataset(source)
    (model / "config.json").write_text("{}")
    base = {"model": str(model), "input": str(source), "output": "out"}

    def now(**changes: object) -> dict[str, object]:
        return identity(build({**base, **changes}), list_dataset(str(source)))

    def differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
        return plan.differences(before, now, lambda: files_before, list_dataset(str(source)).files)

    before = now()
    files_before = files_from_table(files_to_table(list_dataset(str(source)).files))
    assert differences(before, now()) == []
    assert differences(before, now(run={"replicas": 3, "shard_rows": 7}, engine={"max_num_seqs": 4})) == []
    assert differences(before, now(output="elsewhere")) == []
    assert differences(before, now(sampling={"temperature": 0.7})) == ["sampling.temperature was 1.0, is 0.7"]
    schemas = [{"properties": {name: {} for name in names}} for names in ("ab", "ba")]  # generated in this order
    one, other = (now(sampling={"structured_outputs": {"json": schema}}) for schema in schemas)
    assert differences(one, one) == []
    assert [text.split(" was ")[0] for text in differences(one, other)] == ["sampling.structured_outputs"]
    assert differences(before, now(run={"dedupe": True}, sampling={"temperature": 0})) == [
        "sampling.temperature was 1.0, is 0.0"
    ]
    assert differences(before, now(columns={"samples": "rows"})) == ["columns.samples was 'list', is 'rows'"]
    assert differences(before, now(run={"seed": 2})) == ["run.seed was 0, is 2"]
    assert differences(before, now(engine={"dtype": "float32"})) == ["engine.dtype was 'auto', is 'float32'"]
    assert differences(before, now(prompt={"too_long": "truncate_left"}, columns={"prefix": "x"})) == [
        "columns.prefix was '', is 'x'",
        "prompt.too_long was 'error', is 'truncate_left'",
    ]
    (model / "config.json").write_text("[]")
    assert differences(before, now())[0].startswith("model was 'model (content ")
    (model / "config.json").write_text("{}")
    assert differences(before, now()) == []
    (source / "c.parquet").write_bytes((source / "b.parquet").read_bytes())
    assert differences(before, now()) == ["input file 'c.parquet' is new"]
    (source / "c.parquet").unlink()
    pq.write_table(pa.table({"prompt": ["other"]}), source / "b.parquet")
    assert differences(before, now())[0].startswith("input file 'b.parquet' has changed since")
    (source / "b.parquet").unlink()
    assert differences(before, now()) == ["input file 'b.parquet' is gone"]


def test_smallest_shards_keep_the_engine_full() -> None:
    """Of a shard's rows only the longest are left for most of the time that it is in flight."""
    config = build({"model": "m", "input": "i", "output": "o", "engine": {"max_num_seqs": 100}})
    shards = make_shards(config, [InputFile("a", 1, 0)], [facts_of([5000])])
    assert max(shard.rows for shard in shards) > min(shard.rows for shard in shards[:-1])
    assert min(shard.rows for shard in shards[:-1]) * config.run.shards_in_flight >= 8 * 100


def test_samples_count_as_rows_do() -> None:
    """A shard of a job with n samples is as much work as one of a job without, and no engine drains for it."""
    file = InputFile("f", 1, 0)
    one, many = (
        make_shards(
            build({"model": "m", "input": "i", "output": "o", "sampling": {"n": n}, "engine": {"max_num_seqs": 64}}),
            [file],
            [facts_of([80_000])],
        )
        for n in (1, 8)
    )
    assert (max(shard.rows for shard in one), max(shard.rows for shard in many)) == (1000, 125)
    assert min(shard.rows for shard in one[:-1]) / 8 <= min(shard.rows for shard in many[:-1]) <= 20
    assert sum(shard.rows for shard in many) == 80_000
