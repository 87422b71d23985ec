"""Attention by flash-attn where it is installed: version 3 (`flash_attn_interface`) before version 2 (`flash_attn`).

Both take the paged cache as it is; the argument names are those of their `flash_attn_with_kvcache` and `flash_attn_varlen_func`
(github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from nanovllm.errors import UserError
from nanovllm.layers.attention import AttentionBackend, AttentionBatch, AttentionSpec
from nanovllm.utils.transfer import to_device


class FlashChunks(NamedTuple):
    """Prefill chunks: rows of the step they begin at, int32 [C + 1], and contexts [C] and [C + 1], block tables [C, W], longest ones."""

    query_starts: torch.Tensor
    lens: torch.Tensor
    starts: torch.Tensor
    block_tables: torch.Tensor
    max_query_len: int
    max_len: int


class FlashPlan(NamedTuple):
    """Lengths and block tables as flash-attn wants them."""

    decode_lens: torch.Tensor
    decode_block_tables: torch.Tensor
    chunks: FlashChunks | None


class FlashBackend(AttentionBackend):
    """Paged attention by flash-attn."""

    supports_graphs: ClassVar[bool] = True

    def prepare(self) -> None:
        """Find the version that is installed."""
        self.version = 3 if find_spec("flash_attn_interface") else 2
        module = import_module("flash_attn_interface" if self.version == 3 else "flash_attn")
        self.with_kvcache: Callable[..., torch.Tensor] = module.flash_attn_with_kvcache
        self.varlen: Callable[..., torch.Tensor] = module.flash_attn_varlen_func

    def check_block_size(self, block_size: int) -> None:
        """See `AttentionBackend.check_block_size`."""
        if self.version == 2 and block_size % 256:
            raise UserError(
                f"kvcache_block_size={block_size}: flash-attn 2 reads blocks of 256 tokens only; set kvcache_block_size=256, "
                "or attention_backend=auto"
            )

    def plan(self, batch: AttentionBatch) -> FlashPlan:
        """See `AttentionBackend.plan`."""
        chunks = None
        if len(batch.chunk_slots):
            count = len(batch.chunk_slots)
            # One copy for all the host knows: query starts, contexts' starts, contexts, slots.
            host = np.zeros((4, count + 1), dtype=np.int32)
            host[0, 1:] = np.cumsum(batch.chunk_query_lens)
            host[1, 1:] = np.cumsum(batch.chunk_lens)
            host[2, :count], host[3, :count] = batch.chunk_lens, batch.chunk_slots
            query_starts, starts, lens, slots = to_device(host, self.device)
            chunks = FlashChunks(
                query_starts,
                lens[:count],
                starts,
                batch.block_tables[slots[:count]],
                int(batch.chunk_query_lens.max()),
                int(batch.chunk_lens.max()),
            )
        return FlashPlan(batch.decode_lens.int(), batch.block_tables[batch.decode_slots], chunks)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: FlashPlan,
        spec: AttentionSpec,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        assert scales is None  # `EngineConfig` refuses them
        decodes, chunks = len(plan.decode_lens), plan.chunks
        options: dict[str, Any] = {"softmax_scale": spec.scale, "causal": True}
        if spec.window:  # tokens before the query's own, and after it
            options["window_size"] = (spec.window - 1, 0)
        if spec.softcap:
            options["softcap"] = spec.softcap
        out = torch.empty_like(q)
        if decodes:
            table = {"page_table" if self.version == 3 else "block_table": plan.decode_block_tables}
            out[:decodes] = self.with_kvcache(
                q[:decodes].unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=plan.decode_lens,
                **options,
                **table,
            ).squeeze(1)
        if chunks is not None and self.version == 3:
            out[decodes:] = self.with_kvcache(
                q[decodes:],
                k_cache,
                v_cache,
                cache_seqlens=chunks.lens,
                page_table=chunks.block_tables,
                cu_seqlens_q=chunks.query_starts,
                max_seqlen_q=chunks.max_query_len,
                **options,
            )
        elif chunks is not None:
            out[decodes:] = self.varlen(
                q[decodes:],
                k_cache,
                v_cache,
                cu_seqlens_q=chunks.query_starts,
                cu_seqlens_k=chunks.starts,
                max_seqlen_q=chunks.max_query_len,
                max_seqlen_k=chunks.max_len,
                **options,
                block_table=chunks.block_tables,
            )
        return out
