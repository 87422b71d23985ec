"""The generated columns of an output: which there are, of which types, and how results fill them.

Decided at plan time from the settings alone, so that every file has one schema whether its rows failed or not. The job and
`NanoVLLMPredictor` both make theirs here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from nanovllm import SamplingParams, UserError
from pipelines.job import ColumnsConfig, JobConfig
from pipelines.results import (
    LOGPROBS,
    SAMPLE_SCHEMA,
    RowResult,
    Sample,
    list_array,
    logprobs_column,
    sample_arrays,
)
from pipelines.row_values import take

# Columns that tell of a sample, by the name they have in `Sample`; the others tell of a row.
SAMPLE_FIELDS = {"generated_text": "text"} | {name: name for name in SAMPLE_SCHEMA.names if name != "text"}
ROW_TYPES = {
    "num_input_tokens": pa.int32(),
    "num_cached_tokens": pa.int32(),
    "error": pa.string(),
    "prompt_logprobs": LOGPROBS,
    "sample_index": pa.int32(),
}


@dataclass(frozen=True)
class OutputColumns:
    """The generated columns of one job.

    Attributes:
        prefix: put before every name.
        names: of the columns, without `prefix`, in output order.
        n: samples of a row; where rows say it themselves, that of those which do not.
        lists: columns of samples hold lists, of one value a sample.
        exploded: a row becomes `n` rows, one a sample.
        labels: of the job, which are the fields of `label_probs`; None where rows have their own: it is a map then.
    """

    prefix: str
    names: tuple[str, ...]
    n: int
    lists: bool
    exploded: bool
    labels: tuple[str, ...] | None

    @property
    def rows_each(self) -> int:
        """Output rows of an input row."""
        return self.n if self.exploded else 1

    @cached_property
    def schema(self) -> pa.Schema:
        """Names, with the prefix, and types."""
        return pa.schema([(self.prefix + name, self._type(name)) for name in self.names])

    def name(self, column: str) -> str:
        """The name of a column as it is in the output."""
        return self.prefix + column

    def table(self, results: Sequence[RowResult]) -> pa.Table:
        """The generated columns of some rows; `rows_each` rows for each of them."""
        padded = [self._samples(row) for row in results]
        samples = [sample for row in padded for sample in row]
        fields = sample_arrays(samples)
        lengths = [len(row) for row in padded]
        arrays = []
        for name in self.names:
            if name not in SAMPLE_FIELDS:
                arrays.append(self._row_array(name, results, samples))
                continue
            array = fields[SAMPLE_FIELDS[name]]
            if name == "label_probs" and self.labels is not None:
                array = _probabilities(samples, self.labels)
            arrays.append(list_array(array, lengths) if self.lists else array)
        return pa.table(arrays, schema=self.schema)

    def extend(self, table: pa.Table, results: Sequence[RowResult]) -> pa.Table:
        """Input rows with their generated columns behind them."""
        return self.join(table, self.table(results))

    def join(self, table: pa.Table, generated: pa.Table) -> pa.Table:
        """Input rows with the generated columns of these rows, as `table` makes them, behind them."""
        if self.exploded:
            rows = np.repeat(np.arange(table.num_rows), self.n)
            table = pa.table([take(column, rows) for column in table.columns], schema=table.schema)
        for field in self.schema:
            table = table.append_column(field, generated[field.name])
        return table

    def _type(self, name: str) -> pa.DataType:
        if name not in SAMPLE_FIELDS:
            return ROW_TYPES[name]
        kind = SAMPLE_SCHEMA.field(SAMPLE_FIELDS[name]).type
        if name == "label_probs" and self.labels is not None:
            kind = pa.struct([(label, pa.float64()) for label in self.labels])
        return pa.list_(kind) if self.lists else kind

    def _samples(self, row: RowResult) -> tuple[Sample, ...]:
        """The samples of a row. One that never ran gets as many as the others, so that no row's columns differ in length."""
        return row.samples * self.n if row.error is not None and len(row.samples) == 1 else row.samples

    def _row_array(self, name: str, results: Sequence[RowResult], samples: Sequence[Sample]) -> pa.Array:
        if name == "sample_index":
            return pa.array(np.tile(np.arange(self.n, dtype=np.int32), len(results)))
        if name == "prompt_logprobs":
            return logprobs_column([row.prompt_logprobs for row in results for _ in range(self.rows_each)])
        values = [getattr(row, name) for row in results for _ in range(self.rows_each)]
        if name == "error" and self.exploded:  # of a sample: others of its row may be fine
            values = [value if sample.text is None else None for value, sample in zip(values, samples, strict=True)]
        return pa.array(values, ROW_TYPES[name])


def output_columns(config: JobConfig, per_row: Set[str] = frozenset()) -> OutputColumns:
    """The generated columns of a job. `per_row` as in `choose_columns`."""
    return choose_columns(config.columns, config.sampling, config.engine.reasoning, per_row)


def choose_columns(
    columns: ColumnsConfig, sampling: SamplingParams, reasoning: bool, per_row: Set[str] = frozenset()
) -> OutputColumns:
    """The generated columns that these settings ask for.

    Args:
        columns: what to write.
        sampling: of all rows.
        reasoning: the engine splits reasoning from answers.
        per_row: fields of `SamplingParams` that rows may set for themselves.

    Raises:
        UserError: rows are to be exploded into a number of rows that each says itself.
    """

    def may(name: str) -> bool:
        return name in per_row or getattr(sampling, name) is not None

    exploded = columns.samples == "rows"
    if exploded and "n" in per_row:
        raise UserError(
            "columns.samples='rows' needs one n for all rows, and rows set it for themselves; use columns.samples=list"
        )
    wanted = {
        "num_cached_tokens": columns.num_cached_tokens,
        "parsed": may("structured_outputs"),
        "label": may("labels"),
        "label_logprob": may("labels"),
        "label_probs": may("labels"),
        "reasoning_text": reasoning,
        "logprobs": may("logprobs"),
        "prompt_logprobs": may("prompt_logprobs"),
        "sample_index": exploded,
    }
    always = ("generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens", "error")
    return OutputColumns(
        columns.prefix,
        (*always, *(name for name, is_wanted in wanted.items() if is_wanted)),
        sampling.n,
        not exploded and (sampling.n > 1 or "n" in per_row),
        exploded,
        None if "labels" in per_row or sampling.labels is None else tuple(sampling.labels),
    )


def check_names(input_names: Iterable[str], columns: OutputColumns) -> None:
    """Refuse a generated column that an input column already has the name of.

    Raises:
        UserError: naming the column and the remedy.
    """
    taken = set(input_names)
    clashes = [name for name in columns.schema.names if name in taken]
    if clashes:
        raise UserError(
            f"input already has a column {clashes[0]!r}, which the output would add; set columns.prefix, "
            "for example columns.prefix=new_, or leave it out with columns.keep"
        )


def _probabilities(samples: Sequence[Sample], labels: Sequence[str]) -> pa.StructArray:
    """A struct of each label's probability, null where a sample has none."""
    found = [sample.label_probs for sample in samples]
    arrays = [pa.array([probs and probs[label] for probs in found], pa.float64()) for label in labels]
    mask = pa.array([probs is None for probs in found], pa.bool_())
    return pa.StructArray.from_arrays(arrays, fields=[pa.field(label, pa.float64()) for label in labels], mask=mask)
