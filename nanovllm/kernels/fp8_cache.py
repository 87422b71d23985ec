"""Keys and values of the cache in eight bits: what stores them, what reads them, and the plain-torch reference of both.

A row is one head of one token: D values in e4m3 and one scale, a power of two that brings the row's largest value to between 128
and 256 (as a block of the OCP microscaling formats has one). The scale is the row's own, not the layer's, because then a token's
keys and values depend on nothing but the token: not on a calibration, nor on what else ran, so cached prefixes, crashes and other
batches give the same texts. It costs 2 bytes of D + 2. A power of two loses nothing - e4m3 is itself a floating-point format, with
full precision down to 2^-14 of that range - and makes scaling exact in every type.

Scales [N, Hkv, P, 2] in bfloat16 are those of key and value, side by side, and a head's tokens follow one another: kernels read
those of a tile as so many 32-bit words in a row.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_compat import tl, triton

FP8 = torch.float8_e4m3fn
# Of a row's scale.
SCALE_BYTES = 2
# Of a row's largest value: its power of two becomes 2^7, so that no value rounds past 448; rows of zeros keep a finite scale.
LARGEST_EXPONENT = 7
LEAST_VALUE = 2.0**-60


def scales_shape(blocks: int, block_size: int, num_kv_heads: int) -> tuple[int, int, int, int]:
    """Of the scales of a cache [N, P, Hkv, D]."""
    return blocks, num_kv_heads, block_size, 2


def quantize_kv_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` [..., D] as e4m3 values [..., D] and their scales [...] in bfloat16."""
    rows = rows.float()
    exponents = rows.abs().amax(-1).clamp(min=LEAST_VALUE).frexp().exponent - 1
    scales = torch.ldexp(torch.ones_like(rows[..., 0]), exponents - LARGEST_EXPONENT)
    return (rows / scales[..., None]).to(FP8), scales.bfloat16()


def store_rows_torch(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write keys and values [T, Hkv, D] at `slots` [T] of the caches [N, P, Hkv, D]."""
    block, offset = slots // k_cache.shape[1], slots % k_cache.shape[1]
    for index, (rows, cache) in enumerate(((k, k_cache), (v, v_cache))):
        values, row_scales = quantize_kv_rows(rows)
        # torch moves eight-bit floats as bytes, or not at all.
        cache.view(torch.uint8)[block, offset] = values.view(torch.uint8)
        scales[block, :, offset, index] = row_scales


def gather_scales(scales: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Scales [..., Hkv, 2] at `slots` [...]."""
    block_size = scales.shape[2]
    return scales[slots // block_size, :, slots % block_size]


@triton.jit
def quantize_halves(low, high):
    """Rows whose values lie in two halves, `low` and `high` [R, H], as e4m3 halves and scales [R]: see `quantize_kv_rows`."""
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    scale, inverse = _row_scales(tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1)))
    return (low * inverse[:, None]).to(tl.float8e4nv), (high * inverse[:, None]).to(tl.float8e4nv), scale


@triton.jit
def split_rows(rows, high):
    """`rows` [2 R, D], each there twice in a row, in e4m3: the leading four bits of its values where `high` [2 R, 1], else the others.

    And the scales [R] of the pairs. The sum of a pair is a row in bfloat16 as it was, but for values below 2^-9 of its largest,
    whose error is up to 2^-16 of that; of other types it is the row with values of 8 bits.
    """
    rows = rows.to(tl.float32)
    scale, inverse = _row_scales(tl.max(tl.abs(rows), axis=1))
    rows *= inverse[:, None]
    leading = (rows.to(tl.int32, bitcast=True) & -1048576).to(tl.float32, bitcast=True)
    parts = tl.where(high, leading, rows - leading).to(tl.float8e4nv)
    return parts, tl.max(tl.reshape(scale, (scale.shape[0] // 2, 2)), axis=1)


@triton.jit
def _row_scales(largest):
    """Of rows whose largest values are `largest`: the scales, and their inverse."""
    # From the bits of its power of two 2^e: those of the scale 2^(e - 7), and from those the bits of 2^(7 - e).
    bits = (tl.maximum(largest, 8.673617379884035e-19).to(tl.int32, bitcast=True) & 0x7F800000) - (7 << 23)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


def scale_words(scales: torch.Tensor | None) -> torch.Tensor | None:
    """Scales [N, Hkv, P, 2] as `load_scales` takes them."""
    return None if scales is None else scales.view(torch.int32)


@triton.jit
def load_scales(words, block, head, offset, mask, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Of tokens: what scores of their keys are multiplied by, their values' exponents, which are added to scores, and those' inverse.

    With the value's scale 2^e in the exponent of its weight, the largest weight of what lies in the cache is 1 whatever the scales
    are, so that weights fit a 16-bit type. Sums of the weights themselves take the inverse 2^-e with each.
    """
    at = words + (block * NUM_KV_HEADS + head) * BLOCK_SIZE + offset
    if mask is None:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=mask, other=0)
    k_scale = (words << 16).to(tl.float32, bitcast=True)
    v_exponent = ((words >> 23) - 127).to(tl.float32)
    v_inverse = ((254 << 23) - (words & -65536)).to(tl.float32, bitcast=True)
    return k_scale, v_exponent, v_inverse


@triton.jit
def unpack_pairs(pairs, ASM: tl.constexpr):
    """The e4m3 values in the low and high bytes of 16-bit words, as float16.

    Words, because a product's second operand of 8-bit elements cannot be read across its rows (`ldmatrix.trans`) and would come
    byte by byte. `ASM`: as three instructions for four values; for a GPU.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return low, high
