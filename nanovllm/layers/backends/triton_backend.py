"""Attention by this project's Triton kernels: the GPU's default."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm.kernels.paged_decode import (
    DecodeBuffers,
    decode_launch,
    decode_programs,
    decode_tile,
    make_decode_buffers,
    paged_decode,
    plan_decode,
    split_buffers,
)
from nanovllm.kernels.paged_prefill import most_prefill_tiles, paged_prefill, prefill_tiles
from nanovllm.kernels.shared_prefix import PROGRAMS_PER_SM as SHARED_PROGRAMS_PER_SM
from nanovllm.kernels.shared_prefix import SharedBuffers, attend_shared, make_shared_buffers, members_of_tile
from nanovllm.layers.attention import AttentionBatch, AttentionSpec, Ints, SharingBackend
from nanovllm.utils.prefixes import Capacity, SharedPrefixes, SharingShape
from nanovllm.utils.transfer import to_device


class TritonPlan(NamedTuple):
    """The step's rows of `block_tables`; the decodes' split lies in the backend's buffers, the chunks' tiles in `tiles` (None: no
    chunks)."""

    batch: AttentionBatch
    tiles: torch.Tensor | None


class TritonBackend(SharingBackend):
    """Split-KV decode planned on the device, and prefill by tiles listed on the host."""

    supports_graphs: ClassVar[bool] = True

    def prepare(self) -> None:
        """Buffers for the largest step."""
        self.launch = decode_launch(self.dtype, self.query_dtype, self.num_heads // self.num_kv_heads)
        self.tile = decode_tile(self.head_dim, self.dtype, self.launch)
        self.programs = decode_programs(self.num_kv_heads, self.device, self.launch.programs_per_sm)
        self.buffers = make_decode_buffers(
            self.max_num_seqs, self.programs, self.num_heads, self.num_kv_heads, self.head_dim, self.device
        )
        self.buffers_of: dict[int, DecodeBuffers] = {}
        self.shared_programs = decode_programs(self.num_kv_heads, self.device, SHARED_PROGRAMS_PER_SM)
        self.shared: SharedBuffers | None = None

    def add_window(self, window: int) -> None:
        """See `AttentionBackend.add_window`. A window has a split of its own; what a launch leaves behind, all windows share."""
        if window not in self.windows:
            self.buffers_of[window] = self.buffers if not self.windows else split_buffers(self.buffers)
        super().add_window(window)

    @classmethod
    def sharing_shape(cls, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> SharingShape:
        """See `SharingBackend.sharing_shape`. Whoever plans may have no GPU to ask how many programs it runs."""
        items = decode_programs(num_kv_heads, torch.device("cpu"), SHARED_PROGRAMS_PER_SM)
        return SharingShape(
            members_of_tile(num_heads // num_kv_heads), items, 2 * num_kv_heads * head_dim * dtype.itemsize
        )

    def enable_sharing(self, capacity: Capacity, slots: int) -> None:
        """See `SharingBackend.enable_sharing`."""
        self.shared = make_shared_buffers(*capacity, slots, self.num_heads, self.head_dim, self.device)

    def load_shared(self, shared: SharedPrefixes) -> None:
        """See `SharingBackend.load_shared`."""
        buffers = self.shared
        assert buffers is not None
        count = np.array([len(shared.items)], dtype=np.int32)
        arrays = (count, shared.items.ravel(), shared.members, shared.rows.ravel())
        packed = to_device(np.concatenate(arrays), self.device)
        num_items, items, members, rows = packed.split([array.size for array in arrays])
        buffers.num_items.copy_(num_items)
        buffers.items.view(-1)[: len(items)].copy_(items)
        buffers.members[: len(members)].copy_(members)
        slots, *numbers = rows.view(4, -1)
        for target, own in zip((buffers.skipped, buffers.entries, buffers.counts), numbers, strict=True):
            target[slots.long()] = own

    def plan(self, batch: AttentionBatch) -> TritonPlan:
        """See `AttentionBackend.plan`."""
        decodes = len(batch.decode_slots)
        if decodes:
            for window, buffers in self.buffers_of.items():
                shared = self.shared if batch.shares and not window else None
                plan_decode(
                    batch.decode_slots,
                    batch.decode_lens,
                    self.programs,
                    buffers,
                    self.tile,
                    window=window,
                    shared=shared,
                )
        return TritonPlan(batch, batch.chunk_tiles)

    def chunk_tiles(self, slots: Ints, query_lens: Ints, lens: Ints) -> npt.NDArray[np.int32]:
        """See `AttentionBackend.chunk_tiles`."""
        return prefill_tiles(slots, query_lens, lens, 0, self.num_heads // self.num_kv_heads)

    def most_tiles(self, tokens: int, chunks: int) -> int:
        """See `AttentionBackend.most_tiles`."""
        return most_prefill_tiles(tokens, chunks, self.num_heads // self.num_kv_heads)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: TritonPlan,
        spec: AttentionSpec,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        batch = plan.batch
        out = torch.empty_like(q)
        decodes = len(batch.decode_slots)
        if decodes:
            shared = self.shared if batch.shares and not spec.window else None
            if shared is not None:
                attend_shared(
                    q[:decodes],
                    k_cache,
                    v_cache,
                    batch.block_tables,
                    shared,
                    spec.scale,
                    spec.softcap,
                    scales,
                    programs=self.shared_programs,
                    other_kernel_between=True,  # the one that stores the keys
                )
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
                launch=self.launch,
                window=spec.window,
                softcap=spec.softcap,
                shared=shared,
                scales=scales,
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
                scales=scales,
            )
        return out
