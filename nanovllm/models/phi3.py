"""Phi-3, Phi-3.5 and Phi-4 (mini too), text only."""

from __future__ import annotations

from typing import ClassVar

from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class Phi3ForCausalLM(CausalLM):
    """The checkpoint holds the fused projections as they are here; rotary parts and LongRoPE are in `rotary_embedding`."""

    packed_modules: ClassVar[dict[str, tuple[str, str]]] = {}

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=False, output_bias=False, qk_norm=False)
