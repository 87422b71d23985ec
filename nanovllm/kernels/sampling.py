"""Sampling in one pass over the logits: greedy, or temperature by the Gumbel-max trick with numbers that belong to the sequence.

The noise of a token is a hash of (sequence seed, index of the generated token, vocabulary id). It does not depend on the batch,
the step or a generator's state, so a row's tokens are the same whatever ran beside it. The best token of some columns is one
int64 key, so parts of a row, and ranks' shards of the vocabulary, are joined by an integer maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# Below every key: what `sample_keys` wants in `out`.
LEAST_KEY = -(2**63)

# Eight programs for every multiprocessor of an H200, unless each would read fewer columns than this.
TARGET_PROGRAMS = 1056
MIN_COLUMNS = 4096
BLOCK = 2048


class RowMasks(NamedTuple):
    """Which tokens rows may have: bit i % 32 of word i // 32 of `bits` [M, W] int32 is set where id i is allowed; `index` [S] int64
    says which of them is a row's, -1 for none."""

    bits: torch.Tensor
    index: torch.Tensor


def unpack_masks(bits: torch.Tensor) -> torch.Tensor:
    """[M, W] int32 words as [M, 32 * W] bool."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).view(len(bits), -1) != 0


def sample_keys_torch(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    out: torch.Tensor | None = None,
    masks: RowMasks | None = None,
) -> torch.Tensor:
    """The key of each row's token among its columns: argmax(logits / temperature + noise), the lowest id among equals.

    A key holds the score in its high half, as an int32 of the same order, and 0x7fffffff - id in its low half.

    Args:
        logits: [S, V]; column j is vocabulary id `vocab_start` + j. Ids from `vocab_size` on (None: no id) are ignored.
        rows: [S] where in the state each row's sequence is.
        temperatures: [R] float32, 0 for greedy; seeds: [R] int64, below 2**63; steps: [R], tokens generated before.
        out: [S] int64, holding `LEAST_KEY`; written and returned where given.
        masks: which ids the rows that have a mask may have; all where None.

    Returns:
        [S] int64 keys; `LEAST_KEY` where there is no column. `keys_to_tokens` reads them.
    """
    if out is None:
        out = torch.full((len(logits),), LEAST_KEY, dtype=torch.int64, device=logits.device)
    columns = _num_columns(logits, vocab_start, vocab_size)
    if columns == 0:
        return out
    temperature = temperatures[rows].unsqueeze(1)
    greedy = temperature == 0
    logits = logits[:, :columns].float()
    if masks is not None:
        some = (masks.index >= 0).nonzero().squeeze(1)
        allowed = unpack_masks(masks.bits[masks.index[some]])[:, vocab_start : vocab_start + columns]
        logits = logits.index_copy(0, some, logits[some].masked_fill(~allowed, float("-inf")))
    # So low that it is greedy already; a lower one would overflow to several infinities.
    scores = logits * torch.where(greedy, 1.0, temperature.clamp(min=1e-20)).reciprocal()
    sampled = (~greedy.squeeze(1)).nonzero().squeeze(1)
    if len(sampled):
        scores[sampled] += gumbel_noise(seeds[rows[sampled]], steps[rows[sampled]], columns, vocab_start)
    best = scores.argmax(dim=-1, keepdim=True)
    score = scores.gather(1, best)
    # -0.0 equals 0.0, and NaN is the largest, as for argmax.
    bits = torch.where(score == 0, 0.0, score).view(torch.int32)
    order = torch.where(score.isnan(), 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (order.long() << 32) | (0x7FFFFFFF - vocab_start - best)
    return out.copy_(keys.squeeze(1))


def sample_keys(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    out: torch.Tensor | None = None,
    masks: RowMasks | None = None,
) -> torch.Tensor:
    """See `sample_keys_torch`."""
    if out is None:
        out = torch.full((len(logits),), LEAST_KEY, dtype=torch.int64, device=logits.device)
    count, columns = len(logits), _num_columns(logits, vocab_start, vocab_size)
    if count == 0 or columns == 0:
        return out
    assert logits.stride(1) == 1
    splits = min(triton.cdiv(TARGET_PROGRAMS, count), max(1, columns // MIN_COLUMNS))
    split_columns = triton.cdiv(triton.cdiv(columns, splits), BLOCK) * BLOCK
    pdl = use_pdl(logits)
    _sample_kernel[(count, triton.cdiv(columns, split_columns))](
        logits,
        rows,
        temperatures,
        seeds,
        steps,
        out,
        logits.stride(0),
        vocab_start,
        columns,
        split_columns,
        rows if masks is None else masks.bits,
        rows if masks is None else masks.index,
        0 if masks is None else masks.bits.stride(0),
        MASKED=masks is not None,
        BLOCK=BLOCK,
        CUDA=logits.is_cuda,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=8,
    )
    return out


def keys_to_tokens(keys: torch.Tensor) -> torch.Tensor:
    """Token ids, int64, of keys from `sample_keys`; the shapes are the same."""
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit
def key_to_token(key):
    """As `keys_to_tokens`, within a kernel."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


def gumbel_noise(seeds: torch.Tensor, steps: torch.Tensor, columns: int, vocab_start: int = 0) -> torch.Tensor:
    """Standard Gumbel noise [S, columns] in float32 for the ids from `vocab_start`; row i depends on `seeds[i]` and `steps[i]`."""
    high, low = (seeds >> 32).to(torch.int32), (seeds & 0xFFFFFFFF).to(torch.int32)
    # One is added to the step as to the ids: zero is the hash's fixed point, and would make a small seed its own key.
    key = _mix(low ^ _mix(high ^ _mix(steps.to(torch.int32) + 1)))
    first = vocab_start + 1
    ids = _mix(torch.arange(first, first + columns, dtype=torch.int32, device=seeds.device))
    bits = _mix(key.unsqueeze(1) ^ ids)
    # 23 random bits, centred in their interval: exact in float32 and never 0 or 1, so both logarithms are finite.
    uniform = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    # -log(1 - u) is as good as -log(u), and exact where it is small: that is where winners come from.
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit integer hash "lowbias32" (C. Wellons, hash-prospector); int32 products wrap as unsigned ones do."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _num_columns(logits: torch.Tensor, vocab_start: int, vocab_size: int | None) -> int:
    columns: int = logits.shape[1]
    return columns if vocab_size is None else max(0, min(columns, vocab_size - vocab_start))


@triton.jit
def _mix_kernel(x):
    """`_mix` of uint32, whose shifts are logical."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise_key(seed, step):
    key = _mix_kernel((step + 1).to(tl.uint32))
    key = _mix_kernel((seed >> 32).to(tl.uint32) ^ key)
    return _mix_kernel(seed.to(tl.uint32) ^ key)


@triton.jit
def _log2(x, CUDA: tl.constexpr):
    """Base-2 logarithm of normal numbers; on CUDA one instruction, within 2**-22 near 1 and relatively elsewhere."""
    if CUDA:
        return tl.extra.cuda.libdevice.fast_log2f(x)
    else:  # noqa: RET505 - only one branch is compiled
        return tl.log2(x)


@triton.jit
def _gumbel(noise_key, ids, CUDA: tl.constexpr):
    """`gumbel_noise` of a sequence with `noise_key` at vocabulary `ids`, within 4e-6: there are many of them, so a logarithm is one
    instruction where that is good enough."""
    bits = _mix_kernel(noise_key ^ _mix_kernel((ids + 1).to(tl.uint32)))
    # The bits as the fraction of a number from 1 to 2, which is then moved down: exact.
    u = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-24)
    # -log(1 - u): the series where u is so small that 1 - u has lost it.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    exponential = tl.where(u < 1 / 16, series, -0.6931471805599453 * _log2(1 - u, CUDA))
    return -0.6931471805599453 * _log2(exponential, CUDA)


@triton.jit(do_not_specialize_on_alignment=["rows", "mask_index"])
def _sample_kernel(
    logits_ptr,
    rows,
    temperatures,
    seeds,
    steps,
    keys,
    stride_logits,
    vocab_start,
    columns,
    split_columns,
    mask_bits,
    mask_index,
    stride_masks,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    CUDA: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i)
    temperature = tl.load(temperatures + row)
    noise_key = _noise_key(tl.load(seeds + row), tl.load(steps + row))
    # Rounded as the reference's, so that both scale scores alike.
    scale = tl.div_rn(1.0, tl.maximum(temperature, 1e-20))

    # Each lane keeps the best of its own columns; a later one must be better to replace it, and NaN is the largest.
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    start = tl.program_id(1) * split_columns
    if MASKED:
        mask = tl.load(mask_index + i).to(tl.int64)
    for base in range(start, tl.minimum(start + split_columns, columns), BLOCK):
        column = base + tl.arange(0, BLOCK)
        inside = column < columns
        score = tl.load(logits_ptr + i * stride_logits + column, mask=inside, other=0.0).to(tl.float32)
        ids = vocab_start + column
        if MASKED:
            # A row without a mask reads that of another, and takes no notice of it.
            word = tl.load(mask_bits + tl.maximum(mask, 0) * stride_masks + (ids >> 5), mask=inside, other=0)
            score = tl.where((mask < 0) | (((word >> (ids & 31)) & 1) != 0), score, float("-inf"))
        if temperature != 0:
            score = score * scale + _gumbel(noise_key, ids, CUDA)
        better = inside & ((score > best) | (score != score) | (best_id == 0x7FFFFFFF)) & (best == best)
        best = tl.where(better, score, best)
        best_id = tl.where(better, ids, best_id)
    raw = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)
    order = tl.where(best != best, 0x7FFFFFFF, raw ^ ((raw >> 31) & 0x7FFFFFFF))
    # A lane without columns is below all that have one.
    order = tl.where(best_id == 0x7FFFFFFF, -(2**31), order)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - best_id).to(tl.int64)
    tl.atomic_max(keys + i, tl.max(key, axis=0), sem="relaxed")
