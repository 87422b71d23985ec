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


def render(value: object) -> str:
    """The prompt of a row.

    Raises:
        RowError: the value is null, empty or no string.
    """
    if value is None or value != value:  # a NaN is what pandas makes of a null
        raise RowError("prompt is null")
    if not isinstance(value, str):
        raise RowError(f"prompt is {type(value).__name__}, not a string")
    if not value:
        raise RowError("prompt is empty")
    return value
