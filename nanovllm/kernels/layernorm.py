"""Residual addition and RMSNorm in one pass over the row: the sum is rounded as the model's type, its norm is float32's.

Called by `layers.layernorm`; H is the hidden size.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanovllm.kernels.quantize import LARGEST, LEAST_SCALE, rounded
from nanovllm.kernels.triton_compat import tl, triton, use_pdl


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of `x` [..., H] in float32, rounded to the type of `x`, then times `weight` [H] in that type.

    A `weight` in float32 beside an `x` that is not: rounded after the product only.
    """
    if weight.dtype == torch.float32:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


# What a product is still to be multiplied by: of its rows [T] and of its columns [H], float32.
Scales = tuple[torch.Tensor, torch.Tensor]


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, scales: Scales | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a block's output to the residual, and norm the sum.

    Args:
        x: [..., H], or its S partial sums [S, ..., H] in float32; residual: [..., H], None for none (then `x` is whole).
        weight: [H] of the norm, in the model's type or float32.
        scales: [T] of rows and [H] of columns, by which `x` [T, H] is still to be multiplied; None: by nothing.

    Returns:
        The sum's norm and the sum, [..., H] each.
    """
    if residual is None:
        return rms_norm_torch(x, weight, eps), x
    if scales is not None:
        x = (x.float() * scales[0].unsqueeze(1) * scales[1]).to(residual.dtype)
    if x.dim() > residual.dim():
        x = x.sum(0).to(residual.dtype)
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, scales: Scales | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `add_rms_norm_torch`. The sum is a fresh tensor, or `x` itself where there is no residual."""
    normed, _, total = _launch(x, residual, weight, eps, scales, None, 0)
    return normed, total


def add_rms_norm_rounded(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    group: int = 0,
    scales: Scales | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `quantize_rows` makes of `add_rms_norm`'s norm, and the sum: numbers [..., H] of `dtype`, scales [H / group, T], the sum.

    The norm itself goes to memory nowhere, which the two launches would write and read.
    """
    normed, scale, total = _launch(x, residual, weight, eps, scales, dtype, group)
    assert scale is not None
    return normed, scale, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scales: Scales | None,
    dtype: torch.dtype | None,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The norm, as numbers of `dtype` where it is one; their scales then; and the sum."""
    size = x.shape[-1]
    whole = x if residual is None else residual
    splits = 1 if x.dim() == whole.dim() else len(x)
    rows, others = x.reshape(splits, -1, size), whole.reshape(-1, size)
    assert rows.stride(2) == 1 and others.stride(1) == 1 and weight.is_contiguous()
    normed = torch.empty(whole.shape, dtype=dtype or whole.dtype, device=x.device)
    total = x if residual is None else torch.empty(whole.shape, dtype=whole.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    assert size % (group or size) == 0
    scale = None
    if dtype is not None:
        scale = torch.empty(size // (group or size), len(others), dtype=torch.float32, device=x.device)
    row_scale, column_scale = scales or (None, None)
    assert scales is None or (residual is not None and splits == 1)
    pdl = use_pdl(x)
    _add_rms_norm_kernel[(len(others),)](
        rows,
        others,
        row_scale,
        column_scale,
        weight,
        normed,
        total,
        scale,
        len(others),
        rows.stride(0),
        rows.stride(1),
        others.stride(0),
        size,
        eps,
        ADD=residual is not None,
        SPLITS=splits,
        LARGEST=0.0 if dtype is None else LARGEST[dtype],
        LEAST_SCALE=LEAST_SCALE,
        GROUP=group or block,
        INTEGER=dtype == torch.int8,
        BLOCK=block,
        CUDA=x.is_cuda,
        PDL=pdl,
        launch_pdl=pdl,
        # Four elements a thread: a row is short, so its latency counts, not the width of a load.
        num_warps=min(max(block // 128, 1), 16),
    )
    return normed, scale, total


@triton.jit(do_not_specialize=["tokens", "stride_split"])
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    row_scale_ptr,
    column_scale_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    scale_ptr,
    tokens,
    stride_split,
    stride_x,
    stride_residual,
    size,
    eps,
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
    CUDA: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if column_scale_ptr is not None:
        column_scale = tl.load(column_scale_ptr + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_ptr += row * stride_x
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * stride_split + column, mask=inside, other=0.0)
    if column_scale_ptr is not None:
        x = x.to(tl.float32) * tl.load(row_scale_ptr + row) * column_scale
    dtype = total_ptr.dtype.element_ty
    x = x.to(dtype).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * size + column, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    normed = x * scale
    if weight.dtype == dtype:
        normed = normed.to(dtype).to(tl.float32)
    normed = (normed * weight.to(tl.float32)).to(dtype)
    if LARGEST > 0.0:
        grouped = tl.reshape(normed.to(tl.float32), (BLOCK // GROUP, GROUP))
        numbers, scale = rounded(grouped, LARGEST, LEAST_SCALE, INTEGER, CUDA)
        numbers = tl.reshape(numbers, (BLOCK,)).to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * size + column, numbers, mask=inside)
        group = tl.arange(0, BLOCK // GROUP)
        tl.store(scale_ptr + group.to(tl.int64) * tokens + row, scale, mask=group * GROUP < size)
    else:
        tl.store(normed_ptr + row * size + column, normed, mask=inside)
