"""Values of rows as Python has them, and what is wrong with a row. Used by everything that reads input columns for requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


class RowError(ValueError):
    """What is wrong with one row; its message becomes the row's `error` value."""


def column_values(column: pa.ChunkedArray) -> list[object]:
    """The values of a column. Where files hold strings that are not UTF-8, those are bytes."""
    if isinstance(column.type, pa.BaseExtensionType):  # Ray Data's, for what came as numpy arrays
        return [plain(value) for value in column.to_pylist()]
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet readers do not check; one such row must not cost the job
        return [_value(scalar) for chunk in column.chunks for scalar in chunk]


def _value(scalar: pa.Scalar) -> object:
    """A value; bytes where there is a string in it that is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def plain(value: Any) -> Any:
    """`value` without numpy: lists, dicts and Python's numbers."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, as they are or as a dictionary."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))


def list_item(kind: pa.DataType) -> pa.DataType | None:
    """The type of a list column's items; None for other columns."""
    lists = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return kind.value_type if any(is_list(kind) for is_list in lists) else None
