"""Attention: the one interface behind which backends differ, their choice by name, and the layer models use.

A backend is asked once a step for a plan (what every layer can share: slots, masks, splits) and once a layer to attend over the
cache, which holds the step's own keys and values by then.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nanovllm.errors import UserError
from nanovllm.kernels.triton_compat import HAS_TRITON
from nanovllm.utils.context import ForwardContext
from nanovllm.utils.prefixes import Capacity, SharedPrefixes, SharingShape

Ints = npt.NDArray[np.int64]
NO_CHUNKS = np.zeros(0, dtype=np.int64)


class AttentionSpec(NamedTuple):
    """How a layer attends.

    Attributes:
        scale: what the products of queries and keys are multiplied by.
        window: tokens a query sees, the last ones up to its own; 0: all.
        softcap: a score x becomes softcap * tanh(x / softcap); 0: it stays.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


class AttentionBatch(NamedTuple):
    """One step's sequences: D decodes with a single new token each, then C prefill chunks.

    Attributes:
        block_tables: [R, W] int32 block ids on the device, one row a slot; block_size: tokens of a block.
        decode_slots, decode_lens: [D] on the device, each decode's row of `block_tables` and its tokens in the cache after
            this step (0: a padding row).
        host_decode_lens: the lengths on the host, the longest first; None where only the device knows them.
        chunk_slots, chunk_query_lens, chunk_lens: [C] on the host, rows of `block_tables`, new tokens, and tokens in the
            cache after this step.
        shares: decodes share prefixes, as `SharingBackend.load_shared` was told.
        chunk_tiles: [N, 4] int32 on the device, what `AttentionBackend.chunk_tiles` made of these, for backends that have it.
    """

    block_tables: torch.Tensor
    block_size: int
    decode_slots: torch.Tensor
    decode_lens: torch.Tensor
    host_decode_lens: list[int] | None
    chunk_slots: Ints = NO_CHUNKS
    chunk_query_lens: Ints = NO_CHUNKS
    chunk_lens: Ints = NO_CHUNKS
    chunk_tiles: torch.Tensor | None = None
    shares: bool = False


class AttentionBackend(ABC):
    """Attention over the paged cache of one model.

    Args:
        num_heads, num_kv_heads: Hq and Hkv of this rank; head_dim: D.
        max_num_seqs: most decodes of a step; device, dtype: where the cache is, and of what; eight bits have scales beside it.
        query_dtype: of queries, where it is another.
    """

    # Whether a step of decodes needs nothing of the host, so that a CUDA graph can hold it.
    supports_graphs: ClassVar[bool] = False

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_num_seqs: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        query_dtype: torch.dtype | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_num_seqs = max_num_seqs
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.query_dtype = query_dtype or dtype
        self.windows: list[int] = []
        self.prepare()

    def add_window(self, window: int) -> None:
        """Announce a layer with this `AttentionSpec.window`: plans are made for every one that there is."""
        if window not in self.windows:
            self.windows.append(window)

    def check_block_size(self, block_size: int) -> None:  # noqa: B027 - most backends take any
        """Refuse KV blocks the backend cannot read.

        Raises:
            UserError: naming those it can.
        """

    def prepare(self) -> None:  # noqa: B027 - most backends need nothing
        """Make what a backend keeps beside its shape."""

    def chunk_tiles(self, slots: Ints, query_lens: Ints, lens: Ints) -> npt.NDArray[np.int32]:
        """What the backend must know of a step's chunks: [n, 4], with rows, in the second column, counted from the first chunk's
        first token. None for backends that plan with the lengths. A row of zeros is work that nobody sees."""
        return np.zeros((0, 4), dtype=np.int32)

    def most_tiles(self, tokens: int, chunks: int) -> int:
        """Most rows of `chunk_tiles` for so many tokens of so many chunks; 0 where chunks cannot be part of a CUDA graph."""
        return 0

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> Any:
        """What all layers of a step share; kept in `ForwardContext.attention_plan`. A plan lasts until the next one."""

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: Any,
        spec: AttentionSpec,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`q` [T, Hq, D] over the caches [N, P, Hkv, D] -> [T, Hq, D]; decodes' rows first, then the chunks' rows.

        `scales` [N, Hkv, P, 2] are those of a cache in eight bits.
        """


class SharingBackend(AttentionBackend):
    """A backend that can attend once to what several decodes share."""

    @classmethod
    @abstractmethod
    def sharing_shape(cls, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> SharingShape:
        """Into what items of work sharing is cut, on a rank with these heads and a cache of `dtype`."""

    @abstractmethod
    def enable_sharing(self, capacity: Capacity, slots: int) -> None:
        """Make room for what decodes may share, see `load_shared`; `slots` are the rows of the block tables."""

    @abstractmethod
    def load_shared(self, shared: SharedPrefixes) -> None:
        """What the decodes of the steps from here on share, where `AttentionBatch.shares`."""


def available_backends(device: torch.device) -> list[str]:
    """Names of the backends that can run on `device` here, the preferred one first."""
    names = ["torch"]
    if HAS_TRITON and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        # Interpreted, it is for tests only.
        names.insert(0 if device.type == "cuda" else 1, "triton")
    if device.type == "cuda" and (find_spec("flash_attn_interface") or find_spec("flash_attn")):
        names.append("flash")
    return names


def select_backend(name: str, device: torch.device) -> type[AttentionBackend]:
    """The backend called `name`; "auto" takes the fastest there is.

    Raises:
        UserError: a backend this installation does not have.
    """
    names = available_backends(device)
    if name == "auto":
        name = names[0]
    if name not in names:
        raise UserError(
            f"attention_backend={name!r} is not available here; available: {', '.join(sorted(names))}; use auto"
        )
    # Imported by name: a backend's packages need not be there for the others.
    if name == "triton":
        from nanovllm.layers.backends.triton_backend import TritonBackend

        return TritonBackend
    if name == "flash":
        from nanovllm.layers.backends.flash_backend import FlashBackend

        return FlashBackend
    from nanovllm.layers.backends.torch_backend import TorchBackend

    return TorchBackend


class Attention(nn.Module):
    """One layer's cache and its use. The runner sets `k_cache` and `v_cache` [N, P, Hkv, D], and the `scales` of a cache in eight
    bits, after sizing the pool."""

    def __init__(self, backend: AttentionBackend, spec: AttentionSpec) -> None:
        super().__init__()
        self.backend = backend
        self.spec = spec
        backend.add_window(spec.window)
        self.k_cache = torch.empty(0)
        self.v_cache = torch.empty(0)
        self.scales: torch.Tensor | None = None

    def forward(self, q: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`q` [T, Hq, D] of the new tokens, whose keys and values are in the cache -> [T, Hq * D]."""
        plan = context.attention_plan
        return self.backend.attend(q, self.k_cache, self.v_cache, plan, self.spec, self.scales).flatten(1)
