"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import CausalLM, SelfAttention


class Qwen2ForCausalLM(CausalLM):
    """Query, key and value always have a bias, the output projection never."""

    @staticmethod
    def make_attention(
        config: ModelConfig, tp: TensorParallel, backend: AttentionBackend, rotary: RotaryEmbedding
    ) -> SelfAttention:
        """See `CausalLM.make_attention`."""
        return SelfAttention(config, tp, backend, rotary, qkv_bias=True, output_bias=False, qk_norm=False)
