"""What rows add up to: tokens, errors, lengths. Workers count shards, the driver adds them up for progress and report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

COUNTED = ("finish_reason", "num_input_tokens", "num_generated_tokens", "error")
BUCKETS = 24  # of the length histograms: bucket i holds lengths from 2**(i-1) to 2**i - 1, bucket 0 holds 0


@dataclass
class Counts:
    """Sums over rows. Histograms count rows by the bit length of their number of tokens."""

    rows: int = 0
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


def count_rows(table: pa.Table, prefix: str) -> Counts:
    """Count rows of an output file; `table` has the columns `COUNTED`, named with `prefix`, and perhaps others."""
    reasons, inputs, generated, errors = (table[prefix + name] for name in COUNTED)
    failed = [error_kind(message) for message in errors.drop_null().to_pylist()]
    cached = prefix + "num_cached_tokens"
    return Counts(
        rows=table.num_rows,
        error_rows=len(failed),
        input_tokens=_total(inputs),
        generated_tokens=_total(generated),
        cached_tokens=_total(table[cached]) if cached in table.column_names else 0,
        finish_reasons=dict(Counter(reasons.to_pylist())),
        errors=dict(Counter(failed)),
        input_lengths=_histogram(inputs),
        generated_lengths=_histogram(generated),
    )


def error_kind(message: str) -> str:
    """An error message without its numbers, so that equal mistakes count as one kind."""
    return re.sub(r"\d+", "N", message)


def _total(column: pa.ChunkedArray) -> int:
    return int(np.sum(column.to_numpy(), dtype=np.int64))


def _histogram(column: pa.ChunkedArray) -> list[int]:
    bits = np.ceil(np.log2(column.to_numpy().astype(np.float64) + 1)).astype(np.int64)
    counted: list[int] = np.bincount(np.minimum(bits, BUCKETS - 1), minlength=BUCKETS).tolist()
    return counted


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]
