"""The flash backend hands flash-attn what its documentation asks for: a stand-in with that interface, in torch, gives right answers.

flash-attn itself needs a GPU and is no requirement, so this is all that can be held everywhere.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.errors import UserError
from nanovllm.kernels.paged_attention import context_slots, paged_prefill_torch
from nanovllm.layers.attention import AttentionBatch, AttentionSpec
from nanovllm.layers.backends.torch_backend import TorchBackend

BLOCK_SIZE, KV_HEADS, GROUP, DIM = 16, 2, 3, 32


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    length: int,
    scale: float,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """`q` [C, H, D], the last of `length` tokens in the blocks of `table`."""
    assert window_size[1] == (-1 if window_size[0] == -1 else 0)
    slots = context_slots(table[None], k.shape[1], length)[0]
    return paged_prefill_torch(q, k, v, slots, scale, window_size[0] + 1, softcap)


def with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """`flash_attn_with_kvcache` of versions 2 (block_table) and 3 (page_table, and varlen queries)."""
    tables = block_table if page_table is None else page_table
    assert causal and tables is not None and tables.dtype == cache_seqlens.dtype == torch.int32
    if cu_seqlens_q is None:
        rows = [
            attend(q[i], k_cache, v_cache, tables[i], int(n), softmax_scale, window_size, softcap)
            for i, n in enumerate(cache_seqlens)
        ]
        return torch.stack(rows)
    starts = cu_seqlens_q.tolist()
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    return torch.cat(
        [
            attend(
                q[starts[i] : starts[i + 1]], k_cache, v_cache, tables[i], int(n), softmax_scale, window_size, softcap
            )
            for i, n in enumerate(cache_seqlens)
        ]
    )


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> torch.Tensor:
    """`flash_attn_varlen_func` of version 2 over a paged cache."""
    lens = cu_seqlens_k.diff()
    assert max_seqlen_k == int(lens.max())
    return with_kvcache(
        q,
        k,
        v,
        cache_seqlens=lens,
        softmax_scale=softmax_scale,
        causal=causal,
        block_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        window_size=window_size,
        softcap=softcap,
    )


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `name` with flash-attn's interface."""
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    module.flash_attn_with_kvcache, module.flash_attn_varlen_func = with_kvcache, varlen
    monkeypatch.setitem(sys.modules, name, module)


def test_blocks_that_version_2_cannot_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.layers.backends.flash_backend import FlashBackend

    stand_in("flash_attn", monkeypatch)
    backend = FlashBackend(4, 2, 32)
    backend.check_block_size(256)
    with pytest.raises(UserError, match=r"kvcache_block_size=64.*set kvcache_block_size=256"):
        backend.check_block_size(64)
    stand_in("flash_attn_interface", monkeypatch)
    FlashBackend(4, 2, 32).check_block_size(64)


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize(("decodes", "chunks"), [(4, 0), (0, 3), (3, 2)])
@pytest.mark.parametrize("spec", [AttentionSpec(DIM**-0.5), AttentionSpec(0.3, window=20, softcap=2.0)])
def test_flash_equals_torch(
    name: str, decodes: int, chunks: int, spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(name, monkeypatch)
    from nanovllm.layers.backends.flash_backend import FlashBackend

    generator = torch.Generator().manual_seed(decodes)
    lens = sorted(torch.randint(1, 90, (decodes,), generator=generator).tolist(), reverse=True)
    query_lens = np.array([5, 1, 40][:chunks], dtype=np.int64)
    chunk_lens = query_lens + np.array([30, 17, 0][:chunks], dtype=np.int64)
    count = decodes + chunks
    tables = torch.randperm(8 * 6, generator=generator).view(8, 6).int()
    slots = torch.randperm(8, generator=generator)[:count]
    caches = torch.randn(2, 48, BLOCK_SIZE, KV_HEADS, DIM, generator=generator)
    q = torch.randn(decodes + int(query_lens.sum()), KV_HEADS * GROUP, DIM, generator=generator)
    batch = AttentionBatch(
        tables,
        BLOCK_SIZE,
        slots[:decodes],
        torch.tensor(lens, dtype=torch.int64),
        lens,
        slots[decodes:].numpy(),
        query_lens,
        chunk_lens,
    )
    outputs = []
    for backend in (FlashBackend(KV_HEADS * GROUP, KV_HEADS, DIM), TorchBackend(KV_HEADS * GROUP, KV_HEADS, DIM)):
        backend.add_window(spec.window)
        outputs.append(backend.attend(q, caches[0], caches[1], backend.plan(batch), spec))
    torch.testing.assert_close(outputs[0], outputs[1])
