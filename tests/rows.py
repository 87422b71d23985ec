"""Runs rows with a column `prompt` through the row path of jobs, on any engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from nanovllm import SamplingParams
from pipelines.job import PromptConfig, TooLong
from pipelines.requests import Requests
from pipelines.results import RowResult
from pipelines.rows import RowPath


@dataclass
class Settings:
    """`RequestSettings` of a job that reads the column `prompt`."""

    sampling: SamplingParams
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling_columns: dict[str, str] = field(default_factory=dict)
    sampling_column: str | None = None
    format: str = "auto"


def run_rows(
    engine: Any, values: Sequence[object], seeds: Sequence[int], sampling: SamplingParams, too_long: TooLong = "error"
) -> list[RowResult]:
    """The results of rows whose prompts are `values`, which may be no strings."""
    requests = Requests(Settings(sampling), pa.schema([("prompt", pa.string())]))
    found: dict[int, RowResult] = {}
    path = RowPath(engine, too_long)
    asyncio.run(path.run(requests, [{"prompt": value} for value in values], seeds, found.__setitem__))
    return [found[number] for number in range(len(values))]
