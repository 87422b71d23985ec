"""Plain torch attention: the reference, and the CPU's path."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.paged_attention import context_slots, paged_decode_torch, paged_prefill_torch
from nanovllm.layers.attention import AttentionBackend, AttentionBatch, AttentionSpec


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
    """Decodes run as one batched call for each group of similar lengths, which the host must know."""

    # A group's shortest context is at least this part of its longest, which bounds the padding read for nothing.
    min_fill = 0.7
    # On a CPU a group's keys, copied together, stay within a core's cache until they are used (bench/NOTES.md).
    max_group_elements = 1 << 19
    # Longer than any context.
    no_window = 1 << 40

    def plan(self, batch: AttentionBatch) -> dict[int, TorchPlan]:
        """See `AttentionBackend.plan`: one for every window."""
        return {window: self._plan(batch, window) for window in self.windows}

    def _plan(self, batch: AttentionBatch, window: int) -> TorchPlan:
        lens = batch.host_decode_lens
        assert lens is not None
        window = window or self.no_window
        decodes: list[_Span] = []
        start = 0
        while start < len(lens):
            end = start + 1
            longest = lens[start]
            most = min(len(lens), start + max(1, self._max_group_rows(batch, min(longest, window))))
            while end < most:
                length = min(lens[end], window)
                if length < self.min_fill * (longest - (lens[end] - length)):
                    break
                end += 1
            decodes.append(self._decode_span(batch, lens[start:end], start, window))
            start = end
        prefills: list[_Span] = []
        for slot, query_len, length in zip(
            batch.chunk_slots.tolist(), batch.chunk_query_lens.tolist(), batch.chunk_lens.tolist(), strict=True
        ):
            first = max(0, length - query_len - window + 1)
            slots = context_slots(batch.block_tables[slot : slot + 1], batch.block_size, length, first)
            prefills.append(_Span(start, start + query_len, slots[0]))
            start += query_len
        return TorchPlan(decodes, prefills)

    def _max_group_rows(self, batch: AttentionBatch, longest: int) -> int:
        if batch.block_tables.device.type != "cpu":
            return len(batch.decode_slots)
        return self.max_group_elements // (longest * self.num_kv_heads * self.head_dim)

    @staticmethod
    def _decode_span(batch: AttentionBatch, lens: list[int], start: int, window: int) -> _Span:
        end = start + len(lens)
        longest, first = lens[0], max(0, lens[-1] - window)
        slots = context_slots(batch.block_tables[batch.decode_slots[start:end]], batch.block_size, longest, first)
        if lens[-1] == longest:
            return _Span(start, end, slots)
        positions, row_lens = torch.arange(first, longest, device=slots.device), batch.decode_lens[start:end, None]
        mask = positions < row_lens
        if longest > window:
            mask &= positions >= row_lens - window
        return _Span(start, end, slots, mask)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: dict[int, TorchPlan],
        spec: AttentionSpec,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        scale, window, softcap = spec
        out = torch.empty_like(q)
        for start, end, slots, mask in plan[window].decodes:
            out[start:end] = paged_decode_torch(q[start:end], k_cache, v_cache, slots, mask, scale, softcap, scales)
        for start, end, slots, _ in plan[window].prefills:
            out[start:end] = paged_prefill_torch(q[start:end], k_cache, v_cache, slots, scale, window, softcap, scales)
        return out
