"""Architecture name (as in `config.json`) to model class. The only place that knows every family; used by preflight and runner."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.models import variants
from nanovllm.models.config import ModelConfig

if TYPE_CHECKING:
    from nanovllm.models.decoder import CausalLM


@dataclass(frozen=True)
class Family:
    """Where a family's class is, and how its `config.json` is read.

    Attributes:
        config_defaults: values the file may leave out (transformers' defaults).
        refine: adds what the file says beyond the common keys, see `variants`.
        activation: the one the file must name; windows, partial_rotary: whether it may ask for those.
    """

    module: str
    class_name: str
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    refine: Callable[[ModelConfig, Mapping[str, Any], Path], ModelConfig] | None = None
    activation: str = "silu"
    windows: bool = False
    partial_rotary: bool = False

    def load(self) -> type[CausalLM]:
        """Import the model class (imports torch)."""
        cls: type[CausalLM] = getattr(importlib.import_module(self.module), self.class_name)
        return cls


_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "nanovllm.models.llama", "LlamaForCausalLM", {"max_position_embeddings": 2048, "eos_token_id": 2}
    ),
    "Qwen2ForCausalLM": Family(
        "nanovllm.models.qwen2",
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        variants.qwen,
        windows=True,
    ),
    "Qwen3ForCausalLM": Family(
        "nanovllm.models.qwen3",
        "Qwen3ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        variants.qwen,
        windows=True,
    ),
    "GraniteForCausalLM": Family(
        "nanovllm.models.granite",
        "GraniteForCausalLM",
        {"max_position_embeddings": 2048, "eos_token_id": 2},
        variants.granite,
    ),
    "SmolLM3ForCausalLM": Family(
        "nanovllm.models.smollm3",
        "SmolLM3ForCausalLM",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "eos_token_id": 128001,
        },
        variants.smollm3,
        windows=True,
    ),
    "Phi3ForCausalLM": Family(
        "nanovllm.models.phi3",
        "Phi3ForCausalLM",
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000},
        variants.phi3,
        windows=True,
        partial_rotary=True,
    ),
    "MistralForCausalLM": Family(
        "nanovllm.models.mistral",
        "MistralForCausalLM",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, "eos_token_id": 2},
        variants.mistral,
        windows=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        "nanovllm.models.qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 4},
        variants.qwen3_moe,
        windows=True,
    ),
    "MixtralForCausalLM": Family(
        "nanovllm.models.mixtral",
        "MixtralForCausalLM",
        {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "eos_token_id": 2,
        },
        variants.mixtral,
        windows=True,
    ),
    "Gemma2ForCausalLM": Family(
        "nanovllm.models.gemma2",
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        variants.gemma2,
        activation="gelu_pytorch_tanh",
        windows=True,
    ),
    "Gemma3ForCausalLM": Family(
        "nanovllm.models.gemma3",
        "Gemma3ForCausalLM",
        {**_GEMMA, "max_position_embeddings": 131072, "rope_theta": 1000000.0},
        variants.gemma3,
        activation="gelu_pytorch_tanh",
        windows=True,
    ),
}
