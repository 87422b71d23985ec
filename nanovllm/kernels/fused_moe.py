"""A mixture of experts in five launches: route, sort by expert, two grouped products, weighted sum. Called by `layers.moe`.

Every launch has a size that follows from the number of tokens alone, and nothing travels to the host, so a CUDA graph can hold
them. The pairs of a token and one of its experts are sorted by expert on the device; a tile of a grouped product is some pairs
of one expert, so each weight is read once as long as an expert's pairs fit into a tile (grouped GEMM, as in MegaBlocks, Gale et
al. 2022). Shapes: T tokens, H hidden size, E experts of this rank, K experts a token, I their size on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.triton_compat import tl, triton

# Pairs that a program of the sort reads at a time.
SORT_BLOCK = 1024


class MoeTiles(NamedTuple):
    """How the grouped products are cut: [block_m, block_n] of the output from block_k at a time."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


def moe_tiles(pairs: int, num_experts: int) -> MoeTiles:
    """Tiles for `pairs` pairs over `num_experts` experts: the smallest that most experts' pairs fit into."""
    each = pairs / num_experts
    if each <= 16:
        return MoeTiles(16, 64, 128, 4, 4)
    if each <= 32:
        return MoeTiles(32, 64, 128, 4, 4)
    if each <= 64:
        return MoeTiles(64, 64, 64, 4, 4)
    return MoeTiles(128, 128, 64, 3, 8)


def most_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """Most tiles of `block_m` pairs of one expert each."""
    return pairs // block_m + min(pairs, num_experts)


def route_torch(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, all experts] -> ids of each token's experts [T, K] int32 and their weights, float32.

    The weights are the largest of a softmax in float32; `normalize` makes them add up to 1.
    """
    weights, ids = logits.float().softmax(-1).topk(top_k)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.int(), weights


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `route_torch`."""
    tokens, experts = logits.shape
    assert logits.stride(1) == 1
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    _route_kernel[(tokens,)](
        logits,
        ids,
        weights,
        logits.stride(0),
        experts,
        TOP_K=top_k,
        NORMALIZE=normalize,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    return ids, weights


@triton.jit
def _route_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    stride_logits,
    experts,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < experts
    logits = tl.load(logits_ptr + token * stride_logits + expert, mask=inside, other=float("-inf")).to(tl.float32)
    probs = tl.exp(logits - tl.max(logits, axis=0))
    probs = tl.where(inside, probs / tl.sum(probs, axis=0), -1.0)
    place = tl.arange(0, BLOCK_K)
    ids = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(probs, axis=0)
        ids = tl.where(place == k, best.to(tl.int32), ids)
        weights = tl.where(place == k, tl.max(probs, axis=0), weights)
        probs = tl.where(expert == best, -1.0, probs)
    if NORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    tl.store(ids_ptr + token * TOP_K + place, ids, mask=place < TOP_K)
    tl.store(weights_ptr + token * TOP_K + place, weights, mask=place < TOP_K)


def fused_experts_torch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    first_expert: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token's SwiGLU experts, weighted and added up in float32.

    Args:
        x: [T, H]; ids, weights: [T, K] from `route_torch`.
        gate_up: [E, 2 * I, H], an expert's gate above its up projection; down: [E, H, I].
        first_expert: id of the first expert that is here; those that are not add nothing.
        out: [T, H], written; None: a fresh tensor.

    Returns:
        `out`.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    local = ids - first_expert
    for expert in range(len(gate_up)):
        token, place = torch.where(local == expert)
        if len(token):
            y = F.linear(silu_and_mul_torch(F.linear(x[token], gate_up[expert])), down[expert])
            total.index_add_(0, token, y.float() * weights[token, place, None])
    return total.to(x.dtype) if out is None else out.copy_(total)


def fused_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    first_expert: int = 0,
    out: torch.Tensor | None = None,
    tiles: MoeTiles | None = None,
) -> torch.Tensor:
    """See `fused_experts_torch`."""
    (tokens, hidden), (experts, _, size), top_k = x.shape, down.shape, ids.shape[1]
    pairs = tokens * top_k
    assert x.stride(1) == 1 and gate_up.is_contiguous() and down.is_contiguous() and ids.is_contiguous()
    tiles = tiles or moe_tiles(pairs, experts)
    order, plan = sort_by_expert(ids, experts, first_expert, tiles.block_m)
    inner = torch.empty(pairs, size, dtype=x.dtype, device=x.device)
    outer = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x) if out is None else out
    _grouped_linear(x, gate_up, inner, order, plan, tiles, top_k, gated=True)
    _grouped_linear(inner, down, outer, order, plan, tiles, top_k, gated=False)
    _weighted_sum_kernel[(tokens, triton.cdiv(hidden, 1024))](
        outer, ids, weights, out, hidden, out.stride(0), first_expert, experts, TOP_K=top_k, BLOCK=1024, num_warps=4
    )
    return out


def sort_by_expert(
    ids: torch.Tensor, num_experts: int, first_expert: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in the order of their experts, and the tiles they make.

    Args:
        ids: [T, K] int32; those outside `first_expert` to `first_expert + num_experts` are left out.

    Returns:
        order: [T * K] int32 pairs (token * K + place), as many as are not left out; what follows is not written.
        plan: [most_tiles, 4] int32: expert (counted from the first, -1 for no tile), first place in `order` and end; the last is
            not used.
    """
    pairs = ids.numel()
    count = most_tiles(pairs, num_experts, block_m)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    plan = torch.empty(count, 4, dtype=torch.int32, device=ids.device)
    # A program an expert, and one for the tiles that are none: each counts for itself, so none waits for another.
    _sort_kernel[(num_experts + 1,)](
        ids,
        order,
        plan,
        pairs,
        first_expert,
        count,
        NUM_EXPERTS=num_experts,
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(num_experts + 1),
        BLOCK=SORT_BLOCK,
        num_warps=4,
    )
    return order, plan


@triton.jit(do_not_specialize=["pairs", "first_expert", "count"])
def _sort_kernel(
    ids,
    order,
    plan,
    pairs,
    first_expert,
    count,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mine = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for base in range(0, pairs, BLOCK):
        expert = _local_expert(ids, base + lane, pairs, first_expert, NUM_EXPERTS)
        counts += tl.histogram(expert, BLOCK_E)
    index = tl.arange(0, BLOCK_E)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(index < mine, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(index < mine, tiles, 0), axis=0)
    if mine == NUM_EXPERTS:
        for base in range(0, count - first_tile, BLOCK):
            tile = first_tile + base + lane
            tl.store(plan + tile * 4, tl.full((BLOCK,), -1, tl.int32), mask=tile < count)
    else:
        end = first + tl.sum(tl.where(index == mine, counts, 0), axis=0)
        for base in range(0, tl.sum(tl.where(index == mine, tiles, 0), axis=0), BLOCK):
            start = first + (base + lane) * BLOCK_M
            at = plan + (first_tile + base + lane) * 4
            tl.store(at, tl.zeros((BLOCK,), tl.int32) + mine, mask=start < end)
            tl.store(at + 1, start, mask=start < end)
            tl.store(at + 2, tl.minimum(start + BLOCK_M, end), mask=start < end)
        done = first
        for base in range(0, pairs, BLOCK):
            here = _local_expert(ids, base + lane, pairs, first_expert, NUM_EXPERTS) == mine
            place = done + tl.cumsum(here.to(tl.int32), axis=0) - 1
            tl.store(order + place, base + lane, mask=here)
            done += tl.sum(here.to(tl.int32), axis=0)


@triton.jit
def _local_expert(ids, pair, pairs, first_expert, NUM_EXPERTS: tl.constexpr):
    """The experts of `pair`, counted from this rank's first; `NUM_EXPERTS` for those of other ranks and past the end."""
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    local = expert - first_expert
    return tl.where((expert >= 0) & (local >= 0) & (local < NUM_EXPERTS), local, NUM_EXPERTS)


def _grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    order: torch.Tensor,
    plan: torch.Tensor,
    tiles: MoeTiles,
    top_k: int,
    *,
    gated: bool,
) -> None:
    """A product for every pair with its expert's weight.

    gated: `x` [T, H] a row a token, `out` [T * K, I] in the order of experts, silu(gate) * up; else: `x` in the order of
    experts, `out` [T * K, H] in the order of pairs.
    """
    n, k = out.shape[1], x.shape[1]
    block_k = min(tiles.block_k, max(16, triton.next_power_of_2(k)))
    _grouped_linear_kernel[(triton.cdiv(n, tiles.block_n), len(plan))](
        x,
        weight,
        out,
        order,
        plan,
        n,
        k,
        x.stride(0),
        GATED=gated,
        TOP_K=top_k,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        EVEN_N=n % tiles.block_n == 0,
        EVEN_K=k % block_k == 0,
        STAGES=tiles.stages,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps,
    )


@triton.jit
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    order,
    plan,
    n_size,
    k_size,
    stride_x,
    GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # An expert's tiles run one after the other, each with all its columns: its weight stays in the L2 cache, and so do the rows.
    tile = plan + tl.program_id(1) * 4
    expert = tl.load(tile)
    if expert < 0:
        return
    m = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    inside = m < tl.load(tile + 2)
    pair = tl.load(order + m, mask=inside, other=0)
    if GATED:
        x_row, out_row = pair // TOP_K, m
    else:
        x_row, out_row = m, pair
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the end the last row is read again, and not stored.
    n_row = n if EVEN_N else tl.minimum(n, n_size - 1)
    rows: tl.constexpr = 2 if GATED else 1
    first_row = expert.to(tl.int64) * n_size * rows
    x_tile = x_ptr + x_row.to(tl.int64)[:, None] * stride_x + k[None, :]
    weight_tile = weight_ptr + (first_row + n_row)[None, :] * k_size + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        up_tile = weight_tile + n_size.to(tl.int64) * k_size
        up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, k_size, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_tile, mask=inside[:, None], other=0.0)
            weight = tl.load(weight_tile)
        else:
            rest = k < k_size - start
            x = tl.load(x_tile, mask=inside[:, None] & rest[None, :], other=0.0)
            weight = tl.load(weight_tile, mask=rest[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        if GATED:
            if EVEN_K:
                up = tl.load(up_tile)
            else:
                up = tl.load(up_tile, mask=rest[:, None], other=0.0)
            up_acc = tl.dot(x, up, up_acc, input_precision=PRECISION)
            up_tile += BLOCK_K
        x_tile += BLOCK_K
        weight_tile += BLOCK_K
    dtype = out_ptr.dtype.element_ty
    if GATED:
        # Rounded where the product, silu and their product are in torch.
        gate = acc.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = silu * up_acc.to(dtype).to(tl.float32)
    out = out_ptr + out_row.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(out, acc.to(dtype), mask=inside[:, None] & (n < n_size)[None, :])


@triton.jit
def _weighted_sum_kernel(
    outer_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    size,
    stride_out,
    first_expert,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        local = tl.load(ids_ptr + pair) - first_expert
        # Rows of experts that are not here were never written.
        here = (local >= 0) & (local < num_experts)
        y = tl.load(outer_ptr + pair * size + column, mask=(column < size) & here, other=0.0).to(tl.float32)
        total += y * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * stride_out + column, total.to(out_ptr.dtype.element_ty), mask=column < size)
