"""Triton where it is installed, and enough of a stand-in that kernel modules import where it is not.

Kernel modules take `triton` and `tl` from here; layers ask `use_triton` which of a kernel's two forms to call.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can take `tensor`; where not, the torch reference does."""
    return HAS_TRITON and tensor.is_cuda
