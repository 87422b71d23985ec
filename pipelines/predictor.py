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
from nanovllm.utils.validation import parse, suggest
from pipelines.columns import check_names, choose_columns
from pipelines.dedupe import Deduplicated, check_dedupe
from pipelines.job import ColumnsConfig, PromptConfig, TooLong
from pipelines.results import RowResult
from pipelines.rows import RowPath, row_seed

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
        prompt_column: str = "prompt",
        too_long: TooLong = "error",
        output_prefix: str = "",
        num_cached_tokens: bool = False,
        samples: Literal["list", "rows"] = "list",
        dedupe: bool = False,
        **engine_options: Any,
    ) -> None:
        """Load the engine.

        Args:
            model: local directory or hub id.
            sampling_params: how rows are sampled; its `seed`, or 0, is the seed of the whole dataset.
            prompt_column: column of strings. A null, an empty string or another type is an error value in its row.
            too_long: what becomes of a prompt that does not fit: "error", "truncate_left" or "truncate_right".
            output_prefix: put before the names of the generated columns.
            num_cached_tokens: add that column.
            samples: with `n` above 1, "list" makes the columns of a sample lists of n values, "rows" makes n rows of each.
            dedupe: generate equal rows once; for temperature 0 or labels.
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
        sampling = _sampling_params(sampling_params)
        self._prompt = parse(PromptConfig, {"column": prompt_column, "too_long": too_long}, "option")
        columns = {"prefix": output_prefix, "num_cached_tokens": num_cached_tokens, "samples": samples}
        self._columns = choose_columns(parse(ColumnsConfig, columns, "option"), sampling, engine.reasoning)
        self._seed = sampling.seed or 0
        if dedupe:
            check_dedupe("dedupe", sampling)
        check_sampling(engine, sampling)
        self._engine = AsyncLLM(model, **engine_options)
        requests = Deduplicated(self._engine) if dedupe else self._engine
        self._rows = RowPath(requests, self._prompt, sampling)

    def __del__(self) -> None:
        """Free the engine when Ray lets go of the actor."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()

    async def __call__(self, batch: Batch) -> pa.Table:
        """Generate for a batch in any of Ray's batch formats. The result is an Arrow table: its types never depend on its rows.

        Raises:
            UserError: the prompt column is missing, or a generated column has the name of an input column.
        """
        table = batch if isinstance(batch, pa.Table) else BlockAccessor.batch_to_arrow_block(batch)
        names = table.column_names
        if self._prompt.column not in names:
            raise UserError(f"no column {self._prompt.column!r} (prompt_column): {suggest(self._prompt.column, names)}")
        check_names(names, self._columns)
        values = table[self._prompt.column].to_pylist()
        seeds = [row_seed(self._seed, str(value)) for value in values]
        results: dict[int, RowResult] = {}
        try:
            await self._rows.run(values, seeds, results.__setitem__)
        except EngineDeadError as error:
            print(f"the engine died: {error}", file=sys.stderr, flush=True)
            os._exit(ENGINE_DIED)
        return self._columns.extend(table, [results[row] for row in range(len(values))])


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
