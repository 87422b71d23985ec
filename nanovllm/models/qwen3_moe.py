"""Qwen3 with a mixture of experts: Qwen3-30B-A3B, Qwen3-235B-A22B and others of their architecture."""

from __future__ import annotations

from nanovllm.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 whose layers have experts, but for those that `variants.qwen3_moe` finds dense."""
