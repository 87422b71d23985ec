"""Architecture name (as in `config.json`) to model class. The only place that knows every family; used by preflight and runner."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.models.decoder import CausalLM


@dataclass(frozen=True)
class Family:
    """Where a family's class is, and the values its `config.json` may leave out (transformers' defaults)."""

    module: str
    class_name: str
    config_defaults: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[CausalLM]:
        """Import the model class (imports torch)."""
        cls: type[CausalLM] = getattr(importlib.import_module(self.module), self.class_name)
        return cls


ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "nanovllm.models.llama", "LlamaForCausalLM", {"max_position_embeddings": 2048, "eos_token_id": 2}
    ),
    "Qwen2ForCausalLM": Family(
        "nanovllm.models.qwen2", "Qwen2ForCausalLM", {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    ),
    "Qwen3ForCausalLM": Family(
        "nanovllm.models.qwen3",
        "Qwen3ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    ),
}
