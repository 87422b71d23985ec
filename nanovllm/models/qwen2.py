"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class Qwen2ForCausalLM(CausalLM):
    """Query, key and value always have a bias, the output projection never."""

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=True, output_bias=False, qk_norm=False)
