"""Low-rank adapters: `out += (x A^T) B^T`, with the A and B of each token's own adapter. Called by `layers.lora`.

T tokens of K features; L adapters of rank R each; P matrices of one input side by side (query, key and value, say), whose rows of `out`
follow each other. An adapter's matrices are padded with zeros to R, which is a power of two of 16 or more.
Tokens are taken in tiles, and a tile goes through the adapters it has tokens of, so nothing need be sorted and nothing waits for the
host. Source of the method: S-LoRA (arXiv 2311.03285), Punica (arXiv 2310.18547).
"""

from __future__ import annotations

import itertools

import torch

from nanovllm.kernels.triton_compat import tl, triton

TOKENS = 16
COLUMNS = 64
# Parts that the sum over K is made in, so that a few tokens occupy the device.
MOST_SPLITS = 8
SPLIT_COLUMNS = 512


def lora_add_torch(
    x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapters: torch.Tensor, starts: list[int]
) -> torch.Tensor:
    """Add each token's adapter to `out`.

    Args:
        x: [T, K]; out: [T, N], changed and returned.
        a: [L, P * R, K]; b: [L, N, R].
        adapters: [T] which one is a token's; -1: none.
        starts: [P + 1] the first row of each matrix in `out`, and N.
    """
    rank = b.shape[2]
    for adapter in adapters.unique().tolist():
        if adapter < 0:
            continue
        rows = (adapters == adapter).nonzero().squeeze(1)
        low = x[rows].float() @ a[adapter].float().t()
        high = torch.cat(
            [
                low[:, part * rank : (part + 1) * rank].to(x.dtype).float() @ b[adapter, start:end].float().t()
                for part, (start, end) in enumerate(itertools.pairwise(starts))
            ],
            dim=1,
        )
        out[rows] = (out[rows].float() + high).to(out.dtype)
    return out


def lora_add(
    x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, adapters: torch.Tensor, starts: list[int]
) -> torch.Tensor:
    """See `lora_add_torch`."""
    tokens, features = x.shape
    if not tokens:
        return out
    count, width, _ = a.shape
    rank = b.shape[2]
    assert x.stride(1) == 1 and out.stride(1) == 1 and a.is_contiguous() and b.is_contiguous()
    splits = max(1, min(MOST_SPLITS, features // SPLIT_COLUMNS))
    split_features = triton.cdiv(triton.cdiv(features, splits), COLUMNS) * COLUMNS
    splits = triton.cdiv(features, split_features)
    low = torch.empty(splits, tokens, width, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(tokens, TOKENS)
    _shrink_kernel[(tiles, width // rank, splits)](
        x, a, low, adapters, tokens, features, count, width, x.stride(0), split_features,
        TOKENS=TOKENS, RANK=rank, COLUMNS=COLUMNS,
    )  # fmt: skip
    for part, (start, end) in enumerate(itertools.pairwise(starts)):
        _expand_kernel[(tiles, triton.cdiv(end - start, COLUMNS))](
            low, b, out, adapters, tokens, end - start, count, width, out.stride(0), b.shape[1], start, part * rank,
            SPLITS=splits, TOKENS=TOKENS, RANK=rank, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    adapters,
    tokens,
    features,
    count,
    width,
    stride_x,
    split_features,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """low[split, t, r] = sum over the split's k of x[t, k] * a[adapter of t, r, k]."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    split = tl.program_id(2)
    adapter = tl.load(adapters + t, mask=t < tokens, other=-1)
    first, end = split * split_features, tl.minimum((split + 1) * split_features, features)
    found = tl.zeros((TOKENS, RANK), tl.float32)
    if tl.max(adapter, axis=0) >= 0:
        for one in range(count):
            mine = adapter == one
            if tl.max(mine.to(tl.int32), axis=0) > 0:
                acc = tl.zeros((TOKENS, RANK), tl.float32)
                for base in range(first, end, COLUMNS):
                    k = base + tl.arange(0, COLUMNS)
                    x = tl.load(
                        x_ptr + t[:, None].to(tl.int64) * stride_x + k[None, :],
                        mask=mine[:, None] & (k < end)[None, :],
                        other=0.0,
                    )
                    a = tl.load(
                        a_ptr + (one * width + r[None, :]).to(tl.int64) * features + k[:, None],
                        mask=(k < end)[:, None],
                        other=0.0,
                    )
                    acc = tl.dot(x, a, acc, input_precision="ieee")
                found = tl.where(mine[:, None], acc, found)
    place = low_ptr + (split * tokens + t[:, None]).to(tl.int64) * width + r[None, :]
    tl.store(place, found, mask=(adapter >= 0)[:, None])


@triton.jit
def _expand_kernel(
    low_ptr,
    b_ptr,
    out_ptr,
    adapters,
    tokens,
    rows,
    count,
    width,
    stride_out,
    all_rows,
    start,
    low_start,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[t, start + n] += sum over r of low[t, low_start + r] * b[adapter of t, start + n, r]."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    adapter = tl.load(adapters + t, mask=t < tokens, other=-1)
    if tl.max(adapter, axis=0) >= 0:
        has = (adapter >= 0)[:, None]
        low = tl.zeros((TOKENS, RANK), tl.float32)
        for split in tl.static_range(SPLITS):
            place = low_ptr + (split * tokens + t[:, None]).to(tl.int64) * width + low_start + r[None, :]
            low += tl.load(place, mask=has, other=0.0)
        low = low.to(b_ptr.dtype.element_ty)
        found = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for one in range(count):
            mine = adapter == one
            if tl.max(mine.to(tl.int32), axis=0) > 0:
                b = tl.load(
                    b_ptr + (one * all_rows + start + n[None, :]).to(tl.int64) * RANK + r[:, None],
                    mask=(n < rows)[None, :],
                    other=0.0,
                )
                found = tl.where(mine[:, None], tl.dot(low, b, input_precision="ieee"), found)
        inside = has & (n < rows)[None, :]
        place = out_ptr + t[:, None].to(tl.int64) * stride_out + start + n[None, :]
        out = tl.load(place, mask=inside, other=0.0)
        tl.store(place, (out.to(tl.float32) + found).to(out.dtype), mask=inside)
