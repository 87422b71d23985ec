"""Llama 2 and 3.x, and models that use their architecture name."""

from __future__ import annotations

from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import CausalLM, SelfAttention


class LlamaForCausalLM(CausalLM):
    """Biases only where the config asks for them; Llama 3's rope scaling is in `rotary_embedding`."""

    @staticmethod
    def make_attention(
        config: ModelConfig, tp: TensorParallel, backend: AttentionBackend, rotary: RotaryEmbedding
    ) -> SelfAttention:
        """See `CausalLM.make_attention`."""
        return SelfAttention(
            config,
            tp,
            backend,
            rotary,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=False,
        )
