"""From a row's column to a prompt. The plan checks the column with `check_column`; the row path renders with `render`."""

from __future__ import annotations

import pyarrow as pa

from nanovllm import UserError
from nanovllm.utils.validation import suggest
from pipelines.job import PromptConfig


class RowError(ValueError):
    """What is wrong with one row; its message becomes the row's `error` value."""


def check_column(schema: pa.Schema, config: PromptConfig) -> None:
    """Refuse a dataset whose prompts cannot be rendered.

    Raises:
        UserError: the column is missing or of the wrong type.
    """
    if config.column not in schema.names:
        raise UserError(
            f"input has no column {config.column!r} (prompt.column): {suggest(config.column, schema.names)}"
        )
    kind = schema.field(config.column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise UserError(
            f"column {config.column!r} (prompt.column) is {kind}; prompts are strings: name another column or cast it"
        )


def prompt_values(column: pa.ChunkedArray) -> list[object]:
    """The values of the prompt column for `render`; where files hold strings that are not UTF-8, those are bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet readers do not check; one such row must not cost the job
        plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        return [_decode(value) for value in plain.cast(pa.large_binary()).to_pylist()]


def _decode(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def render(value: object) -> str:
    """The prompt of a row.

    Raises:
        RowError: the value is null, empty or no string.
    """
    if value is None or value != value:  # a NaN is what pandas makes of a null
        raise RowError("prompt is null")
    if isinstance(value, bytes):
        raise RowError("prompt is not valid UTF-8")
    if not isinstance(value, str):
        raise RowError(f"prompt is {type(value).__name__}, not a string")
    if not value:
        raise RowError("prompt is empty")
    return value
