"""What a row gets: from an engine's output to a `RowResult`, and from there to the journal's tables and back.

`columns` makes the output's columns of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nanovllm import RequestOutput
from nanovllm.outputs import TokenLogprobs

TOKEN_LOGPROB = pa.struct(
    [("token_id", pa.int32()), ("logprob", pa.float32()), ("rank", pa.int32()), ("decoded_token", pa.string())]
)
# Of every token of a text: the token that is there, then the likeliest ones.
LOGPROBS = pa.list_(pa.list_(TOKEN_LOGPROB))

SAMPLE_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("num_generated_tokens", pa.int32()),
        ("parsed", pa.string()),
        ("reasoning_text", pa.string()),
        ("label", pa.string()),
        ("label_logprob", pa.float64()),
        ("label_probs", pa.map_(pa.string(), pa.float64())),
        ("logprobs", LOGPROBS),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        ("samples", pa.list_(pa.struct(list(SAMPLE_SCHEMA)))),
        ("num_input_tokens", pa.int32()),
        ("num_cached_tokens", pa.int32()),
        ("error", pa.string()),
        ("prompt_logprobs", LOGPROBS),
    ]
)


class Sample(NamedTuple):
    """One text of a row, in the order of `SAMPLE_SCHEMA`. See `RequestOutput` for the fields.

    Attributes:
        text: None exactly where the sample failed; `finish_reason` is then "error" and the row's `error` says why.
        label_probs: label -> probability.
        logprobs: an Arrow array of `LOGPROBS.value_type`, as long as the generated tokens. As Python objects a shard of them
            would take ten times the memory.
    """

    text: str | None
    finish_reason: str
    num_generated_tokens: int
    parsed: str | None = None
    reasoning_text: str | None = None
    label: str | None = None
    label_logprob: float | None = None
    label_probs: Mapping[str, float] | None = None
    logprobs: pa.ListArray | None = None


class RowResult(NamedTuple):
    """What a row gets, in the order of `RESULT_SCHEMA`.

    Attributes:
        samples: one, or `SamplingParams.n`; a row that never ran has one that failed, whatever n is.
        num_input_tokens, num_cached_tokens: of the prompt, which samples share.
        error: None, or why the row or the first of its samples that failed has no text.
        prompt_logprobs: of every prompt token, as `Sample.logprobs`; null for the first one.
    """

    samples: tuple[Sample, ...]
    num_input_tokens: int
    num_cached_tokens: int
    error: str | None
    prompt_logprobs: pa.ListArray | None = None


def row_result(output: RequestOutput) -> RowResult:
    """The result of a row that the engine ran, or could not run."""
    outputs = output.get("outputs") or [output]
    prompt_logprobs = output.get("prompt_logprobs")
    return RowResult(
        tuple(map(_sample, outputs)),
        output["num_input_tokens"],
        output["num_cached_tokens"],
        next((sample["error"] for sample in outputs if sample["error"] is not None), None),
        None if prompt_logprobs is None else logprobs_array(prompt_logprobs),
    )


def failed_row(error: str) -> RowResult:
    """The result of a row that never ran to its end."""
    return RowResult((Sample(None, "error", 0),), 0, 0, error)


def _sample(output: RequestOutput) -> Sample:
    if output["error"] is not None:
        return Sample(None, "error", output["num_generated_tokens"])
    return Sample(
        output["text"],
        output["finish_reason"],
        output["num_generated_tokens"],
        output.get("parsed"),
        output.get("reasoning_text"),
        output.get("label"),
        output.get("label_logprob"),
        output.get("label_probs"),
        None if output["logprobs"] is None else logprobs_array(output["logprobs"]),
    )


def logprobs_array(tokens: Sequence[TokenLogprobs | None]) -> pa.ListArray:
    """Log-probabilities of some tokens as an array of `LOGPROBS.value_type`, in the order they have in each dict."""
    entries = [(token_id, *logprob) for found in tokens for token_id, logprob in (found or {}).items()]
    columns = zip(*entries, strict=True) if entries else [()] * len(TOKEN_LOGPROB)
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, TOKEN_LOGPROB, strict=True)]
    structs = pa.StructArray.from_arrays(arrays, fields=list(TOKEN_LOGPROB))
    return list_array(structs, [0 if found is None else len(found) for found in tokens], [t is None for t in tokens])


def list_array(values: pa.Array, lengths: Iterable[int], nulls: Sequence[bool] | None = None) -> pa.ListArray:
    """Lists of so many of `values`, one after another; those marked in `nulls` are null and have none."""
    offsets = pa.array(list(accumulate(lengths, initial=0)), pa.int32())
    mask = pa.array(nulls, pa.bool_()) if nulls is not None and any(nulls) else None
    return pa.ListArray.from_arrays(offsets, values, pa.list_(values.type), mask=mask)


def logprobs_column(arrays: Sequence[pa.ListArray | None]) -> pa.ListArray:
    """A column of `LOGPROBS` from the log-probabilities of some texts, null where there are none."""
    found = [array for array in arrays if array is not None]
    values = pa.concat_arrays(found) if found else pa.array([], LOGPROBS.value_type)
    lengths = [0 if array is None else len(array) for array in arrays]
    return list_array(values, lengths, [array is None for array in arrays])


def sample_arrays(samples: Sequence[Sample]) -> dict[str, pa.Array]:
    """The fields of some samples, as `SAMPLE_SCHEMA` has them."""
    fields = dict(zip(SAMPLE_SCHEMA.names, zip(*samples, strict=True), strict=True)) if samples else {}
    arrays = {}
    for field in SAMPLE_SCHEMA:
        values = list(fields.get(field.name, ()))
        if field.name == "logprobs":
            arrays[field.name] = logprobs_column(values)
        elif field.name == "label_probs":
            arrays[field.name] = pa.array([value and list(value.items()) for value in values], field.type)
        else:
            arrays[field.name] = pa.array(values, field.type)
    return arrays


def results_to_table(results: Sequence[RowResult]) -> pa.Table:
    """All fields of some results, as the journal keeps them."""
    samples = [sample for row in results for sample in row.samples]
    structs = pa.StructArray.from_arrays(list(sample_arrays(samples).values()), fields=list(SAMPLE_SCHEMA))
    return pa.table(
        [
            list_array(structs, [len(row.samples) for row in results]),
            pa.array([row.num_input_tokens for row in results], pa.int32()),
            pa.array([row.num_cached_tokens for row in results], pa.int32()),
            pa.array([row.error for row in results], pa.string()),
            logprobs_column([row.prompt_logprobs for row in results]),
        ],
        schema=RESULT_SCHEMA,
    )


def results_from_table(table: pa.Table) -> list[RowResult]:
    """The reverse of `results_to_table`."""
    column = _whole(table["samples"])
    structs = column.flatten()
    fields = [_sample_values(name, structs.field(name)) for name in SAMPLE_SCHEMA.names]
    samples = [Sample(*values) for values in zip(*fields, strict=True)]
    ends = np.cumsum(column.value_lengths().to_numpy()).tolist()
    return [
        RowResult(tuple(samples[start:end]), *values)
        for start, end, *values in zip(
            [0, *ends],
            ends,
            table["num_input_tokens"].to_pylist(),
            table["num_cached_tokens"].to_pylist(),
            table["error"].to_pylist(),
            _arrays(_whole(table["prompt_logprobs"])),
            strict=False,  # a start more than ends
        )
    ]


def _sample_values(name: str, array: pa.Array) -> list[object]:
    if name == "logprobs":
        return list(_arrays(array))
    if name == "label_probs":
        return [value and dict(value) for value in array.to_pylist()]
    return list(array.to_pylist())


def _arrays(column: pa.ListArray) -> list[pa.ListArray | None]:
    return [scalar.values for scalar in column]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
