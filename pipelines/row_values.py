"""Values of rows as Python has them, and what is wrong with a row. Used by everything that reads input columns for requests."""

from __future__ import annotations

from array import array
from typing import Any, Union

import numpy as np
import pyarrow as pa

from nanovllm import UserError

# Type of a column that a program handed over as Python objects: what it holds is known row by row.
OBJECTS = pa.opaque(pa.null(), "object", "python")
# A prompt's tokens: an array where they come from a column.
TokenIds = Union[list[int], "array[int]"]


class RowError(ValueError):
    """What is wrong with one row; its message becomes the row's `error` value."""


def column_values(column: pa.ChunkedArray) -> list[object]:
    """The values of a column. Where files hold strings that are not UTF-8, those are bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet readers do not check; one such row must not cost the job
        return [_value(scalar) for chunk in column.chunks for scalar in chunk]


def token_lists(column: pa.ChunkedArray) -> list[object]:
    """The values of a column of lists of integers: each an array, without an object for each number of it.

    Lists that hold nulls, and those of rarer layouts, are as `column_values` has them.
    """
    found: list[object] = []
    for chunk in column.chunks:
        plain_layout = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
        if not plain_layout or chunk.values.null_count:
            found += chunk.to_pylist()
            continue
        numbers = chunk.values.to_numpy()
        code = np.dtype(numbers.dtype).char
        data, width = memoryview(numbers).cast("B"), numbers.dtype.itemsize
        ends = (chunk.offsets.to_numpy() * width).tolist()
        for start, end, is_there in zip(ends, ends[1:], chunk.is_valid().to_pylist(), strict=False):
            found.append(array(code, data[start:end].tobytes()) if is_there else None)
    return found


def _value(scalar: pa.Scalar) -> object:
    """A value; bytes where there is a string in it that is not UTF-8."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def take(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """The values of a column at these rows."""
    try:
        return column.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # of views of strings, also inside of other types
        values = column.to_pylist()
        return pa.chunked_array([pa.array([values[row] for row in rows], column.type)])


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


def refuse_pickles(field: pa.Field) -> None:
    """Refuse a column that cannot be read without unpickling what a file holds, which would run whatever code it names.

    Raises:
        UserError: naming the column.
    """
    kinds = [field.type]
    while kinds:
        kind = kinds.pop()
        if getattr(kind, "extension_name", "") == "ray.data.arrow_pickled_object":
            raise UserError(
                f"column {field.name!r} holds pickled Python objects, which are not read from files; write it as text, numbers, "
                "lists or structs"
            )
        kinds += [kind.field(i).type for i in range(kind.num_fields)]


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
