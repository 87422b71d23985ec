"""Qwen3, dense."""

from __future__ import annotations

from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import CausalLM, SelfAttention


class Qwen3ForCausalLM(CausalLM):
    """Queries and keys are normalised a head before the rotation."""

    @staticmethod
    def make_attention(
        config: ModelConfig, tp: TensorParallel, backend: AttentionBackend, rotary: RotaryEmbedding
    ) -> SelfAttention:
        """See `CausalLM.make_attention`."""
        return SelfAttention(
            config, tp, backend, rotary, qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True
        )
