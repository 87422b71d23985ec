"""`NanoVLLMPredictor`: the engine as a class for `ray.data.Dataset.map_batches`, for users' own Ray Data programs.

ds = ray.data.read_parquet(path).map_batches(
    NanoVLLMPredictor, fn_constructor_kwargs={"model": model}, batch_size=64, concurrency=2, num_gpus=1
)
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import pyarrow as pa
from ray.data.block import BlockAccessor

from nanovllm import AsyncLLM, EngineConfig, EngineDeadError, SamplingParams, UserError
from nanovllm.preflight import check_sampling
from nanovllm.utils.heap import settle_heap, unsettle_heap
from nanovllm.utils.validation import parse, suggest
from pipelines.columns import OutputColumns, check_names, choose_columns
from pipelines.dedupe import Deduplicated, check_dedupe
from pipelines.job import ColumnsConfig, PromptConfig, RunConfig, TooLong, check_prompt, read_prompt_files
from pipelines.metrics import EngineMetrics
from pipelines.models import local_model
from pipelines.requests import Requests, per_row_parameters, row_seed
from pipelines.results import RowResult
from pipelines.row_values import OBJECTS, plain
from pipelines.rows import RowPath

if TYPE_CHECKING:
    import pandas as pd

Batch = Union[Mapping[str, np.ndarray], pa.Table, "pd.DataFrame"]

ENGINE_DIED = 70


class NanoVLLMPredictor:
    """Generates for every row of a batch, and returns the batch with the generated columns added.

    Ray Data calls it with several batches of a block at a time (`RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY`, 4
    where not set; `ActorPoolStrategy(max_concurrent_calls_per_actor=...)` adds several blocks). All their rows are one
    continuous batch of one engine, so a long row in one batch never idles the slots of the next. Rows keep their order.

    A row's sampling depends on `seed` and its prompt alone, so the same dataset gives the same result whatever the
    batches; equal prompts sample equally. An engine that dies ends its process, and Ray retries its blocks on a new one.
    """

    def __init__(
        self,
        model: str,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        prompt_column: str | None = None,
        prompt: Mapping[str, Any] | None = None,
        sampling_columns: Mapping[str, str] | None = None,
        sampling_column: str | None = None,
        too_long: TooLong | None = None,
        output_prefix: str = "",
        num_cached_tokens: bool = False,
        samples: Literal["list", "rows"] = "list",
        dedupe: bool = False,
        model_cache: str | None = None,
        **engine_options: Any,
    ) -> None:
        """Load the engine.

        Args:
            model: local directory, hub id, or address of a directory on a store. What is not local is fetched once a node.
            sampling_params: how rows are sampled; its `seed`, or 0, is the seed of the whole dataset.
            prompt_column: column of strings or of lists of token ids; short for `prompt={"column": ...}`. A null, an empty string or
                another type is an error value in its row.
            prompt: where prompts come from, the fields of a job's section `prompt`: `{"messages": "conversation"}`,
                `{"template": "Sum up: {{ text }}", "chat": True, "system": "Be brief."}` and so on. Files are read on the actor.
            sampling_columns: parameter -> column, for rows with parameters of their own.
            sampling_column: column of structs, or of JSON text, whose fields are parameters. Where its fields are not known from the
                batch's type (JSON text, numpy and pandas batches), the output has the columns of all parameters.
            too_long: what becomes of a prompt that does not fit: "error" (the default), "truncate_left" or "truncate_right".
            output_prefix: put before the names of the generated columns.
            num_cached_tokens: add that column.
            samples: with `n` above 1, "list" makes the columns of a sample lists of n values, "rows" makes n rows of each.
            dedupe: generate equal rows once; for temperature 0 or labels.
            model_cache: where a node keeps models that it fetched, as a job's `run.model_cache`.
            engine_options: fields of `EngineConfig`, for example `max_model_len` or `dtype`.

        Raises:
            UserError: an unknown option, a value out of range, a structured output that cannot be compiled, or a model that
                cannot be loaded.
        """
        unknown = set(engine_options) - set(EngineConfig.model_fields)
        if unknown:
            own = set(inspect.signature(NanoVLLMPredictor).parameters) - {"engine_options"}
            name = min(unknown)
            raise UserError(f"unknown option {name!r}: {suggest(name, own | set(EngineConfig.model_fields))}")
        engine = EngineConfig.create(model, **engine_options)
        self._settings = _Settings(
            _prompt(prompt, prompt_column, too_long),
            _sampling_params(sampling_params),
            sampling_columns or {},
            sampling_column,
        )
        columns = {"prefix": output_prefix, "num_cached_tokens": num_cached_tokens, "samples": samples}
        self._columns = parse(ColumnsConfig, columns, "option")
        self._config = engine
        self._seed = self._settings.sampling.seed or 0
        self._inputs: dict[pa.Schema, tuple[Requests, OutputColumns]] = {}
        if dedupe:
            check_dedupe("dedupe", self._settings.sampling)
        run = parse(RunConfig, {"model_cache": model_cache}, "option")
        directory = local_model(model, run.model_cache, engine.load_format == "auto", run.write_retries)
        check_sampling(engine.model_copy(update={"model": directory}), self._settings.sampling)
        self._engine = AsyncLLM(directory, **engine_options)
        self._metrics = EngineMetrics(output="")
        self._rows = RowPath(Deduplicated(self._engine) if dedupe else self._engine, self._settings.prompt.too_long)
        settle_heap()

    def __del__(self) -> None:
        """Free the engine when Ray lets go of the actor."""
        if hasattr(self, "_engine"):
            unsettle_heap()
            self._engine.shutdown()

    async def __call__(self, batch: Batch) -> pa.Table:
        """Generate for a batch in any of Ray's batch formats. The result is an Arrow table: its types never depend on its rows.

        Raises:
            UserError: a column that is read is missing, or a generated column has the name of an input column.
        """
        table = batch if isinstance(batch, pa.Table) else BlockAccessor.batch_to_arrow_block(batch)
        objects = _objects(batch, table)
        schema = pa.schema([f.with_type(OBJECTS) if f.name in objects else f for f in table.schema])
        requests, columns = self._for_input(schema)
        read = {
            name: objects[name] if name in objects else requests.values(name, table[name]) for name in requests.columns
        }
        rows = requests.rows_of(read)
        seeds = [row_seed(self._seed, requests.key(row)) for row in rows]
        results: dict[int, RowResult] = {}

        def done(row: int, result: RowResult) -> None:
            results[row] = result
            self._metrics.row(result)

        self._metrics.report(self._engine.stats())
        try:
            await self._rows.run(requests, rows, seeds, done)
        except EngineDeadError as error:
            print(f"the engine died: {error}", file=sys.stderr, flush=True)
            os._exit(ENGINE_DIED)
        self._metrics.report(self._engine.stats())
        return columns.extend(table, [results[row] for row in range(len(rows))])

    def _for_input(self, schema: pa.Schema) -> tuple[Requests, OutputColumns]:
        """What depends on the input's columns, made once for each schema; batches nearly always have one."""
        if schema not in self._inputs:
            per_row = per_row_parameters(self._settings, schema)
            columns = choose_columns(self._columns, self._settings.sampling, self._config.reasoning, per_row)
            check_names(schema.names, columns)
            requests = Requests(self._settings, schema, self._seed)
            requests.attach(self._engine.tokenizer, self._config.model)
            self._inputs[schema] = requests, columns
        return self._inputs[schema]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """`RequestSettings` of a predictor."""

    prompt: PromptConfig
    sampling: SamplingParams
    sampling_columns: Mapping[str, str]
    sampling_column: str | None
    format: str = "auto"


def _objects(batch: Batch, table: pa.Table) -> dict[str, list[Any]]:
    """Values of the columns that have no type of Arrow's own, as lists, dicts and numbers.

    Ray Data puts nested columns of numpy and pandas batches into tensors or pickles, and which of them may differ from batch to batch.
    """
    found: dict[str, list[Any]] = {}
    for field in table.schema:
        extended = isinstance(field.type, pa.BaseExtensionType)
        if isinstance(batch, pa.Table):
            # A tensor is numbers. A pickle may come from a file; `Requests` refuses it.
            if extended and field.type.extension_name.startswith("ray.data.arrow_tensor"):
                found[field.name] = [plain(value) for value in table[field.name].to_pylist()]
        elif extended or field.type.num_fields:
            found[field.name] = [plain(value) for value in batch[field.name]]
    return found


def _prompt(given: Mapping[str, Any] | None, column: str | None, too_long: TooLong | None) -> PromptConfig:
    values = dict(given or {})
    for name, option, value in (("column", "prompt_column", column), ("too_long", "too_long", too_long)):
        if value is None:
            continue
        if name in values:
            raise UserError(f"{option} and prompt[{name!r}] are both given; leave one out")
        values[name] = value
    config = parse(PromptConfig, read_prompt_files(values), "option")
    check_prompt(config)
    return config


def _sampling_params(given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
    if isinstance(given, Mapping):
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        for name in given:
            if name not in known:
                raise UserError(f"unknown sampling parameter {name!r}: {suggest(str(name), known)}")
        given = SamplingParams(**given)
    sampling = given or SamplingParams()
    problem = sampling.problem()
    if problem is not None:
        raise UserError(f"sampling_params: {problem}")
    return sampling
