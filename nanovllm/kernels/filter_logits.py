"""min_p, top_k and top_p: everything but the likeliest tokens becomes -inf, in place, by thresholds that are searched for, not by sorting.

Each row keeps the logits that are at least its threshold, so equal logits stay or go together. The kernel finds a threshold in eleven
passes over the row, three bits of it in each: a sort of 151,936 numbers takes some hundred passes.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_compat import tl, triton

# The fastest of 1,024 to 8,192 columns and 4 to 16 warps (bench/NOTES.md).
BLOCK = 4096
WARPS = 8


def filter_logits_torch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    """Set to -inf what may not be sampled in some rows of `logits`, with probabilities p = softmax(logits / temperature).

    First p < min_p * max(p) goes, then what is not among the `top_k` likeliest, then what is not among the fewest likeliest
    that hold `top_p` of the probability that is left.

    Args:
        logits: [E, V] float32, written.
        rows: [F] int64, rows of `logits`, none of them twice.
        temperatures, top_p, min_p: [F] float32, temperatures above 0; top_k: [F] int64 from 1 to V.
    """
    if not len(rows):
        return
    kept = logits[rows]
    # As in the sampler: a lower one would overflow.
    scaled = kept / temperatures.clamp(min=1e-20).unsqueeze(1)
    scaled = scaled - scaled.amax(-1, keepdim=True)
    probabilities = scaled.double().exp()
    kept[probabilities < min_p.double().unsqueeze(1)] = float("-inf")
    ordered, order = kept.sort(dim=-1, descending=True)
    last = ordered.gather(1, (top_k - 1).unsqueeze(1))
    kept[kept < last] = float("-inf")
    mass = probabilities.masked_fill(kept == float("-inf"), 0)
    above = mass.gather(1, order).cumsum(-1)
    within = above - mass.gather(1, order) < top_p.double().unsqueeze(1) * mass.sum(-1, keepdim=True)
    # The first one always stays; of equal ones, all do.
    smallest = ordered.masked_fill(~within, float("inf")).amin(-1, keepdim=True)
    kept[kept < smallest] = float("-inf")
    logits[rows] = kept


def filter_logits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    """See `filter_logits_torch`."""
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    if len(rows):
        _filter_kernel[(len(rows),)](
            logits,
            rows,
            temperatures,
            top_k,
            top_p,
            min_p,
            logits.stride(0),
            logits.shape[1],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@triton.jit
def _order(x):
    """float32 as an int32 of the same order; NaN is the largest, -0.0 equals 0.0."""
    raw = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, raw ^ ((raw >> 31) & 0x7FFFFFFF))


@triton.jit
def _weights(x, top, scale, inside, WEIGHTED: tl.constexpr):
    """What an element counts for: its probability, up to a factor, or 1."""
    if WEIGHTED:
        return tl.where(inside, tl.exp((x - top) * scale), 0.0)
    else:  # noqa: RET505 - only one branch is compiled
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def _threshold(start_ptr, columns, least, needed, top, scale, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number that elements of at least that size, and of at least `least`, together count for `needed`."""
    found = tl.full((), -(2**31), tl.int64)
    digits = tl.arange(0, 8).to(tl.int64)
    for turn in tl.static_range(11):
        # In the first turn only the first four are numbers of 32 bits; nothing is as large as the others.
        wide = found + (digits << (30 - 3 * turn))
        tries = tl.minimum(wide, 0x7FFFFFFF).to(tl.int32)
        total = tl.zeros((8,), tl.float32)
        for base in range(0, columns, BLOCK):
            column = base + tl.arange(0, BLOCK)
            x = tl.load(start_ptr + column, mask=column < columns, other=float("-inf"))
            key = _order(x)
            weight = _weights(x, top, scale, (column < columns) & (key >= least), WEIGHTED)
            total += tl.sum(tl.where(key[None, :] >= tries[:, None], weight[None, :], 0.0), axis=1)
        # The totals fall with the tries; the first is that of the turn before, which was enough.
        enough = tl.sum(((total >= needed) & (wide <= 0x7FFFFFFF)).to(tl.int64), axis=0)
        found += tl.maximum(enough - 1, 0) << (30 - 3 * turn)
    return found.to(tl.int32)


@triton.jit
def _filter_kernel(logits_ptr, rows, temperatures, top_k, top_p, min_p, stride_logits, columns, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    start_ptr = logits_ptr + tl.load(rows + i) * stride_logits
    scale = 1.0 / tl.maximum(tl.load(temperatures + i), 1e-20)

    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for base in range(0, columns, BLOCK):
        column = base + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(start_ptr + column, mask=column < columns, other=float("-inf")))
    top = tl.max(best, axis=0)
    # exp((x - top) * scale) >= min_p, solved for x; min_p = 0 lets everything through.
    least_value = top + tl.log(tl.load(min_p + i)) / scale
    least = _order(least_value)

    k = tl.load(top_k + i)
    if k < columns:
        least = tl.maximum(least, _threshold(start_ptr, columns, least, k.to(tl.float32), top, scale, False, BLOCK))
    p = tl.load(top_p + i)
    if p < 1.0:
        total = tl.zeros((BLOCK,), tl.float32)
        for base in range(0, columns, BLOCK):
            column = base + tl.arange(0, BLOCK)
            x = tl.load(start_ptr + column, mask=column < columns, other=float("-inf"))
            total += _weights(x, top, scale, (column < columns) & (_order(x) >= least), True)
        needed = p * tl.sum(total, axis=0)
        least = tl.maximum(least, _threshold(start_ptr, columns, least, needed, top, scale, True, BLOCK))

    for base in range(0, columns, BLOCK):
        column = base + tl.arange(0, BLOCK)
        x = tl.load(start_ptr + column, mask=column < columns, other=0.0)
        tl.store(start_ptr + column, float("-inf"), mask=(column < columns) & (_order(x) < least))
