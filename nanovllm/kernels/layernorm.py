"""Residual addition and RMSNorm in one pass over the row: the sum is rounded as the model's type, its norm is float32's.

Called by `layers.layernorm`; H is the hidden size.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanovllm.kernels.triton_compat import tl, triton, use_pdl


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of `x` [..., H] in float32, rounded to the type of `x`, then times `weight` [H] in that type."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [..., H] plus `residual` [..., H] (where there is one) -> the sum's norm and the sum, [..., H] each."""
    total = x if residual is None else x + residual
    return rms_norm_torch(total, weight, eps), total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm_torch`. The sum is a fresh tensor, or `x` itself where there is no residual."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    others = rows if residual is None else residual.reshape(-1, size)
    assert rows.stride(1) == 1 and others.stride(1) == 1 and weight.is_contiguous()
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    block = triton.next_power_of_2(size)
    pdl = use_pdl(x)
    _add_rms_norm_kernel[(len(rows),)](
        rows,
        others,
        weight,
        normed,
        total,
        rows.stride(0),
        others.stride(0),
        size,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        PDL=pdl,
        launch_pdl=pdl,
        # Eight elements a thread: 16 bytes of a 16-bit type, the widest load.
        num_warps=min(max(block // 256, 1), 16),
    )
    return normed, total


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    stride_x,
    stride_residual,
    size,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * size + column, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    normed = (x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + row * size + column, normed.to(dtype), mask=inside)
