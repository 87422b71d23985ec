"""What lies between the fused projection and attention, in one launch: norms of query and key, rotation, the cache's write.

Shapes: T new tokens, Hq query heads, Hkv KV heads, D head dim. A cache is [N, P, Hkv, D]; slot block * P + offset takes one
token, a negative slot none.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.fp8_cache import quantize_halves, store_rows_torch
from nanovllm.kernels.layernorm import rms_norm_torch
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Most heads of one program.
MAX_HEADS = 16


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of `x` [T, heads, D] by `cos` and `sin` [T, 1, R], whose halves are equal, in the type of `x`."""
    x, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    low, high = x.chunk(2, dim=-1)
    x = x * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((x, rest), dim=-1) if rest.shape[-1] else x


def qk_norm_rope_store_torch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate queries and keys, write keys and values to the caches, return the queries.

    Args:
        qkv: [T, (Hq + 2 * Hkv) * D].
        positions: [T]; cos, sin: [max_position, R] in the model's type, both halves equal; R is D, or smaller where only the first
            R dimensions of a head are rotated.
        q_weight, k_weight: [D] of the heads' RMSNorm, None for no norm.
        k_cache, v_cache: [N, P, Hkv, D], any strides with the last dimension contiguous.
        slot_mapping: [T], negative for tokens that are not stored.
        scales: [N, Hkv, P, 2], written too, where the caches are in eight bits (`fp8_cache`).

    Returns:
        [T, Hq, D], contiguous and fresh.
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    q = q if q_weight is None else rms_norm_torch(q, q_weight, eps)
    k = k if k_weight is None else rms_norm_torch(k, k_weight, eps)
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    k, v = rotate(k, cos, sin)[stored], v[stored]
    if scales is None:
        k_cache[slots // block_size, slots % block_size] = k
        v_cache[slots // block_size, slots % block_size] = v
    else:
        store_rows_torch(k, v, k_cache, v_cache, scales, slots)
    return rotate(q, cos, sin)


def qk_norm_rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `qk_norm_rope_store_torch`; the rotation is computed in float32 and rounded once."""
    tokens = len(qkv)
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    assert qkv.stride(1) == 1 and k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    assert cos.stride() == sin.stride() and cos.stride(1) == 1
    q = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    block_heads = min(MAX_HEADS, triton.next_power_of_2(max(num_heads, num_kv_heads)))
    q_programs, kv_programs = triton.cdiv(num_heads, block_heads), triton.cdiv(num_kv_heads, block_heads)
    pdl = use_pdl(qkv)
    _qk_norm_rope_store_kernel[(tokens, q_programs + 2 * kv_programs)](
        qkv,
        positions,
        cos,
        sin,
        q_weight,
        k_weight,
        eps,
        q,
        k_cache,
        v_cache,
        slot_mapping,
        scales,
        qkv.stride(0),
        cos.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY=cos.shape[1],
        BLOCK_SIZE=block_size,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    return q


@triton.jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    positions,
    cos_ptr,
    sin_ptr,
    q_weight,
    k_weight,
    eps,
    q_ptr,
    k_cache,
    v_cache,
    slot_mapping,
    scales,
    stride_qkv,
    stride_cos,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    Q_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_PROGRAMS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    # Programs of one token: its query heads, then its key heads, then its value heads.
    program = tl.program_id(1)
    dim = tl.arange(0, BLOCK_HALF)[None, :]
    # Made before the step's first layer: ready while the projection still runs.
    angle = tl.load(positions + token).to(tl.int64) * stride_cos + dim
    if ROTARY == HEAD_DIM:
        low_at = dim
        high_by = HALF
        cos = tl.load(cos_ptr + angle, mask=dim < HALF, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=dim < HALF, other=0.0).to(tl.float32)
    else:  # what is not rotated takes the places after the pairs that are, half of it on either side, with an angle of 0
        rotated = dim < ROTARY // 2
        low_at = dim + tl.where(rotated, 0, ROTARY // 2)
        high_by = tl.where(rotated, ROTARY // 2, HALF - ROTARY // 2)
        cos = tl.load(cos_ptr + angle, mask=rotated, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0).to(tl.float32)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = qkv_ptr + token * stride_qkv
    if program < Q_PROGRAMS:
        head = (program * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
        mask = (head < NUM_HEADS) & (dim < HALF)
        source = row + head * HEAD_DIM + low_at
        low, high = _norm_rope(source, mask, cos, sin, q_weight, eps, low_at, high_by, dim < HALF, HALF)
        out = q_ptr + token * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + low_at
        tl.store(out, low, mask=mask)
        tl.store(out + high_by, high, mask=mask)
    else:
        if slot >= 0:
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            if program < Q_PROGRAMS + KV_PROGRAMS:
                head = ((program - Q_PROGRAMS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
                mask = (head < NUM_KV_HEADS) & (dim < HALF)
                source = row + (NUM_HEADS + head) * HEAD_DIM + low_at
                low, high = _norm_rope(source, mask, cos, sin, k_weight, eps, low_at, high_by, dim < HALF, HALF)
                out = k_cache + block * k_stride_block + offset * k_stride_token
                out += head.to(tl.int64) * k_stride_head + low_at
                if scales is not None:
                    low, high, scale = quantize_halves(low, high)
                    at = scales + ((block * NUM_KV_HEADS + head) * BLOCK_SIZE + offset) * 2
                    tl.store(at, scale[:, None].to(tl.bfloat16), mask=head < NUM_KV_HEADS)
                tl.store(out, low, mask=mask)
                tl.store(out + high_by, high, mask=mask)
            else:
                head = ((program - Q_PROGRAMS - KV_PROGRAMS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
                mask = (head < NUM_KV_HEADS) & (dim < HALF)
                source = row + (NUM_HEADS + NUM_KV_HEADS + head) * HEAD_DIM + dim
                out = v_cache + block * v_stride_block + offset * v_stride_token
                out += head.to(tl.int64) * v_stride_head + dim
                low = tl.load(source, mask=mask, other=0.0)
                high = tl.load(source + HALF, mask=mask, other=0.0)
                if scales is not None:
                    low, high, scale = quantize_halves(low, high)
                    at = scales + ((block * NUM_KV_HEADS + head) * BLOCK_SIZE + offset) * 2 + 1
                    tl.store(at, scale[:, None].to(tl.bfloat16), mask=head < NUM_KV_HEADS)
                tl.store(out, low, mask=mask)
                tl.store(out + HALF, high, mask=mask)


@triton.jit
def _norm_rope(source, mask, cos, sin, weight_ptr, eps, low_at, high_by, inside, HALF: tl.constexpr):
    """The dimensions `low_at` of each head, at `source`, and those `high_by` after them, normed (where there is a weight) and
    rotated in pairs."""
    low = tl.load(source, mask=mask, other=0.0)
    high = tl.load(source + high_by, mask=mask, other=0.0)
    dtype = low.dtype
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / (2 * HALF) + eps)[:, None]
        low_weight = tl.load(weight_ptr + low_at, mask=inside, other=0.0)
        high_weight = tl.load(weight_ptr + high_by + low_at, mask=inside, other=0.0)
        if low_weight.dtype == dtype:  # rounded where `rms_norm_torch` rounds
            low = ((low * scale).to(dtype).to(tl.float32) * low_weight.to(tl.float32)).to(dtype).to(tl.float32)
            high = ((high * scale).to(dtype).to(tl.float32) * high_weight.to(tl.float32)).to(dtype).to(tl.float32)
        else:
            low = (low * scale * low_weight).to(dtype).to(tl.float32)
            high = (high * scale * high_weight).to(dtype).to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)
