"""Nano-vLLM: an offline batch-inference engine that can be read in an afternoon.

`LLM` is the front door for programs, `AsyncLLM` the one for actors that feed one continuous batch from many threads.
They are imported on first use, so that checking a configuration does not pay for importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm.config import EngineConfig
from nanovllm.errors import EngineDeadError, UserError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "EngineConfig", "EngineDeadError", "RequestOutput", "SamplingParams", "UserError"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from nanovllm.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from nanovllm.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
