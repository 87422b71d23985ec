"""SwiGLU's gate in one pass, silu(gate) * up, and GeGLU's. Called by `layers.activation`; I is the intermediate size."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nanovllm.kernels.triton_compat import tl, triton, use_pdl


def silu_and_mul_torch(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I] holding gate and up side by side -> silu(gate) * up, [T, I]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_and_mul_torch(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 * I] holding gate and up side by side -> gelu(gate) * up, [T, I]; gelu by tanh's approximation."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `silu_and_mul_torch`."""
    return _gate(x, gelu=False)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `gelu_and_mul_torch`."""
    return _gate(x, gelu=True)


def _gate(x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    tokens, size = x.shape[0], x.shape[1] // 2
    assert x.stride(1) == 1
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    pdl = use_pdl(x)
    _gate_kernel[(tokens, triton.cdiv(size, 1024))](
        x, out, x.stride(0), size, GELU=gelu, BLOCK=1024, PDL=pdl, launch_pdl=pdl, num_warps=4
    )
    return out


@triton.jit
def _gate_kernel(x_ptr, out_ptr, stride_x, size, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * stride_x + size + column, mask=inside, other=0.0)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    # Rounded before the product, as torch's two operations do.
    if GELU:
        # gelu(g) = g * (1 + tanh(z)) / 2 = g / (1 + exp(-2 z)).
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = (gate / (1.0 + tl.exp(-2.0 * z))).to(dtype).to(tl.float32)
    else:
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + column, (gate * up.to(tl.float32)).to(dtype), mask=inside)
