"""Columns of the output: which there are, one schema whatever the rows hold, and nothing lost on the way through a journal."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovllm import RequestOutput, SamplingParams, UserError
from nanovllm.outputs import Logprob, error_output
from pipelines.columns import OutputColumns, check_names, choose_columns
from pipelines.commit import Journal, read_journal
from pipelines.counts import Counts, count_rows
from pipelines.job import ColumnsConfig
from pipelines.results import failed_row, results_from_table, results_to_table, row_result
from pipelines.storage import resolve

TOKENS = [{7: Logprob(-0.5, 1, "a")}, {9: Logprob(-2.0, 3, "b"), 7: Logprob(-0.25, 1, "a"), 8: Logprob(-1.0, 2, None)}]


def output(text: str, tokens: int = 2, **more: Any) -> RequestOutput:
    made = RequestOutput(
        text=text,
        token_ids=[9] * tokens,
        finish_reason="stop",
        num_input_tokens=3,
        num_generated_tokens=tokens,
        num_cached_tokens=1,
        logprobs=None,
        error=None,
    )
    made.update(more)  # type: ignore[typeddict-item]
    return made


LABELLED = output("yes", 0, label="yes", label_logprob=-0.125, label_probs={"no": 0.25, "yes": 0.75})
RICH = output("a", logprobs=TOKENS, prompt_logprobs=[None, *TOKENS], parsed='{"a":1}', reasoning_text="because")
SAMPLES = output("first", 2) | {"outputs": [output("first", 2), output("second", 5)], "num_generated_tokens": 7}
HALF = output("first", 2) | {"outputs": [output("first", 2), error_output("token 3 was sampled", 3)]}


def columns(
    sampling: dict[str, Any] | None = None, reasoning: bool = False, per_row: frozenset[str] = frozenset(), **more: Any
) -> OutputColumns:
    return choose_columns(ColumnsConfig(**more), SamplingParams(**sampling or {}), reasoning, per_row)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist(maps_as_pydicts="strict")  # type: ignore[no-any-return]


def test_a_journal_keeps_all_of_a_result(tmp_path: Path) -> None:
    rows = [
        row_result(made) for made in (output("plain"), LABELLED, RICH, SAMPLES, HALF, error_output("too long", 900))
    ]
    rows.append(failed_row("poison"))
    assert results_from_table(results_to_table(rows)) == rows
    assert results_from_table(results_to_table([])) == []
    place = resolve(str(tmp_path / uuid.uuid4().hex))
    journal = Journal(place)
    for position, row in enumerate(rows):
        journal.add(position, row)
        if position % 2:  # several records
            journal.flush()
    journal.flush()
    journal.close()
    assert read_journal(place, len(rows)) == dict(enumerate(rows))
    schemas = {str(results_to_table(some).schema) for some in (rows, rows[:1], rows[-1:], [])}
    assert len(schemas) == 1
    # What comes out of a journal fills the columns as what never was in one.
    wide = columns(
        {"logprobs": 2, "prompt_logprobs": 2, "labels": ["yes", "no"], "structured_outputs": {"regex": "a"}}, True
    )
    kept = read_journal(place, len(rows))
    singles = [position for position, row in enumerate(rows) if len(row.samples) == 1]
    assert wide.table([kept[row] for row in singles]).equals(wide.table([rows[row] for row in singles]))


def test_columns_are_those_asked_for_in_the_order_of_the_contract() -> None:
    always = ["generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens", "error"]
    assert columns().schema.names == always
    labels = ["label", "label_logprob", "label_probs"]
    everything = [
        *always,
        "num_cached_tokens",
        "parsed",
        *labels,
        "reasoning_text",
        "logprobs",
        "prompt_logprobs",
        "sample_index",
    ]
    asked = {"structured_outputs": {"regex": "a"}, "labels": ["a", "b"], "logprobs": 0, "prompt_logprobs": 0, "n": 2}
    wide = columns(asked, True, num_cached_tokens=True, samples="rows", prefix="x_")
    assert wide.schema.names == ["x_" + name for name in everything]
    assert columns({"structured_outputs": {"regex": "a"}}).schema.names == [*always, "parsed"]
    assert columns({"labels": ["a", "b"]}).schema.names == [*always, *labels]
    assert columns(reasoning=True).schema.names == [*always, "reasoning_text"]
    assert columns(per_row=frozenset({"logprobs", "temperature"})).schema.names == [*always, "logprobs"]
    assert columns(per_row=frozenset({"n"})).schema.field("generated_text").type == pa.list_(pa.string())


@pytest.mark.parametrize("sampling", [{}, {"n": 3}])
@pytest.mark.parametrize("form", ["list", "rows"])
@pytest.mark.parametrize("per_row", [frozenset(), frozenset({"labels", "logprobs"})])
def test_one_schema_whatever_the_rows_hold(
    sampling: dict[str, Any], form: str, per_row: frozenset[str], tmp_path: Path
) -> None:
    asked = {"labels": ["yes", "no"], "structured_outputs": {"regex": "a"}, "prompt_logprobs": 1, **sampling}
    wide = columns(asked, True, per_row, samples=form)
    many = [
        output(
            "t",
            logprobs=TOKENS,
            prompt_logprobs=[None, *TOKENS],
            **{key: LABELLED[key] for key in ("label", "label_probs")},
        )
    ] * wide.n  # type: ignore[literal-required]
    good = row_result({**many[0], "outputs": many} if wide.n > 1 else many[0])
    paths = []
    for rows in ([], [good], [failed_row("e")], [failed_row("e"), good, failed_row("e")]):
        table = wide.table(rows)
        assert table.schema == wide.schema
        assert table.num_rows == len(rows) * wide.rows_each
        paths.append(tmp_path / f"{len(paths)}.parquet")
        pq.write_table(table, paths[-1])
    schemas = [pq.read_schema(path) for path in paths]
    assert all(schema == schemas[0] for schema in schemas)
    read = pq.read_table(paths)
    assert read["error"].to_pylist().count("e") == 3 * wide.rows_each
    kind = read.schema.field("label_probs").type
    kind = kind.value_type if wide.lists else kind
    assert kind == (
        pa.map_(pa.string(), pa.float64()) if per_row else pa.struct([("yes", pa.float64()), ("no", pa.float64())])
    )


def test_what_the_columns_say() -> None:
    table = columns({"labels": ["yes", "no"]}).table([row_result(LABELLED), failed_row("bad")])
    assert rows_of(table.select(["generated_text", "label", "label_logprob", "label_probs", "error"])) == [
        {
            "generated_text": "yes",
            "label": "yes",
            "label_logprob": -0.125,
            "label_probs": {"yes": 0.75, "no": 0.25},
            "error": None,
        },
        {"generated_text": None, "label": None, "label_logprob": None, "label_probs": None, "error": "bad"},
    ]
    per_row = columns(per_row=frozenset({"labels"})).table([row_result(LABELLED), row_result(output("free"))])
    assert [row["label_probs"] for row in rows_of(per_row)] == [{"no": 0.25, "yes": 0.75}, None]
    (row,) = rows_of(
        columns({"logprobs": 2, "prompt_logprobs": 2, "structured_outputs": {"regex": "a"}}, True).table(
            [row_result(RICH)]
        )
    )
    assert (row["parsed"], row["reasoning_text"]) == ('{"a":1}', "because")
    assert row["logprobs"] == [
        [{"token_id": 7, "logprob": -0.5, "rank": 1, "decoded_token": "a"}],
        [
            {"token_id": 9, "logprob": -2.0, "rank": 3, "decoded_token": "b"},
            {"token_id": 7, "logprob": -0.25, "rank": 1, "decoded_token": "a"},
            {"token_id": 8, "logprob": -1.0, "rank": 2, "decoded_token": None},
        ],
    ]
    assert row["prompt_logprobs"] == [None, *row["logprobs"]]


def test_samples_as_lists_and_as_rows() -> None:
    results = [row_result(SAMPLES), failed_row("bad"), row_result(HALF)]
    source = pa.table({"id": [1, 2, 3], "tags": [["a"], [], None]})
    lists = columns({"n": 2, "temperature": 1.0}).extend(source, results)
    assert rows_of(
        lists.select(["id", "generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens", "error"])
    ) == [
        {
            "id": 1,
            "generated_text": ["first", "second"],
            "finish_reason": ["stop", "stop"],
            "num_input_tokens": 3,
            "num_generated_tokens": [2, 5],
            "error": None,
        },
        {
            "id": 2,
            "generated_text": [None, None],
            "finish_reason": ["error", "error"],
            "num_input_tokens": 0,
            "num_generated_tokens": [0, 0],
            "error": "bad",
        },
        {
            "id": 3,
            "generated_text": ["first", None],
            "finish_reason": ["stop", "error"],
            "num_input_tokens": 3,
            "num_generated_tokens": [2, 0],
            "error": "token 3 was sampled",
        },
    ]
    rows = columns({"n": 2, "temperature": 1.0}, samples="rows").extend(source, results)
    assert rows["id"].to_pylist() == [1, 1, 2, 2, 3, 3]
    assert rows["tags"].to_pylist() == [["a"], ["a"], [], [], None, None]
    assert rows["sample_index"].to_pylist() == [0, 1] * 3
    assert rows["generated_text"].to_pylist() == ["first", "second", None, None, "first", None]
    assert rows["num_generated_tokens"].to_pylist() == [2, 5, 0, 0, 2, 0]
    assert rows["error"].to_pylist() == [None, None, "bad", "bad", None, "token 3 was sampled"]
    one = columns(samples="rows").extend(source.slice(0, 1), [row_result(output("t"))])
    assert rows_of(one.select(["generated_text", "sample_index"])) == [{"generated_text": "t", "sample_index": 0}]


@pytest.mark.parametrize("form", ["list", "rows"])
@pytest.mark.parametrize("n", [1, 2])
def test_counts_add_up(form: str, n: int) -> None:
    good = SAMPLES if n == 2 else output("first", 2)
    rows = [
        row_result(good),
        *(row_result(error_output(f"too long: {length} tokens", length)) for length in (900, 800)),
    ]
    wide = columns({"n": n}, num_cached_tokens=True, samples=form)
    counts = count_rows(wide.table(rows), wide)
    assert (counts.rows, counts.samples, counts.error_rows) == (3, 3 * n, 2)
    assert (counts.input_tokens, counts.generated_tokens, counts.cached_tokens) == (1703, 7 if n == 2 else 2, 1)
    assert counts.errors == {"too long: N tokens": 2}
    assert counts.finish_reasons == {"stop": n, "error": 2 * n}
    assert (counts.input_lengths[2], counts.input_lengths[10], sum(counts.input_lengths)) == (1, 2, 3)
    assert counts.generated_lengths[:4] == [2 * n, 0, 1, n - 1]
    total = Counts()
    for row in rows:
        total.add(count_rows(wide.table([row]), wide))
    assert total == counts == Counts.from_dict(counts.as_dict())
    assert count_rows(wide.table([]), wide) == Counts()


def test_a_row_with_one_failed_sample_is_one_row_with_an_error() -> None:
    for form in ("list", "rows"):
        wide = columns({"n": 2}, samples=form)
        counts = count_rows(wide.table([row_result(HALF), row_result(SAMPLES)]), wide)
        assert (counts.rows, counts.error_rows, counts.finish_reasons) == (2, 1, {"stop": 3, "error": 1})


def test_names_that_are_taken() -> None:
    with pytest.raises(UserError, match=r"column 'error'.*columns\.prefix"):
        check_names(["text", "error"], columns())
    check_names(["text", "error"], columns(prefix="new_"))
    check_names(["text", "num_cached_tokens", "label", "sample_index"], columns())
    with pytest.raises(UserError, match="'label'"):
        check_names(["label"], columns({"labels": ["a", "b"]}))
    with pytest.raises(UserError, match="'sample_index'"):
        check_names(["sample_index"], columns({"n": 2}, samples="rows"))


def test_rows_that_set_n_cannot_be_exploded() -> None:
    with pytest.raises(UserError, match=r"columns\.samples=list"):
        columns(per_row=frozenset({"n"}), samples="rows")
    varied = columns(per_row=frozenset({"n"})).table([row_result(SAMPLES), row_result(output("t")), failed_row("bad")])
    assert varied["generated_text"].to_pylist() == [["first", "second"], ["t"], [None]]


def test_minus_infinity_is_a_log_probability() -> None:
    (row,) = rows_of(
        columns({"logprobs": 0}).table([row_result(output("t", 1, logprobs=[{1: Logprob(-math.inf, 5, "x")}]))])
    )
    assert row["logprobs"][0][0]["logprob"] == -math.inf


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"x": 1, "y": None}, None]),
        pa.array(["a", None]).dictionary_encode(),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.array(["a", None], pa.string_view()),
        pa.array([["a"], None], pa.list_(pa.string_view())),
        pa.nulls(2),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_input_columns_of_any_type_are_repeated(column: pa.Array) -> None:
    source = pa.table({"c": pa.chunked_array([column.slice(0, 1), column.slice(1)])})
    results = [row_result(SAMPLES), failed_row("bad")]
    rows = columns({"n": 2}, samples="rows").extend(source, results)
    assert rows.schema.field("c") == source.schema.field("c")
    assert rows["c"].to_pylist() == [value for value in column.to_pylist() for _ in range(2)]
