"""What rows add up to: tokens, errors, lengths. Workers count shards, the driver adds them up for progress and report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.columns import OutputColumns
from pipelines.commit import OutputDirectory
from pipelines.plan import PLACES, Place, Shard, Stage

COUNTED = ("finish_reason", "num_input_tokens", "num_generated_tokens", "error")
SAMPLES_EACH = 3  # error messages kept of a kind
KINDS = 20  # of errors of which messages are kept
MESSAGE_CHARS = 400
BUCKETS = 24  # of the length histograms: bucket i holds lengths from 2**(i-1) to 2**i - 1, bucket 0 holds 0


class ErrorSample(NamedTuple):
    """One row with an error: its kind as in `Counts.errors`, input file, row number there (from 0), and message."""

    kind: str
    file: str
    row: int
    message: str


@dataclass
class Counts:
    """Sums over input rows, and over their samples: finish reasons and generated tokens are of samples, all else is of rows.

    Histograms count by the bit length of a number of tokens. A row one of whose samples failed is a row with an error.
    `prompt_pairs` and `decode_context` are what attention has to do: squares of the prompts' lengths, and the tokens that each
    generated token but a text's first attends to. `error_samples` are a few errors in full.
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
    prompt_pairs: int = 0
    decode_context: int = 0
    error_samples: list[ErrorSample] = field(default_factory=list, compare=False)

    @property
    def decode_tokens(self) -> int:
        """Generated tokens but the first of each text."""
        return self.generated_tokens - (self.samples - self.generated_lengths[0])

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
        self.prompt_pairs += other.prompt_pairs
        self.decode_context += other.decode_context
        keep_few(self.error_samples, other.error_samples)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Counts:
        """The reverse of `as_dict`."""
        samples = [ErrorSample(*sample) for sample in values.get("error_samples", ())]
        return cls(**{**values, "error_samples": samples})


def counted(columns: OutputColumns) -> list[str]:
    """The columns of an output that `count_rows` needs."""
    return [columns.name(name) for name in COUNTED]


def count_part(output: OutputDirectory, shard: Shard, columns: OutputColumns, stage: Stage) -> Counts:
    """Count the rows of a shard from its file.

    Raises:
        OSError: it cannot be read.
    """
    names = [*counted(columns), *(name for name in PLACES.names if name in stage.kept)]
    table = output.read_part(shard.index, names)
    return count_rows(table, columns, stage.places(shard, table, columns.rows_each))


def count_rows(table: pa.Table, columns: OutputColumns, place: Callable[[int], Place] | None = None) -> Counts:
    """Count rows of an output file; `table` has the `counted` columns, and perhaps others.

    `place` says where an input row of it comes from, by position; without it no error is kept in full.
    """
    reasons, inputs, generated, errors = (table[name] for name in counted(columns))
    # Samples of each row: rows may ask for numbers of their own.
    each: NDArray[np.int64] | int = columns.rows_each
    if columns.lists:
        each = pc.fill_null(pc.list_value_length(generated), 0).to_numpy().astype(np.int64)
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
    samples: list[ErrorSample] = []
    if place is not None:
        rows = ((row, message) for row, message in enumerate(messages) if message is not None)
        found = (
            ErrorSample(kind, *place(row), message[:MESSAGE_CHARS])
            for kind, (row, message) in zip(failed, rows, strict=True)
        )
        keep_few(samples, found)
    cached = columns.name("num_cached_tokens")
    generated = generated.to_numpy().astype(np.int64)
    after_first = np.maximum(generated - 1, 0)
    contexts = np.repeat(prompts.astype(np.int64), each)
    return Counts(
        rows=len(prompts),
        samples=len(reasons),
        error_rows=len(failed),
        input_tokens=int(prompts.sum(dtype=np.int64)),
        generated_tokens=int(generated.sum()),
        cached_tokens=int(table[cached].to_numpy()[first].sum(dtype=np.int64)) if cached in table.column_names else 0,
        finish_reasons=dict(Counter(reasons.to_pylist())),
        errors=dict(Counter(failed)),
        input_lengths=_histogram(prompts),
        generated_lengths=_histogram(generated),
        prompt_pairs=int(np.square(prompts, dtype=np.int64).sum()),
        decode_context=int((after_first * contexts + generated * after_first // 2).sum()),
        error_samples=samples,
    )


def keep_few(kept: list[ErrorSample], more: Iterable[ErrorSample]) -> list[ErrorSample]:
    """Add to `kept` what is new there: up to `SAMPLES_EACH` of a kind, of up to `KINDS` kinds. Returns what was added."""
    counts = Counter(sample.kind for sample in kept)
    added = []
    for sample in more:
        if counts[sample.kind] < SAMPLES_EACH and (sample.kind in counts or len(counts) < KINDS):
            counts[sample.kind] += 1
            added.append(sample)
    kept += added
    return added


def error_kind(message: str) -> str:
    """An error message without its numbers, so that equal mistakes count as one kind."""
    return re.sub(r"\d+", "N", message)


def _histogram(lengths: NDArray[np.integer[Any]]) -> list[int]:
    bits = np.ceil(np.log2(lengths.astype(np.float64) + 1)).astype(np.int64)
    buckets: list[int] = np.bincount(np.minimum(bits, BUCKETS - 1), minlength=BUCKETS).tolist()
    return buckets


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]
