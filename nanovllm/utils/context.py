"""What a forward pass knows beside its tokens: passed down the model as an argument, never kept in a module global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ForwardContext:
    """One step's view of the paged KV cache.

    Attributes:
        slot_mapping: [T] cache slot (block * block_size + offset) each new token's key and value go to.
        attention_plan: whatever the attention backend's `plan` made of this step; shared by all layers.
    """

    slot_mapping: torch.Tensor
    attention_plan: Any
