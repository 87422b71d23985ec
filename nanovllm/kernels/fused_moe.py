"""A mixture of experts: route, group by expert, two grouped products, weighted sum. Called by `layers.moe`.

Every launch has a size that follows from the number of tokens alone, and nothing travels to the host, so a CUDA graph can hold
them. The pairs of a token and one of its experts are brought together by expert (`kernels.grouping`); a tile of a grouped product is
some pairs of one expert, so each weight is read once as long as an expert's pairs fit into a tile. Where there are few pairs, each is
a tile. Shapes: T tokens, H hidden size, E experts of this rank, K experts a token, I their size on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.grouping import group_rows
from nanovllm.kernels.quantize import quantize_rows, quantize_rows_torch
from nanovllm.kernels.scaled_linear import GROUP, scaled_linear_torch
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

# The last tile of an expert with no more pairs is computed as one of so many.
TAIL_M = 64
# Bytes of each row of the second product's weight that are asked for while the first one ends, at most; only where pairs are not
# grouped: else there is more weight than the L2 cache holds, and it cost 8 % (bench/NOTES.md).
PREFETCH_BYTES = 2048


class ExpertScales(NamedTuple):
    """Of weights that have 8 bits: [G, E, 2 * I] and [G, E, H] float32, G being 1 or a scale for each 128 columns."""

    gate_up: torch.Tensor
    down: torch.Tensor


class ProductTiles(NamedTuple):
    """How a grouped product is cut: block_n columns of the output (gated: of gate and of up) from block_k numbers of 16 bits at a time."""

    block_n: int
    block_k: int
    stages: int
    warps: int


class MoeTiles(NamedTuple):
    """Pairs of a tile, the two products' columns, and tiles that take their columns in turns (1: each all of its own first)."""

    block_m: int
    gate_up: ProductTiles
    down: ProductTiles
    turns: int = 1


def moe_tiles(pairs: int, num_experts: int, *, grouped: bool = True, apart: bool = False) -> MoeTiles:
    """Tiles for `pairs` pairs over `num_experts` experts, from what was fastest on an H200 (bench/NOTES.md).

    A tile that twice the mean number of an expert's pairs fit into reads nearly all weights once.

    Args:
        apart: what each 128 columns add up to is scaled by itself: two sums, for which large tiles have no registers.
    """
    each = pairs / num_experts
    if not grouped:
        return MoeTiles(16, ProductTiles(32, 128, 4, 2), ProductTiles(64, 128, 4, 4))
    if each <= 8:
        return MoeTiles(16, ProductTiles(32, 128, 4, 2), ProductTiles(32, 128, 4, 2))
    if each <= 24:
        return MoeTiles(32, ProductTiles(64, 128, 3, 4), ProductTiles(64, 128, 4, 4))
    wide = 2 - apart
    products = ProductTiles(64 * wide, 64, 4, 8), ProductTiles(128 * wide, 64, 4, 8)
    return MoeTiles(128, *products, turns=1 if each <= 128 else 8)


def groups_pairs(pairs: int, top_k: int, num_experts: int) -> bool:
    """Whether so many pairs are worth grouping: a token's experts differ, and few tokens seldom share one."""
    return pairs > max(top_k, num_experts // 8)


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
    pdl = use_pdl(logits)
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
        PDL=pdl,
        launch_pdl=pdl,
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
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
        most, best = tl.max(probs, axis=0, return_indices=True)
        ids = tl.where(place == k, best.to(tl.int32), ids)
        weights = tl.where(place == k, most, weights)
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
    scales: ExpertScales | None = None,
) -> torch.Tensor:
    """Each token's SwiGLU experts, weighted and added up in float32.

    Args:
        x: [T, H]; ids, weights: [T, K] from `route_torch`.
        gate_up: [E, 2 * I, H], an expert's gate above its up projection; down: [E, H, I].
        first_expert: id of the first expert that is here; those that are not add nothing.
        out: [T, H], written; None: a fresh tensor.
        scales: of weights in 8 bits, with which activations are made 8 bits too.

    Returns:
        `out`.
    """

    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if scale is None:
            return F.linear(x, weight)
        numbers, x_scale = quantize_rows_torch(x, weight.dtype, _columns_of(scale))
        return scaled_linear_torch(numbers, x_scale, weight, scale, x.dtype)

    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    local = ids - first_expert
    for expert in range(len(gate_up)):
        token, place = torch.where(local == expert)
        if len(token):
            first, second = (None, None) if scales is None else (scale[:, expert] for scale in scales)
            inner = silu_and_mul_torch(product(x[token], gate_up[expert], first))
            y = product(inner, down[expert], second)
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
    scales: ExpertScales | None = None,
) -> torch.Tensor:
    """See `fused_experts_torch`."""
    (tokens, hidden), (experts, _, size), top_k = x.shape, down.shape, ids.shape[1]
    pairs = tokens * top_k
    assert x.stride(1) == 1 and gate_up.is_contiguous() and down.is_contiguous() and ids.is_contiguous()
    out = torch.empty_like(x) if out is None else out
    if not tokens:
        return out
    grouped = groups_pairs(pairs, top_k, experts)
    apart = scales is not None and len(scales.gate_up) > 1
    tiles = tiles or moe_tiles(pairs, experts, grouped=grouped, apart=apart)
    order, plan = ids, None
    if grouped:
        order, plan = group_rows(ids, experts, first_expert, tiles.block_m)
    inner = torch.empty(pairs, size, dtype=x.dtype, device=x.device)
    outer = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    for rows, weight, result, gated in ((x, gate_up, inner, True), (inner, down, outer, False)):
        scaled = None
        if scales is not None:
            scale = scales.gate_up if gated else scales.down
            rows, row_scale = quantize_rows(rows, weight.dtype, _columns_of(scale))
            scaled = row_scale, scale
        grouped_linear(rows, weight, result, order, plan, first_expert, top_k, tiles, scaled, gated=gated)
    pdl = use_pdl(x)
    _weighted_sum_kernel[(tokens, triton.cdiv(hidden, 1024))](
        outer,
        ids,
        weights,
        out,
        hidden,
        out.stride(0),
        first_expert,
        experts,
        TOP_K=top_k,
        BLOCK=1024,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=4,
    )
    return out


def _columns_of(scale: torch.Tensor) -> int:
    """Columns that share a scale, 0 for all."""
    return GROUP if len(scale) > 1 else 0


def prefetched_lines(row_bytes: int) -> int:
    """Lines of 128 bytes, a power of two, that hold a row of a weight or its first `PREFETCH_BYTES`."""
    lines: int = triton.next_power_of_2(triton.cdiv(min(row_bytes, PREFETCH_BYTES), 128))
    return lines


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    order: torch.Tensor,
    plan: torch.Tensor | None,
    first_expert: int,
    top_k: int,
    tiles: MoeTiles,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    gated: bool,
) -> None:
    """A product for every pair with its expert's weight.

    Args:
        scales: of the rows of `x` [G, rows] and of `weight` [G, E, N], where both are 8-bit numbers.
        order, plan: of `group_rows`; without a plan `order` is the pairs' experts, and each pair is a tile.
        gated: `x` [T, H] a row a token, `out` [T * K, I] in the order of tiles, silu(gate) * up; else: `x` in the order of
            tiles, `out` [T * K, H] in the order of pairs. The second product follows the first at once.
    """
    n, k = out.shape[1], x.shape[1]
    block_n, block_k, stages, warps = tiles.gate_up if gated else tiles.down
    # A tile is as large in shared memory whatever its numbers' size.
    block_k = min(max(16, block_k * 2 // x.dtype.itemsize), max(16, triton.next_power_of_2(k)))
    x_scale, scale = (None, None) if scales is None else scales
    apart = scale is not None and len(scale) > 1
    if scale is not None:
        assert scale.is_contiguous() and k % GROUP == 0
        block_k = GROUP
    count = len(out) if plan is None else len(plan)
    pdl = use_pdl(x)
    _grouped_linear_kernel[(triton.cdiv(n, block_n) * count,)](
        x,
        weight,
        out,
        x_scale,
        scale,
        order,
        plan,
        first_expert,
        len(weight),
        count,
        n,
        k,
        x.stride(0),
        len(x),
        GATED=gated,
        APART=apart,
        GROUPED=plan is not None,
        TOP_K=top_k,
        BLOCK_M=tiles.block_m,
        TAIL_M=min(tiles.block_m, TAIL_M),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        EVEN_N=n % block_n == 0,
        EVEN_K=k % block_k == 0,
        TURNS=tiles.turns,
        STAGES=stages,
        PREFETCH=0 if plan is not None else prefetched_lines(k * weight.dtype.itemsize),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=warps,
    )


@triton.jit(do_not_specialize=["first_expert", "num_experts", "num_tiles", "x_rows"])
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    order,
    plan,
    first_expert,
    num_experts,
    num_tiles,
    n_size,
    k_size,
    stride_x,
    x_rows,
    GATED: tl.constexpr,
    APART: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TURNS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    # Tiles of an expert follow each other, so TURNS of them read the same columns of its weight at about the same time.
    across = (n_size + BLOCK_N - 1) // BLOCK_N
    turn = tl.program_id(0) // (across * TURNS) * TURNS
    tiles = tl.minimum(num_tiles - turn, TURNS)
    within = tl.program_id(0) % (across * TURNS)
    index = turn + within % tiles
    column = within // tiles * BLOCK_N
    if PDL and GATED:
        # What says which pairs are whose was made just before.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if GROUPED:
        expert = tl.load(plan + index * 4)
        first, end = tl.load(plan + index * 4 + 1), tl.load(plan + index * 4 + 2)
    else:
        expert = tl.load(order + index) - first_expert
        expert = tl.where(expert < num_experts, expert, -1)
        first, end = index, index + 1
    weight_rows = n_size * (2 if GATED else 1)
    weight_ptr += tl.maximum(expert, 0).to(tl.int64) * weight_rows * k_size
    if scale_ptr is not None:
        scale_ptr += tl.maximum(expert, 0) * weight_rows
    if PDL and not GATED:
        # All but the rows is there while the product before ends.
        if PREFETCH > 0:
            lines = tl.arange(0, PREFETCH) * (128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8))
            rows = tl.minimum(column + tl.arange(0, BLOCK_N), n_size - 1)
            _prefetch(weight_ptr + rows.to(tl.int64)[:, None] * k_size + tl.minimum(lines, k_size - 1)[None, :])
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if expert < 0:
        return
    if TAIL_M < BLOCK_M:  # noqa: SIM102 - one is known to the compiler, the other is not
        if end - first <= TAIL_M:
            _product_tile(
                x_ptr, weight_ptr, out_ptr, x_scale_ptr, scale_ptr, order, first, end, column, n_size, k_size, stride_x,
                x_rows, num_experts * weight_rows, APART, GATED, GROUPED, TOP_K, TAIL_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, STAGES, PRECISION,
            )  # fmt: skip
            return
    _product_tile(
        x_ptr, weight_ptr, out_ptr, x_scale_ptr, scale_ptr, order, first, end, column, n_size, k_size, stride_x,
        x_rows, num_experts * weight_rows, APART, GATED, GROUPED, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit
def _prefetch(pointers):
    """Have the lines of memory at `pointers` brought to the L2 cache, and do not wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _product_tile(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_scale_ptr,
    scale_ptr,
    order,
    first,
    end,
    column,
    n_size,
    k_size,
    stride_x,
    x_rows,
    weight_rows,
    APART: tl.constexpr,
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns from `column` on of the product of the rows at places `first` to `end` with an expert's weight."""
    m = first + tl.arange(0, BLOCK_M)
    inside = m < end
    if GROUPED:
        pair = tl.load(order + m, mask=inside, other=0)
    else:
        pair = m
    if GATED:
        x_row, out_row = pair // TOP_K, m
    else:
        x_row, out_row = m, pair
    n = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Gated, rows of gate and up take turns, so that one product makes both of a column where one thread has them.
    COLUMNS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    n_row = column + (tl.arange(0, COLUMNS) // 2 if GATED else tl.arange(0, COLUMNS))
    # Past the end the last row is read again, and not stored.
    if not EVEN_N:
        n_row = tl.minimum(n_row, n_size - 1)
    if GATED:
        n_row += tl.arange(0, COLUMNS) % 2 * n_size
    x_tile = x_ptr + x_row.to(tl.int64)[:, None] * stride_x + k[None, :]
    weight_tile = weight_ptr + n_row.to(tl.int64)[None, :] * k_size + k[:, None]
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 and not APART else tl.float32
    acc = tl.zeros((BLOCK_M, COLUMNS), SUM)
    for start in tl.range(0, k_size, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_tile, mask=inside[:, None], other=0.0)
            weight = tl.load(weight_tile)
        else:
            rest = k < k_size - start
            x = tl.load(x_tile, mask=inside[:, None] & rest[None, :], other=0.0)
            weight = tl.load(weight_tile, mask=rest[:, None], other=0.0)
        if APART:
            group = start // BLOCK_K
            x_scale = tl.load(x_scale_ptr + group * x_rows + x_row, mask=inside, other=0.0)
            acc += _scaled_part(x, weight, x_scale, tl.load(scale_ptr + group.to(tl.int64) * weight_rows + n_row))
        else:
            acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=SUM)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K
    dtype = out_ptr.dtype.element_ty
    if scale_ptr is not None and not APART:
        x_scale = tl.load(x_scale_ptr + x_row, mask=inside, other=0.0)[:, None]
        acc = acc.to(tl.float32) * x_scale * tl.load(scale_ptr + n_row)[None, :]
    if GATED:
        # Rounded where the product, silu and their product are in torch.
        gate, up = tl.split(tl.reshape(acc.to(dtype), (BLOCK_M, BLOCK_N, 2)))
        gate = gate.to(tl.float32)
        acc = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(tl.float32)
    out = out_ptr + out_row.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(out, acc.to(dtype), mask=inside[:, None] & (n < n_size)[None, :])


@triton.jit
def _scaled_part(x, weight, x_scale, scale):
    """A product of tiles [m, k] and [k, n] of 8-bit numbers with a scale for each of their rows and columns: [m, n] float32."""
    SUM: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    return tl.dot(x, weight, out_dtype=SUM).to(tl.float32) * x_scale[:, None] * scale[None, :]


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
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
