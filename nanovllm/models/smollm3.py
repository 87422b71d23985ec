"""SmolLM3: a Llama in which every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class SmolLM3ForCausalLM(CausalLM):
    """Which layers those are is in `variants.smollm3`."""

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=False)
