"""Activations in 8 bits, each row with scales of its own, SwiGLU's on the way if asked. Called by `layers.quantized` before a
product with 8-bit weights.

T rows of K columns; a scale for a whole row, or for each `group` of its columns. Scales [K / group, T] lie as a product's tiles read them.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# The largest number of each type; scales map the largest of what shares one to it.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Of what shares a scale, so that zeros have one too.
LEAST_SCALE = 1e-10


def quantize_rows_torch(
    x: torch.Tensor, dtype: torch.dtype, group: int = 0, largest: float | None = None, *, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [T, K] in 8 bits.

    Args:
        dtype: one of `LARGEST`; group: columns that share a scale, which K is a multiple of; 0: a row's all do.
        largest: number to use, where it is not that of `dtype`.
        gated: `x` is [T, 2 * K], and silu of its first half times the second is to be in 8 bits.

    Returns:
        Numbers [T, K] of `dtype` and scales [K / group, T] float32: their product is `x`, rounded.
    """
    x = silu_and_mul_torch(x) if gated else x
    tokens, columns = x.shape
    grouped = x.float().view(tokens, columns // (group or columns), group or columns)
    scale = (grouped.abs().amax(-1) / (largest or LARGEST[dtype])).clamp_min(LEAST_SCALE)
    numbers = (grouped * scale.reciprocal().unsqueeze(-1)).view(tokens, columns)
    if dtype == torch.int8:
        numbers = torch.floor(numbers + 0.5)
    return numbers.to(dtype), scale.t().contiguous()


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, group: int = 0, *, gated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantize_rows_torch`; `group` is a power of two."""
    tokens, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
    assert x.stride(1) == 1 and columns % (group or columns) == 0
    numbers = torch.empty(tokens, columns, dtype=dtype, device=x.device)
    scale = torch.empty(columns // (group or columns), tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    pdl = use_pdl(x)
    _quantize_rows_kernel[(tokens,)](
        x,
        numbers,
        scale,
        tokens,
        columns,
        x.stride(0),
        LARGEST=LARGEST[dtype],
        LEAST_SCALE=LEAST_SCALE,
        GROUP=group or block,
        INTEGER=dtype == torch.int8,
        GATED=gated,
        BLOCK=block,
        CUDA=x.is_cuda,
        PDL=pdl,
        launch_pdl=pdl,
        # Few rows do not occupy the device, so each has more threads.
        num_warps=min(max(block // 256, 1), 16 if tokens <= 256 else 8),
    )
    return numbers, scale


@triton.jit(do_not_specialize=["tokens"])
def _quantize_rows_kernel(
    x_ptr,
    numbers_ptr,
    scale_ptr,
    tokens,
    columns,
    stride_x,
    LARGEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    INTEGER: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    CUDA: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < columns
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_ptr += row * stride_x
    loaded = tl.load(x_ptr + column, mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    if GATED:
        # Rounded where silu and the product are in torch.
        up = tl.load(x_ptr + columns + column, mask=inside, other=0.0).to(tl.float32)
        x = (silu(x, CUDA).to(loaded.dtype).to(tl.float32) * up).to(loaded.dtype).to(tl.float32)
    numbers, scale = rounded(x, LARGEST, LEAST_SCALE, INTEGER, CUDA)
    tl.store(numbers_ptr + row * columns + column, numbers.to(numbers_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + group.to(tl.int64) * tokens + row, scale, mask=group * GROUP < columns)


@triton.jit
def silu(x, CUDA: tl.constexpr):
    """`x` float32 / (1 + exp(-x)); on CUDA a quotient of two instructions in place of eight, within 2**-22."""
    if CUDA:
        return tl.extra.cuda.libdevice.fast_dividef(x, 1.0 + tl.exp(-x))
    else:  # noqa: RET505 - only one branch is compiled
        return x / (1.0 + tl.exp(-x))


@triton.jit
def rounded(x, LARGEST: tl.constexpr, LEAST_SCALE: tl.constexpr, INTEGER: tl.constexpr, CUDA: tl.constexpr):
    """`x` [groups, columns] float32 as numbers to be cast to 8 bits, and a scale for each group."""
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, LEAST_SCALE)
    numbers = x * (1.0 / scale)[:, None]
    if INTEGER:
        numbers = tl.floor(numbers + 0.5)
    elif not CUDA:
        # The product may lie a little above the largest number, which only CUDA's cast takes for that.
        numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
    return numbers, scale
