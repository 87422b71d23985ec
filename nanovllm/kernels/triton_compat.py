"""Triton where it is installed, and enough of a stand-in that kernel modules import where it is not.

Kernel modules take `triton` and `tl` from here; layers ask `use_triton` which of a kernel's two forms to call.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    # Fills products of fewer than 16 columns up itself.
    HAS_NARROW_PRODUCTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)
except ImportError:
    HAS_TRITON = HAS_NARROW_PRODUCTS = False
    triton = SimpleNamespace(jit=lambda function=None, **_: function if function else lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: value)


# The least compute capability that converts eight-bit floats in hardware.
FP8_CAPABILITY = (8, 9)
# Multiprocessors where there is no GPU to ask: an H200's.
DEFAULT_SMS = 132


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can take `tensor`; where not, the torch reference does."""
    return HAS_TRITON and tensor.is_cuda


def multiprocessors(device: torch.device) -> int:
    """Of a GPU, or `DEFAULT_SMS`."""
    return _count_multiprocessors(device.index or 0) if device.type == "cuda" else DEFAULT_SMS


@cache
def _count_multiprocessors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


@cache
def _device_has_pdl(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")


def use_pdl(tensor: torch.Tensor) -> bool:
    """Whether kernels on `tensor`'s device can begin while the one before ends (programmatic dependent launch, CUDA 12, Hopper).

    A kernel launched so calls `gdc_wait` before it touches what an earlier kernel made, and in all its programs, so that its
    own end means the end of all before it. It may call `gdc_launch_dependents` only after that: then everything but its direct
    predecessor is complete when a kernel starts.
    """
    return tensor.is_cuda and _device_has_pdl(tensor.device.index or 0)
