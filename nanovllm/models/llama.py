"""Llama 2 and 3.x, and models that use their architecture name: SmolLM 1 and 2, older Mistrals, Yi."""

from __future__ import annotations

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class LlamaForCausalLM(CausalLM):
    """Biases only where the config asks for them; Llama 3's rope scaling is in `rotary_embedding`."""

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=False)
