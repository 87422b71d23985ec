"""What rows add up to: tokens, errors, lengths. Workers count shards, the driver adds them up for progress and report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.columns import OutputColumns

COUNTED = ("finish_reason", "num_input_tokens", "num_generated_tokens", "error")
BUCKETS = 24  # of the length histograms: bucket i holds lengths from 2**(i-1) to 2**i - 1, bucket 0 holds 0


@dataclass
class Counts:
    """Sums over input rows, and over their samples: finish reasons and generated tokens are of samples, all else is of rows.

    Histograms count by the bit length of a number of tokens. A row one of whose samples failed is a row with an error.
    """

    rows: int = 0
    samples: int = 0
    error_rows: int = 0
    input_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    input_lengths: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    generated_lengths: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, other: Counts) -> None:
        """Add the rows of `other` to these."""
        self.rows += other.rows
        self.samples += other.samples
        self.error_rows += other.error_rows
        self.input_tokens += other.input_tokens
        self.generated_tokens += other.generated_tokens
        self.cached_tokens += other.cached_tokens
        self.finish_reasons = dict(Counter(self.finish_reasons) + Counter(other.finish_reasons))
        self.errors = dict(Counter(self.errors) + Counter(other.errors))
        self.input_lengths = _sum(self.input_lengths, other.input_lengths)
        self.generated_lengths = _sum(self.generated_lengths, other.generated_lengths)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counts:
        """The reverse of `as_dict`."""
        return cls(**values)


def counted(columns: OutputColumns) -> list[str]:
    """The columns of an output that `count_rows` needs."""
    return [columns.name(name) for name in COUNTED]


def count_rows(table: pa.Table, columns: OutputColumns) -> Counts:
    """Count rows of an output file; `table` has the `counted` columns, and perhaps others."""
    reasons, inputs, generated, errors = (table[name] for name in counted(columns))
    if columns.lists:
        reasons, generated = (
            pa.chunked_array([chunk.flatten() for chunk in c.chunks], c.type.value_type) for c in (reasons, generated)
        )
    first = slice(None, None, columns.rows_each)  # of the rows that one input row became
    prompts = inputs.to_numpy()[first]
    messages = errors.to_pylist()
    if columns.exploded:
        starts = range(0, len(messages), columns.n)
        messages = [next(filter(None, messages[start : start + columns.n]), None) for start in starts]
    failed = [error_kind(message) for message in messages if message is not None]
    cached = columns.name("num_cached_tokens")
    return Counts(
        rows=len(prompts),
        samples=len(reasons),
        error_rows=len(failed),
        input_tokens=int(prompts.sum(dtype=np.int64)),
        generated_tokens=int(generated.to_numpy().sum(dtype=np.int64)),
        cached_tokens=int(table[cached].to_numpy()[first].sum(dtype=np.int64)) if cached in table.column_names else 0,
        finish_reasons=dict(Counter(reasons.to_pylist())),
        errors=dict(Counter(failed)),
        input_lengths=_histogram(prompts),
        generated_lengths=_histogram(generated.to_numpy()),
    )


def error_kind(message: str) -> str:
    """An error message without its numbers, so that equal mistakes count as one kind."""
    return re.sub(r"\d+", "N", message)


def _histogram(lengths: NDArray[np.int32]) -> list[int]:
    bits = np.ceil(np.log2(lengths.astype(np.float64) + 1)).astype(np.int64)
    buckets: list[int] = np.bincount(np.minimum(bits, BUCKETS - 1), minlength=BUCKETS).tolist()
    return buckets


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]
