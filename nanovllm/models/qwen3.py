"""Qwen3, dense."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class Qwen3ForCausalLM(CausalLM):
    """Queries and keys are normalised a head before the rotation."""

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True)
