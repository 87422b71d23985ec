"""The job of `bench/chaos.py --peer ray`: plain Ray Data with its own checkpoints and `NanoVLLMPredictor`, one start of it.

    python bench/ray_data_job.py INPUT OUTPUT CHECKPOINTS COUNTS BLOCKS SETTINGS

SETTINGS are JSON: `model`, `sampling_params` and options of `EngineConfig`. BLOCKS is what `read_parquet` cuts the input into.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipelines import NanoVLLMPredictor
from tests.counting import CountingLLM

ROOT = Path(__file__).resolve().parent.parent


class CountingPredictor(NanoVLLMPredictor):
    """Its engine notes every row that it finishes."""

    def __init__(self, counts: str, **settings: Any) -> None:
        import pipelines.predictor

        # In the actor's own process: the engine of all predictors made here.
        pipelines.predictor.AsyncLLM = lambda model, **options: CountingLLM(counts, model, **options)  # type: ignore[assignment,misc]
        super().__init__(**settings)


def main() -> None:
    source, output, checkpoints, counts, blocks, settings = sys.argv[1:]
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    from bench.ray_data_job import CountingPredictor as Predictor  # by its importable name, which actors find it by

    ray.init(
        address=os.environ["RAY_ADDRESS"],
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Kept at the end, so that a kill between the last row and the driver's exit does not start the job afresh.
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=checkpoints, delete_checkpoint_on_success=False
    )
    dataset = ray.data.read_parquet(source, override_num_blocks=int(blocks)).map_batches(
        Predictor,
        fn_constructor_kwargs={"counts": counts, **json.loads(settings)},
        batch_size=None,
        num_cpus=1,
        compute=ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=4),
    )
    dataset.write_parquet(output)


if __name__ == "__main__":
    main()
