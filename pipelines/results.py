"""What a row gets: from an engine's output to a `RowResult`, which the journal keeps, and from results to the output's columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from nanovllm import RequestOutput, UserError
from pipelines.job import ColumnsConfig

RESULT_SCHEMA = pa.schema(
    [
        ("generated_text", pa.string()),
        ("finish_reason", pa.string()),
        ("num_input_tokens", pa.int32()),
        ("num_generated_tokens", pa.int32()),
        ("num_cached_tokens", pa.int32()),
        ("error", pa.string()),
    ]
)


class RowResult(NamedTuple):
    """What a row gets, in the order of `RESULT_SCHEMA`. `generated_text` is None exactly where `error` is not."""

    generated_text: str | None
    finish_reason: str
    num_input_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    error: str | None


def row_result(output: RequestOutput) -> RowResult:
    """The result of a row that the engine ran, or could not run."""
    failed = output["error"] is not None
    return RowResult(
        None if failed else output["text"],
        output["finish_reason"],
        output["num_input_tokens"],
        output["num_generated_tokens"],
        output["num_cached_tokens"],
        output["error"],
    )


def failed_row(error: str) -> RowResult:
    """The result of a row that never ran to its end."""
    return RowResult(None, "error", 0, 0, 0, error)


def output_names(columns: ColumnsConfig) -> list[str]:
    """Names of the generated columns, unprefixed, in output order."""
    return [name for name in RESULT_SCHEMA.names if name != "num_cached_tokens" or columns.num_cached_tokens]


def check_names(input_names: Iterable[str], columns: ColumnsConfig) -> None:
    """Refuse a generated column that an input column already has the name of.

    Raises:
        UserError: naming the column and the remedy.
    """
    taken = set(input_names)
    clashes = [columns.prefix + name for name in output_names(columns) if columns.prefix + name in taken]
    if clashes:
        raise UserError(
            f"input already has a column {clashes[0]!r}, which the output would add; set columns.prefix, "
            "for example columns.prefix=new_, or leave it out with columns.keep"
        )


def result_table(results: Sequence[RowResult], columns: ColumnsConfig) -> pa.Table:
    """The generated columns of some rows, named and typed as in the output."""
    names = output_names(columns)
    table = results_to_table(results).select(names)
    return table.rename_columns([columns.prefix + name for name in names])


def results_to_table(results: Sequence[RowResult]) -> pa.Table:
    """All fields of some results, as the journal keeps them."""
    fields = zip(*results, strict=True) if results else [()] * len(RESULT_SCHEMA)
    return pa.table(
        [pa.array(list(values), field.type) for values, field in zip(fields, RESULT_SCHEMA, strict=True)],
        schema=RESULT_SCHEMA,
    )


def results_from_table(table: pa.Table) -> list[RowResult]:
    """The reverse of `results_to_table`."""
    return [RowResult(*row) for row in zip(*(table[name].to_pylist() for name in RESULT_SCHEMA.names), strict=True)]
