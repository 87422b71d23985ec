"""From a job's settings and the input's columns to requests: which columns are read, and of each row its prompt and parameters.

The one way for jobs (`worker`, `--dry-run`) and `NanoVLLMPredictor`; `rows` calls it on the tokenizer thread.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa
import xxhash

from nanovllm import SamplingParams, UserError
from nanovllm.utils.validation import suggest
from pipelines.job import PromptConfig
from pipelines.openai_batch import BODY_PARAMETERS, BatchRequests
from pipelines.prompts import Prompt, Prompts, Rendered
from pipelines.row_values import OBJECTS, RowError, column_values, is_text, refuse_pickles, token_lists

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of one row: its columns that are read, by name.
Row = Mapping[str, object]

PARAMETERS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
# The output's columns are the same for all rows: none can ask for more samples than others.
ROW_PARAMETERS = PARAMETERS - {"n"}
_WHOLE_NUMBERS = {"max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "thinking_budget"}


class RequestSettings(Protocol):
    """The settings that decide a row's request; `JobConfig` has them."""

    @property
    def prompt(self) -> PromptConfig:
        """Where prompts come from."""

    @property
    def sampling(self) -> SamplingParams:
        """Of rows that say nothing else."""

    @property
    def sampling_columns(self) -> Mapping[str, str]:
        """Parameter -> column."""

    @property
    def sampling_column(self) -> str | None:
        """Column whose fields are parameters."""

    @property
    def format(self) -> str:
        """Of the input."""


class Request(NamedTuple):
    """What the engine is asked for one row."""

    prompt: Prompt
    params: SamplingParams


def row_seed(job_seed: int, *place: str | int) -> int:
    """The sampling seed of a row: 63 bits of xxhash over the job's seed and the row's place in the dataset.

    The job uses (file relative to the input's root, row number in the file, sample number), the predictor the prompt; a row that
    brings a seed of its own has that in the place of its place.
    """
    key = "\0".join(str(part) for part in (job_seed, *place))
    return xxhash.xxh64_intdigest(key.encode("utf-8", "surrogatepass")) >> 1


def per_row_parameters(settings: RequestSettings, schema: pa.Schema) -> frozenset[str]:
    """Names of the sampling parameters that rows may set, as far as the settings and the input's columns tell.

    Raises:
        UserError: a parameter is unknown or cannot be set by rows, or a column is missing or of a type that holds none.
    """
    if settings.format == "openai_batch":
        return BODY_PARAMETERS
    return RowParameters(settings, schema).names


class RowParameters:
    """Sampling parameters that come from columns.

    Attributes:
        columns: input columns that are read.
        names: parameters that rows may set.

    Raises:
        UserError: as `per_row_parameters`.
    """

    def __init__(self, settings: RequestSettings, schema: pa.Schema) -> None:
        self._column, self._by_parameter = settings.sampling_column, dict(settings.sampling_columns)
        names: set[str] = set()
        if self._column is not None:
            kind = _type_of(schema, self._column, "sampling_column")
            if pa.types.is_struct(kind):
                names |= {_checked(kind.field(i).name, f"column {self._column!r}") for i in range(kind.num_fields)}
            elif is_text(kind) or kind == OBJECTS:
                names |= ROW_PARAMETERS  # what it holds is known row by row
            else:
                raise UserError(
                    f"column {self._column!r} (sampling_column) is {kind}; it must be structs, or JSON text, whose fields are "
                    "sampling parameters"
                )
        for name, column in self._by_parameter.items():
            _type_of(schema, column, f"sampling_columns.{name}")
            names.add(_checked(name, "sampling_columns"))
        self.names = frozenset(names)
        self.columns = [name for name in (self._column, *self._by_parameter.values()) if name is not None]

    def of(self, row: Row) -> dict[str, Any]:
        """The parameters that a row sets, as far as their types are not wrong already.

        Raises:
            RowError: a value that cannot be read, or an unknown field.
        """
        found: dict[str, Any] = {}
        if self._column is not None:
            for name, value in _fields(self._column, row[self._column]).items():
                found[name] = read_parameter(name, value, f"column {self._column!r}")
        for name, column in self._by_parameter.items():
            value = read_parameter(name, row[column], f"column {column!r}")
            if value is not None:
                found[name] = value
        return {name: value for name, value in found.items() if value is not None}


class Requests:
    """Makes the requests of one input.

    Args:
        settings: of the job or the predictor.
        schema: the input's columns.
        seed: of the job; rows with a seed of their own combine it with this one.

    Attributes:
        columns: input columns that are read, in the order of the input.

    Raises:
        UserError: a column, template or parameter that cannot be used, in one line.
    """

    def __init__(self, settings: RequestSettings, schema: pa.Schema, seed: int = 0) -> None:
        self._sampling, self._seed = settings.sampling, seed
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._batch: BatchRequests | None = None
        if settings.format == "openai_batch":
            for name in ("sampling_column", "sampling_columns"):
                if getattr(settings, name):
                    raise UserError(
                        f"{name} has no meaning with format=openai_batch: parameters are in the requests' bodies"
                    )
            self._batch = BatchRequests(settings.prompt)
            self.columns = list(self._batch.columns)
            return
        self._prompts = Prompts(settings.prompt, schema)
        self._parameters = RowParameters(settings, schema)
        read = {*self._prompts.columns, *self._parameters.columns}
        self.columns = [name for name in schema.names if name in read]
        for name in self.columns:
            refuse_pickles(schema.field(name))

    def attach(self, tokenizer: PreTrainedTokenizerBase | None, model: str) -> None:
        """Make ready for `request`.

        Raises:
            UserError: prompts go through a chat template, and the model has none.
        """
        self._tokenizer = tokenizer
        (self._batch or self._prompts).attach(tokenizer, model)

    def rows(self, table: pa.Table) -> list[Row]:
        """The rows of a table, each as `request` takes it."""
        return self.rows_of({name: self.values(name, table[name]) for name in self.columns})

    def values(self, name: str, column: pa.ChunkedArray) -> list[object]:
        """What `rows_of` takes for a column of one of the names that are read."""
        is_prompt = self._batch is None and name == self._prompts.token_column
        return token_lists(column) if is_prompt else column_values(column)

    def rows_of(self, columns: Mapping[str, Sequence[object]]) -> list[Row]:
        """The rows of some columns, which have at least those that are read."""
        values = zip(*(columns[name] for name in self.columns), strict=True)
        return [dict(zip(self.columns, row, strict=True)) for row in values]

    def key(self, row: Row) -> str:
        """What a row's prompt comes from, as text: equal for rows whose prompts are."""
        values = [row[name] for name in (self.columns if self._batch else self._prompts.columns)]
        values = [value.tolist() if isinstance(value, array) else value for value in values]
        return str(values[0]) if len(values) == 1 else repr(values)

    def beginning(self, row: Row) -> str:
        """What a row's prompt is made of, in the prompt's order: prompts begin alike as far as these texts do. Needs no `attach`.

        Raises:
            RowError: the row has no usable prompt.
        """
        source = (self._batch or self._prompts).source(row)
        if isinstance(source, str):
            return source
        return " ".join(
            f"{item['role']} {item['content']}" if isinstance(item, Mapping) else str(item) for item in source
        )

    def request(self, row: Row, seed: int) -> Request:
        """What to ask the engine for a row.

        Args:
            row: of `rows`.
            seed: of its sampling, unless it brings its own.

        Raises:
            RowError: the row has no usable prompt or parameters.
        """
        if self._batch is not None:
            parsed = self._batch.read(row)
            prompt, given = self._batch.prompt(parsed), parsed.parameters
        else:
            given = self._parameters.of(row) if self._parameters.columns else {}
            prompt = self._prompts.render(row)
        try:
            return Request(prompt, self._params(given, seed))
        except RowError:
            if isinstance(prompt, Rendered) and self._tokenizer is not None:
                prompt.token_ids(self._tokenizer)  # of two errors the prompt's is told
            raise

    def _params(self, given: Mapping[str, Any], seed: int) -> SamplingParams:
        if not given:
            return dataclasses.replace(self._sampling, seed=seed)
        own = given.get("seed")
        if own is not None:
            if not isinstance(own, Integral) or isinstance(own, bool):
                raise RowError(f"seed={own!r}: must be a whole number")
            seed = row_seed(self._seed, int(own))
        params = dataclasses.replace(self._sampling, **{**given, "seed": seed})
        try:
            problem = params.problem()
        except (TypeError, ValueError, AttributeError) as error:
            problem = f"sampling parameters {dict(given)!r} cannot be used: {error}"
        if problem is not None:
            raise RowError(problem)
        return params


def read_parameter(name: str, value: object, where: str) -> Any:
    """A sampling parameter from a column's value; None where the row does not set it.

    Text is JSON, but for `stop`, and nothing where it is empty. A column of numbers with nulls may hold 3.0 for 3, and maps come
    as pairs.

    Raises:
        RowError: text that is no JSON.
    """
    if isinstance(value, bytes):
        raise RowError(f"{where}: {name} is not valid UTF-8")
    if value == "":  # CSV has no nulls
        return None
    if isinstance(value, str) and name != "stop":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{where}: {name}={value!r} is not JSON") from None
    if isinstance(value, float):
        if value != value:  # what pandas makes of a null
            return None
        if name in _WHOLE_NUMBERS and value.is_integer():
            return int(value)
    if name == "logit_bias":
        if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
            return dict(value)
        if isinstance(value, Mapping):
            return {key: bias for key, bias in value.items() if bias is not None}
    return value


def _fields(column: str, value: object) -> dict[str, object]:
    """The fields of a row's struct or JSON text that are set."""
    if isinstance(value, bytes):
        raise RowError(f"column {column!r} is not valid UTF-8")
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"column {column!r} is not JSON: {error}") from None
    if value is None or value != value:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"column {column!r} holds {type(value).__name__}, not an object of sampling parameters")
    for name in value:
        if name not in ROW_PARAMETERS:
            raise RowError(f"column {column!r}: {_unknown(str(name))}")
    return dict(value)


def _checked(name: str, where: str) -> str:
    if name not in ROW_PARAMETERS:
        raise UserError(f"{where}: {_unknown(name)}")
    return name


def _unknown(name: str) -> str:
    if name in PARAMETERS:
        return f"{name!r} is the same for all rows of a job; set sampling.{name}"
    return f"unknown sampling parameter {name!r}: {suggest(name, ROW_PARAMETERS)}"


def _type_of(schema: pa.Schema, column: str, setting: str) -> pa.DataType:
    if column not in schema.names:
        raise UserError(f"input has no column {column!r} ({setting}): {suggest(column, schema.names)}")
    return schema.field(column).type
