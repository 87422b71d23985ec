"""Gemma 2, and the layer that Gemma 3 has too."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.layernorm import RMSNorm, UnitOffsetRMSNorm
from nanovllm.layers.moe import SparseMoe
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import MLP, AttentionKind, CausalLM, DecoderLayer, SelfAttention
from nanovllm.utils.context import ForwardContext


class GemmaLayer(DecoderLayer):
    """A norm before each block and one after it, so that sums over ranks are taken there and the residual adds what is whole."""

    norm_class: ClassVar[type[RMSNorm]] = UnitOffsetRMSNorm
    partial_sums: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, attention: SelfAttention, mlp: MLP | SparseMoe, tp: TensorParallel) -> None:
        super().__init__(config, attention, mlp, tp)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = self.norm_class(size, eps)
        self.pre_feedforward_layernorm = self.norm_class(size, eps)
        self.post_feedforward_layernorm = self.norm_class(size, eps, tp)
        assert isinstance(mlp, MLP)
        attention.o_proj.splits = mlp.down_proj.splits = False

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, whole, and residual [T, H] after this layer."""
        normed, residual = self.input_layernorm.add_norm_rounded(hidden, residual, self.self_attn.takes_rounded)
        hidden = self.post_attention_layernorm.reduce_norm(self.self_attn(positions, normed, context))
        normed, residual = self.pre_feedforward_layernorm.add_norm_rounded(hidden, residual, self.mlp.takes_rounded)
        return self.post_feedforward_layernorm.reduce_norm(self.mlp(normed)), residual


class Gemma2ForCausalLM(CausalLM):
    """Windows in every other layer, soft caps and the embedding's scale come from `variants.gemma2`."""

    layer_class: ClassVar[type[DecoderLayer]] = GemmaLayer

    def __init__(self, config: ModelConfig, tp: TensorParallel, backend: AttentionBackend, max_position: int) -> None:
        # Rounded as the model's own type rounds it.
        scale = torch.tensor(config.embedding_scale, dtype=torch.get_default_dtype(), device="cpu")
        super().__init__(replace(config, embedding_scale=float(scale)), tp, backend, max_position)

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=False)
