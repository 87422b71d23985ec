"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from typing import ClassVar

from nanovllm.models.mistral import MistralForCausalLM


class MixtralForCausalLM(MistralForCausalLM):
    """A Mistral whose layers all have experts, under names of their own in the checkpoint."""

    renamed: ClassVar[dict[str, str]] = {"mlp": "block_sparse_moe"}
    expert_parts: ClassVar[dict[str, tuple[str, str]]] = {
        "w1": ("gate_up", "gate"),
        "w3": ("gate_up", "up"),
        "w2": ("down", "down"),
    }
