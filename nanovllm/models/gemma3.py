"""Gemma 3, text only (Gemma3ForCausalLM: the 1B and 270M checkpoints, and what was trained from them)."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind
from nanovllm.models.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Norms of queries and keys for Gemma 2's soft caps, and rotary positions of another base in layers with a window."""

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True)
