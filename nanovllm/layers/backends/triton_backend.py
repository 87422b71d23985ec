"""Attention by this project's Triton kernels: the GPU's default."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.kernels.paged_decode import (
    DecodeBuffers,
    decode_programs,
    decode_tile,
    make_decode_buffers,
    paged_decode,
    plan_decode,
    split_buffers,
)
from nanovllm.kernels.paged_prefill import most_prefill_tiles, paged_prefill, prefill_tiles
from nanovllm.layers.attention import AttentionBackend, AttentionBatch, AttentionSpec, Ints


class TritonPlan(NamedTuple):
    """The step's rows of `block_tables`; the decodes' split lies in the backend's buffers, the chunks' tiles in `tiles` (None: no
    chunks)."""

    batch: AttentionBatch
    tiles: torch.Tensor | None


class TritonBackend(AttentionBackend):
    """Split-KV decode planned on the device, and prefill by tiles listed on the host."""

    supports_graphs: ClassVar[bool] = True

    def prepare(self) -> None:
        """Buffers for the largest step."""
        self.tile = decode_tile(self.head_dim, self.dtype)
        self.programs = decode_programs(self.num_kv_heads, self.device)
        self.buffers = make_decode_buffers(
            self.max_num_seqs, self.programs, self.num_heads, self.num_kv_heads, self.head_dim, self.device
        )
        self.buffers_of: dict[int, DecodeBuffers] = {}

    def add_window(self, window: int) -> None:
        """See `AttentionBackend.add_window`. A window has a split of its own; what a launch leaves behind, all windows share."""
        if window not in self.windows:
            self.buffers_of[window] = self.buffers if not self.windows else split_buffers(self.buffers)
        super().add_window(window)

    def plan(self, batch: AttentionBatch) -> TritonPlan:
        """See `AttentionBackend.plan`."""
        decodes = len(batch.decode_slots)
        if decodes:
            for window, buffers in self.buffers_of.items():
                plan_decode(batch.decode_slots, batch.decode_lens, self.programs, buffers, self.tile, window=window)
        return TritonPlan(batch, batch.chunk_tiles)

    def chunk_tiles(self, slots: Ints, query_lens: Ints, lens: Ints) -> npt.NDArray[np.int32]:
        """See `AttentionBackend.chunk_tiles`."""
        return prefill_tiles(slots, query_lens, lens, 0, self.num_heads // self.num_kv_heads)

    def most_tiles(self, tokens: int, chunks: int) -> int:
        """See `AttentionBackend.most_tiles`."""
        return most_prefill_tiles(tokens, chunks, self.num_heads // self.num_kv_heads)

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: TritonPlan, spec: AttentionSpec
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        batch = plan.batch
        out = torch.empty_like(q)
        decodes = len(batch.decode_slots)
        if decodes:
            paged_decode(
                q[:decodes],
                k_cache,
                v_cache,
                batch.block_tables,
                self.programs,
                self.buffers_of[spec.window],
                spec.scale,
                out[:decodes],
                tile=self.tile,
                window=spec.window,
                softcap=spec.softcap,
                other_kernel_between=True,  # the one that stores the keys
            )
        if plan.tiles is not None:
            paged_prefill(
                q,
                k_cache,
                v_cache,
                batch.block_tables,
                plan.tiles,
                spec.scale,
                out,
                window=spec.window,
                softcap=spec.softcap,
            )
        return out
