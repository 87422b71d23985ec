"""Granite 3.x, dense: a Llama with four multipliers."""

from __future__ import annotations

from dataclasses import replace

from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import AttentionKind, CausalLM


class GraniteForCausalLM(CausalLM):
    """The residual is kept divided by its multiplier m, so that a block's output is added as it is and costs nothing more.

    The embedding is divided once; the norms, which look at nothing else, undo it: norm(m * r, eps) = norm(r, eps / m ** 2).
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, backend: AttentionBackend, max_position: int) -> None:
        m = config.residual_scale
        config = replace(
            config,
            embedding_scale=config.embedding_scale / m,
            rms_norm_eps=config.rms_norm_eps / m**2,
            residual_scale=1.0,
        )
        super().__init__(config, tp, backend, max_position)

    @staticmethod
    def attention_kind(config: ModelConfig) -> AttentionKind:
        """See `CausalLM.attention_kind`."""
        return AttentionKind(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=False)
