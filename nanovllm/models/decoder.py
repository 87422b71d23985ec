"""The decoder-only transformer all families here share; a family's file says only where it differs.

Shapes: T tokens of the step (all sequences, flat), H hidden size, S sequences that sample in this step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from nanovllm.kernels.qk_norm_rope import qk_norm_rope_store, qk_norm_rope_store_torch
from nanovllm.kernels.triton_compat import use_triton
from nanovllm.layers.attention import Attention, AttentionBackend, AttentionSpec
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import GatedColumnParallelLinear, RowParallelLinear, qkv_parallel_linear
from nanovllm.layers.moe import SparseMoe
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.quantized import RoundedRows, UnscaledSums
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import ModelConfig, RopeConfig
from nanovllm.models.quantization import WeightFormat
from nanovllm.utils.context import ForwardContext


class AttentionKind(NamedTuple):
    """Which biases a family's attention has, and whether queries and keys are normalised a head."""

    qkv_bias: bool
    output_bias: bool
    qk_norm: bool


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, biases and query/key norms as the family has them.

    Args:
        spec: how this layer attends; rotary: its positions; norm_class: of queries and keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        backend: AttentionBackend,
        rotary: RotaryEmbedding,
        kind: AttentionKind,
        spec: AttentionSpec,
        norm_class: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__()
        self.qkv_proj = qkv_parallel_linear(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, kind.qkv_bias, tp
        )
        self.o_proj = RowParallelLinear(
            config.num_heads * config.head_dim, config.hidden_size, kind.output_bias, tp, slot=0
        )
        self.norm_eps = config.rms_norm_eps
        self.q_norm = norm_class(config.head_dim, config.rms_norm_eps) if kind.qk_norm else None
        self.k_norm = norm_class(config.head_dim, config.rms_norm_eps) if kind.qk_norm else None
        self.rotary = rotary
        self.attn = Attention(backend, spec)

    @property
    def takes_rounded(self) -> WeightFormat | None:
        """See `ParallelLinear.takes_rounded`."""
        return self.qkv_proj.takes_rounded

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor | RoundedRows, context: ForwardContext
    ) -> torch.Tensor | UnscaledSums:
        """[T, H] -> [T, H]."""
        qkv = self.qkv_proj(hidden)
        norm_rope_store = qk_norm_rope_store if use_triton(qkv) else qk_norm_rope_store_torch
        q = norm_rope_store(
            qkv,
            positions,
            self.rotary.cos,
            self.rotary.sin,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.norm_eps,
            self.attn.k_cache,
            self.attn.v_cache,
            context.slot_mapping,
            self.attn.scales,
        )
        out: torch.Tensor | UnscaledSums = self.o_proj(self.attn(q, context))
        return out


class MLP(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = GatedColumnParallelLinear(
            config.hidden_size, config.intermediate_size, config.mlp_bias, tp, config.activation
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, config.mlp_bias, tp, slot=1)

    @property
    def takes_rounded(self) -> WeightFormat | None:
        """See `ParallelLinear.takes_rounded`."""
        return self.gate_up_proj.takes_rounded

    def forward(self, hidden: torch.Tensor | RoundedRows) -> torch.Tensor | UnscaledSums:
        """[T, H] -> [T, H]."""
        inner = self.gate_up_proj(hidden, self.down_proj.takes_rounded)
        out: torch.Tensor | UnscaledSums = self.down_proj(inner)
        return out


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward blocks; the residual travels beside the hidden states."""

    norm_class: ClassVar[type[RMSNorm]] = RMSNorm
    # Whether the last block's output is this rank's partial sums, which the next layer's norm or the final one adds up.
    partial_sums: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, attention: SelfAttention, mlp: MLP | SparseMoe, tp: TensorParallel) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps, tp)
        self.post_attention_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps, tp)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, as the feed-forward block's partial sums, and residual [T, H] after this layer."""
        normed, residual = self.input_layernorm.add_norm_rounded(hidden, residual, self.self_attn.takes_rounded)
        hidden = self.self_attn(positions, normed, context)
        normed, residual = self.post_attention_layernorm.add_norm_rounded(hidden, residual, self.mlp.takes_rounded)
        return self.mlp(normed), residual


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer], norm: RMSNorm, tp: TensorParallel) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.embedding_scale = config.embedding_scale
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T] token ids and positions -> [T, H]."""
        hidden, residual = self.embed_tokens(token_ids), None
        if self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual, context)
        hidden, _ = self.norm.add_norm(hidden, residual)
        return hidden


class CausalLM(nn.Module, ABC):
    """A whole model of one rank. Families subclass it and say which attention they have, and what else is theirs.

    Args:
        config: shapes of the unsharded model.
        tp: this rank's place among the tensor-parallel ranks.
        backend: the attention implementation, shared by all layers.
        max_position: positions the rotary table holds (the engine's `max_model_len`).
    """

    # Checkpoint name of a part of a fused layer -> the fused parameter's name and the part's name inside it.
    packed_modules: ClassVar[dict[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }
    # The same for an expert's matrices, whose names in the checkpoint end in .experts.NUMBER.NAME.weight.
    expert_parts: ClassVar[dict[str, tuple[str, str]]] = {
        "gate_proj": ("gate_up", "gate"),
        "up_proj": ("gate_up", "up"),
        "down_proj": ("down", "down"),
    }
    # Modules here -> what the checkpoint calls them.
    renamed: ClassVar[dict[str, str]] = {}
    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, config: ModelConfig, tp: TensorParallel, backend: AttentionBackend, max_position: int) -> None:
        super().__init__()
        kind, layer_class = self.attention_kind(config), self.layer_class
        rotaries: list[tuple[RopeConfig | None, RotaryEmbedding]] = []
        layers = []
        for index, layer in enumerate(config.layers):
            rotary = next((rotary for rope, rotary in rotaries if rope == layer.rope), None)
            if rotary is None:
                rotary = RotaryEmbedding(layer.rope, config.head_dim, max_position)
                rotaries.append((layer.rope, rotary))
            # A window that no sequence outgrows is none.
            window = layer.window if layer.window < max_position else 0
            spec = AttentionSpec(config.attention_scale or config.head_dim**-0.5, window, config.attention_softcap)
            attention = SelfAttention(config, tp, backend, rotary, kind, spec, layer_class.norm_class)
            layers.append(layer_class(config, attention, self.make_mlp(config, index, tp), tp))
        norm = layer_class.norm_class(config.hidden_size, config.rms_norm_eps, tp if layer_class.partial_sums else None)
        self.model = Decoder(config, layers, norm, tp)
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, tp, config.logit_scale, config.logit_softcap
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    @abstractmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """The attention this family has."""

    def make_mlp(self, config: ModelConfig, index: int, tp: TensorParallel) -> MLP | SparseMoe:
        """The feed-forward block of layer `index`: [T, H] -> [T, H], as partial sums."""
        if config.layers[index].sparse:
            assert config.moe is not None
            return SparseMoe(config.hidden_size, config.moe, tp, slot=1)
        return MLP(config, tp)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T] token ids and positions -> hidden states [T, H]."""
        hidden: torch.Tensor = self.model(token_ids, positions, context)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, H] -> logits [S, rows] of this rank's part of the vocabulary, see `ParallelLMHead`."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits
