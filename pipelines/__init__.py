"""Dataset jobs on Ray Data: the `generate.py` command and `NanoVLLMPredictor` for `map_batches`.

The predictor is imported on first use, so that `import pipelines` loads neither torch nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.predictor import NanoVLLMPredictor

__all__ = ["NanoVLLMPredictor"]


def __getattr__(name: str) -> Any:
    if name == "NanoVLLMPredictor":
        from pipelines.predictor import NanoVLLMPredictor

        return NanoVLLMPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
