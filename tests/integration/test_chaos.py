"""A short play of the chaos driver. `bench/chaos.py` plays for as long as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import GenerateJob, Schedule, play
from tests.integration.jobs import SLOW, parts, table_of

FAULTS = 4


@pytest.mark.long
def test_random_faults(undisturbed: Path, dataset: Path, chat_model_dir: Path, tmp_path: Path) -> None:
    settings = [*SLOW, "run.replicas=2", "run.num_cpus=1", "engine.num_kvcache_blocks=4"]
    arguments = ["--model", str(chat_model_dir), "--input", str(dataset), *settings]
    job = GenerateJob(tmp_path, arguments)
    weights = {"actor": 1.0, "node": 1.0, "driver": 1.0, "stop": 1.0, "everything": 1.0}
    whole = table_of(undisturbed)
    schedule = Schedule(seed=42, faults=FAULTS, interval_s=0.3, weights=weights, limit_s=200)
    record = play(job, schedule, whole["id"].to_pylist(), whole)
    print(record.as_dict())
    assert record.finished
    assert record.kills == FAULTS
    assert record.failures == 0
    assert (record.rows, record.lost, record.duplicated, record.identical) == (240, 0, 0, True)
    assert parts(job.output) == parts(undisturbed)
