"""Mistral 7B and its successors, with a sliding window (version 0.1) or without."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class MistralForCausalLM(CausalLM):
    """No biases; the window is in `variants.mistral`."""

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=False, output_bias=False, qk_norm=False)
