"""Attention: the one interface behind which backends differ, the backends by name, and the layer models use.

A backend is asked once a step for a plan (what every layer can share: slots, masks, splits) and once a layer to store the new
keys and values and attend over the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn

from nanovllm.errors import UserError
from nanovllm.kernels.paged_attention import context_slots, paged_decode_torch, paged_prefill_torch, store_kv_torch
from nanovllm.utils.context import ForwardContext


class AttentionBatch(NamedTuple):
    """One step's B sequences, the `num_decodes` with a single new token first, longest context first among them.

    Attributes:
        query_lens: new tokens of each sequence; context_lens: its tokens in the cache after this step, on the host.
        block_tables: [B, W] block ids, rows padded at their end, on the device.
        block_size: tokens of a block.
    """

    num_decodes: int
    query_lens: list[int]
    context_lens: list[int]
    block_tables: torch.Tensor
    block_size: int


class AttentionBackend(ABC):
    """Attention over the paged cache of one model; the head counts (Hq, Hkv) are this rank's, D is `head_dim`."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> Any:
        """What all layers of a step share; kept in `ForwardContext.attention_plan`."""

    @abstractmethod
    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write `k`, `v` [T, Hkv, D] into the caches [N, P, Hkv, D]."""

    @abstractmethod
    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: Any) -> torch.Tensor:
        """`q` [T, Hq, D] over the caches -> [T, Hq, D]; decodes' rows first, then the prefill chunks' rows."""


class _Span(NamedTuple):
    """Rows `start` to `end` of the step attend to `slots`: [B, S] and `mask` for decodes, [S] for one prefill chunk."""

    start: int
    end: int
    slots: torch.Tensor
    mask: torch.Tensor | None = None


class TorchPlan(NamedTuple):
    """Decodes grouped by similar context length, and every prefill chunk."""

    decodes: list[_Span]
    prefills: list[_Span]


class TorchBackend(AttentionBackend):
    """Plain torch: the reference, and the CPU's path. Decodes run as one batched call for each group of similar lengths."""

    # A group's shortest context is at least this part of its longest, which bounds the padding read for nothing.
    min_fill = 0.7
    # On a CPU a group's keys, copied together, stay within a core's cache until they are used (bench/NOTES.md).
    max_group_elements = 1 << 19

    def plan(self, batch: AttentionBatch) -> TorchPlan:
        """See `AttentionBackend.plan`."""
        decodes: list[_Span] = []
        start = 0
        while start < batch.num_decodes:
            longest = batch.context_lens[start]
            end = start + 1
            most = min(batch.num_decodes, start + max(1, self._max_group_rows(batch, longest)))
            while end < most and batch.context_lens[end] >= self.min_fill * longest:
                end += 1
            decodes.append(self._decode_span(batch, start, end))
            start = end
        prefills: list[_Span] = []
        for i in range(batch.num_decodes, len(batch.query_lens)):
            end = start + batch.query_lens[i]
            slots = context_slots(batch.block_tables[i : i + 1], batch.block_size, batch.context_lens[i])
            prefills.append(_Span(start, end, slots[0]))
            start = end
        return TorchPlan(decodes, prefills)

    def _max_group_rows(self, batch: AttentionBatch, longest: int) -> int:
        if batch.block_tables.device.type != "cpu":
            return batch.num_decodes
        return self.max_group_elements // (longest * self.num_kv_heads * self.head_dim)

    @staticmethod
    def _decode_span(batch: AttentionBatch, start: int, end: int) -> _Span:
        lens = batch.context_lens[start:end]
        slots = context_slots(batch.block_tables[start:end], batch.block_size, lens[0])
        if lens[-1] == lens[0]:
            return _Span(start, end, slots)
        device = slots.device
        mask = torch.arange(lens[0], device=device) < torch.tensor(lens, device=device)[:, None]
        return _Span(start, end, slots, mask)

    def store(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """See `AttentionBackend.store`."""
        store_kv_torch(k, v, k_cache, v_cache, slot_mapping)

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: TorchPlan) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        out = torch.empty_like(q)
        for start, end, slots, mask in plan.decodes:
            out[start:end] = paged_decode_torch(q[start:end], k_cache, v_cache, slots, mask, self.scale)
        for start, end, slots, _ in plan.prefills:
            out[start:end] = paged_prefill_torch(q[start:end], k_cache, v_cache, slots, self.scale)
        return out


BACKENDS: dict[str, type[AttentionBackend]] = {"torch": TorchBackend}


def select_backend(name: str) -> type[AttentionBackend]:
    """The backend called `name`; "auto" takes the fastest there is.

    Raises:
        UserError: a backend this installation does not have.
    """
    if name == "auto":
        return TorchBackend
    if name not in BACKENDS:
        raise UserError(
            f"attention_backend={name!r} is not available here; available: {', '.join(sorted(BACKENDS))}; use auto"
        )
    return BACKENDS[name]


class Attention(nn.Module):
    """One layer's cache and its use. The runner sets `k_cache` and `v_cache` [N, P, Hkv, D] after sizing the pool."""

    def __init__(self, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend
        self.k_cache = torch.empty(0)
        self.v_cache = torch.empty(0)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`q` [T, Hq, D], `k` and `v` [T, Hkv, D] of the new tokens -> [T, Hq * D]."""
        self.backend.store(k, v, self.k_cache, self.v_cache, context.slot_mapping)
        return self.backend.attend(q, self.k_cache, self.v_cache, context.attention_plan).flatten(1)
