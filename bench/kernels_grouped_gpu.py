"""Sections of `bench/kernels_gpu.py` whose kernels serve rows in groups: a mixture of experts, adapters, shared prefixes.

Everything is timed as it runs in the engine, call after call in a CUDA graph, each call on weights or a cache of its own, beside the
least time that its bytes or its arithmetic take at ceilings measured in the same run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import triton
from kernels_gpu import DEVICE, DTYPE, Row, difference, layer_us, read_ceiling

from nanovllm.engine.shared_prefix import find_shared
from nanovllm.kernels import fused_moe, lora, paged_decode
from nanovllm.kernels.fused_moe import MoeTiles, ProductTiles
from nanovllm.kernels.grouping import group_rows
from nanovllm.kernels.quantize import quantize_rows
from nanovllm.kernels.scaled_linear import GROUP
from nanovllm.kernels.shared_prefix import attend_shared, members_of_tile
from nanovllm.layers.attention import AttentionBatch, AttentionSpec
from nanovllm.layers.backends.triton_backend import TritonBackend
from nanovllm.layers.linear import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    RowParallelLinear,
    qkv_parallel_linear,
)
from nanovllm.layers.lora import AdapterTokens, LoraWeights
from nanovllm.layers.parallel import TensorParallel
from nanovllm.utils.prefixes import Capacity

Linear = ColumnParallelLinear | RowParallelLinear
# Threads that compile variants at the same time.
COMPILERS = 16
# By the rows of a tile: (block_n, block_k, stages, warps) of both products.
MOE_TILES: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    16: ((16, 256, 4, 2), (32, 64, 6, 4), (32, 128, 4, 2), (32, 128, 4, 4), (32, 256, 3, 4), (64, 64, 6, 4), (64, 128, 3, 4)),
    32: ((32, 128, 4, 4), (64, 128, 3, 4), (64, 128, 4, 4), (128, 64, 4, 4)),
    128: (
        (64, 64, 3, 4), (64, 64, 4, 8), (128, 64, 3, 4), (128, 64, 3, 8), (128, 64, 4, 8), (256, 64, 3, 8), (256, 64, 4, 8),
    ),
}  # fmt: skip
# Programs that share columns, where an expert has several tiles.
MOE_TURNS = (1, 8)


class MoeShape(NamedTuple):
    """Experts, those of a token, hidden size, an expert's size, layers to time one after the other, and numbers of tokens."""

    experts: int
    top_k: int
    hidden: int
    size: int
    layers: int
    tokens: tuple[int, ...]


MOE_SHAPES = {
    "30b-a3b": MoeShape(128, 8, 2048, 768, 6, (1, 64, 256, 1024, 4096)),
    "mixtral-8x7b": MoeShape(8, 2, 4096, 14336, 3, (1, 256, 4096)),
}


def timed(calls: Sequence[Callable[[], object]]) -> float | None:
    """`layer_us`, None where the device has too little shared memory for a variant."""
    try:
        return layer_us(calls)
    except triton.runtime.errors.OutOfResources:
        return None


def compile_all(calls: Sequence[Callable[[], object]]) -> None:
    """Run each once, those after the first at the same time: what takes long is the compiler."""

    def run(call: Callable[[], object]) -> None:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            call()

    for call in calls[:1]:
        run(call)
    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(run, calls[1:]))
    torch.cuda.synchronize()


def bytes_ceiling(num_bytes: float) -> float:
    """`read_ceiling` of so many bytes; beyond 1 GiB it no longer grows."""
    return _bytes_ceiling(min(int(num_bytes), 1 << 30))


@cache
def _bytes_ceiling(num_bytes: int) -> float:
    return read_ceiling(num_bytes, layers=4)


@cache
def flops_ceiling() -> float:
    """TFLOP/s of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / layer_us([lambda: torch.mm(a, b)] * 4) / 1e6


def limit(num_bytes: float, flops: float, gb_per_s: float) -> Row:
    """The least microseconds of so many bytes and FLOP, and which of them it is."""
    times = {"bytes": num_bytes / gb_per_s / 1e3, "flops": flops / flops_ceiling() / 1e6}
    by = max(times, key=times.__getitem__)
    return {"limit_us": round(times[by], 1), "limited_by": by}


def moe_section() -> list[Row]:
    """The mixture of experts: whole, part by part, and its two products in the tiles of `MOE_TILES`.

    The limit counts the weights of the experts that random routing touches, each token's input and its output.
    """
    rows: list[Row] = [{"moe": "ceiling", "tflops": round(flops_ceiling())}]
    for name, shape in MOE_SHAPES.items():
        experts, _, hidden, size, layers, token_counts = shape
        gate_up = torch.randn(layers, experts, 2 * size, hidden, device=DEVICE, dtype=DTYPE) * hidden**-0.5
        down = torch.randn(layers, experts, hidden, size, device=DEVICE, dtype=DTYPE) * size**-0.5
        for tokens in token_counts:
            rows += _moe_rows(name, shape, tokens, gate_up, down)
        for group in (0, GROUP):
            rows += _moe_fp8_rows(name, shape, gate_up, down, group)
    return rows


def _moe_fp8_rows(name: str, shape: MoeShape, gate_up: torch.Tensor, down: torch.Tensor, group: int) -> list[Row]:
    """The whole with weights and activations in 8 bits, with scales of whole rows or of groups of columns."""
    experts, top_k, hidden, size, layers, token_counts = shape
    numbers: list[list[torch.Tensor]] = []
    scales: list[fused_moe.ExpertScales] = []
    for layer in range(layers):
        rounded = [quantize_rows(weight[layer].flatten(0, 1), torch.float8_e4m3fn, group) for weight in (gate_up, down)]
        numbers.append([values.unflatten(0, (experts, -1)) for values, _ in rounded])
        scales.append(fused_moe.ExpertScales(*(scale.unflatten(1, (experts, -1)) for _, scale in rounded)))
    rows: list[Row] = []
    for tokens in token_counts:
        x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
        routed = [fused_moe.route(torch.randn(tokens, experts, device=DEVICE), top_k, True) for _ in range(layers)]

        def block(layer: int) -> torch.Tensor:
            return fused_moe.fused_experts(x, *numbers[layer], *routed[layer], scales=scales[layer])  # noqa: B023

        num_bytes = sum(len(ids.unique()) for ids, _ in routed) / layers * 3 * hidden * size
        least = limit(num_bytes + 4 * tokens * hidden, 3 * tokens * top_k * hidden * size, bytes_ceiling(num_bytes))
        us = layer_us([partial(block, layer) for layer in range(layers)])
        reference = fused_moe.fused_experts_torch(x, gate_up[0], down[0], *routed[0])
        rows.append(
            {"moe": name, "form": f"fp8 {group}", "tokens": tokens, "us": round(us, 1), **least}
            | {"of_limit": round(least["limit_us"] / us, 3), "difference": difference(block(0), reference)}
        )
        print(rows[-1], flush=True)
    return rows


def _moe_rows(name: str, shape: MoeShape, tokens: int, gate_up: torch.Tensor, down: torch.Tensor) -> list[Row]:
    experts, top_k, hidden, size, layers, _ = shape
    pairs = tokens * top_k
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
    logits = [torch.randn(tokens, experts, device=DEVICE, dtype=DTYPE) for _ in range(layers)]
    routed = [fused_moe.route(one, top_k, True) for one in logits]
    touched = sum(len(ids.unique()) for ids, _ in routed) / layers
    expert_bytes, expert_flops = hidden * size * DTYPE.itemsize, 2 * pairs * hidden * size
    row_bytes = 2 * tokens * hidden * DTYPE.itemsize
    gb_per_s = bytes_ceiling(touched * 3 * expert_bytes)
    whole = limit(touched * 3 * expert_bytes + row_bytes, 3 * expert_flops, gb_per_s)

    def block(layer: int) -> torch.Tensor:
        ids, weights = fused_moe.route(logits[layer], top_k, True)
        return fused_moe.fused_experts(x, gate_up[layer], down[layer], ids, weights)

    grouped = fused_moe.groups_pairs(pairs, top_k, experts)
    tiles = fused_moe.moe_tiles(pairs, experts, grouped=grouped)
    group = [partial(group_rows, ids, experts, 0, tiles.block_m) for ids, _ in routed]
    us = layer_us([partial(block, layer) for layer in range(layers)])
    reference = fused_moe.fused_experts_torch(x, gate_up[0], down[0], *routed[0])
    row: Row = {
        "moe": name, "tokens": tokens, "experts": round(touched, 1), "gb_per_s": round(gb_per_s), **whole,
        "us": round(us, 1), "of_limit": round(whole["limit_us"] / us, 3), "tiles": tiles,
        "route_us": round(layer_us([partial(fused_moe.route, one, top_k, True) for one in logits]), 1),
        "group_us": round(layer_us(group), 1), "difference": difference(block(0), reference),
    }  # fmt: skip
    rows = [row]
    print(row, flush=True)
    inner = torch.randn(pairs, size, device=DEVICE, dtype=DTYPE)
    outer = torch.empty(pairs, hidden, device=DEVICE, dtype=DTYPE)
    block_sizes = [16] if not grouped else [size for size in MOE_TILES if size >= pairs / experts][:2] or [128]
    plans = {
        block_m: [group_rows(ids, experts, 0, block_m) if grouped else (ids, None) for ids, _ in routed]
        for block_m in block_sizes
    }
    variants = [
        MoeTiles(block_m, ProductTiles(*columns), ProductTiles(*columns), turns)
        for block_m in plans
        for columns in MOE_TILES[block_m]
        for turns in MOE_TURNS[: 1 + (pairs / experts > block_m)]
    ]
    products: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]] = {
        "gate_up": (x, gate_up, inner, 2 * touched * expert_bytes, 2 * expert_flops),
        "down": (inner, down, outer, touched * expert_bytes, expert_flops),
    }

    def call(product: str, tiles: MoeTiles, layer: int) -> None:
        source, weight, out, *_ = products[product]
        plan, gated = plans[tiles.block_m][layer], product == "gate_up"
        fused_moe.grouped_linear(source, weight[layer], out, *plan, 0, top_k, tiles, gated=gated)

    compile_all([partial(call, product, variant, 0) for product in products for variant in variants])
    for product, (source, _, out, num_bytes, flops) in products.items():
        # Here what goes from one product to the other counts: no product alone is without it.
        least = limit(num_bytes + (source.numel() + out.numel()) * DTYPE.itemsize, flops, gb_per_s)
        best: Row | None = None
        for variant in variants:
            us_or_none = timed([partial(call, product, variant, layer) for layer in range(layers)])
            if us_or_none is None:
                continue
            one = {
                "moe": name,
                "tokens": tokens,
                "product": product,
                "block_m": variant.block_m,
                "tiles": variant.gate_up,
                "turns": variant.turns,
                "us": round(us_or_none, 1),
            }
            rows.append(one | least | {"of_limit": round(least["limit_us"] / us_or_none, 3)})
            best = min(best or rows[-1], rows[-1], key=lambda r: r["us"])
        print("best", best, flush=True)
    return rows


class LoraShape(NamedTuple):
    """A dense model: hidden size, size of its feed-forward block, query heads, KV heads, layers to time."""

    hidden: int
    size: int
    heads: int
    kv_heads: int
    layers: int


LORA_SHAPES = {"0.6b": LoraShape(1024, 3072, 16, 8, 28), "8b": LoraShape(4096, 12288, 32, 8, 10)}
LORA_TOKENS = {"0.6b": (1, 64, 256, 8192), "8b": (1, 64, 256, 1024, 8192)}
ADAPTERS = 8


def lora_section() -> list[Row]:
    """Linear layers of a decode step or a chunk, as the engine runs them, without adapters and with eight of them mixed.

    The adapters' ranks are 16 and 32, so all are padded to 32.
    """
    rows: list[Row] = []
    tp = TensorParallel()
    for name, (hidden, size, heads, kv_heads, layers) in LORA_SHAPES.items():
        holder = AdapterTokens(ADAPTERS)
        blocks: list[dict[str, Linear]] = []
        for _ in range(layers):
            with torch.device(DEVICE):
                block: dict[str, Linear] = {
                    "qkv": qkv_parallel_linear(hidden, heads, kv_heads, 128, False, tp),
                    "o": RowParallelLinear(heads * 128, hidden, False, tp, slot=0),
                    "gate_up": GatedColumnParallelLinear(hidden, size, False, tp),
                    "down": RowParallelLinear(size, hidden, False, tp, slot=1),
                }
            for module in block.values():
                module.weight.data = torch.randn(module.weight.shape, device=DEVICE, dtype=DTYPE) * 0.03
                module.lora = _random_adapters(module, holder)
            blocks.append(block)
        for tokens in LORA_TOKENS[name]:
            inputs = {
                part: torch.randn(tokens, module.weight.shape[1], device=DEVICE, dtype=DTYPE)
                for part, module in blocks[0].items()
            }
            # Decodes are in any order, the tokens of a chunk are one sequence's.
            run = 1 if tokens <= 1024 else 512
            index = torch.arange(tokens, device=DEVICE, dtype=torch.int32) // run % ADAPTERS
            row: Row = {"lora": name, "tokens": tokens}
            for kind, value in (("base_us", None), ("us", index)):
                holder.assign(value)
                calls = [partial(module, inputs[part]) for block in blocks for part, module in block.items()]
                row[kind] = round(layer_us(calls) * len(inputs), 1)
                for part in inputs:
                    calls = [partial(block[part], inputs[part]) for block in blocks]
                    row[f"{part}_{kind}"] = round(layer_us(calls), 1)
            row["share"] = round(row["base_us"] / row["us"], 3)
            module = blocks[0]["qkv"]
            assert module.lora is not None
            plain = module.weight.data @ inputs["qkv"].t()
            adapted = lora.lora_add_torch(
                inputs["qkv"], plain.t().clone(), module.lora.a, module.lora.b, index, module.lora.starts
            )
            rows.append(row | {"difference": difference(module(inputs["qkv"]), adapted)})
            print(rows[-1], flush=True)
    return rows


def _random_adapters(module: Linear, tokens: AdapterTokens) -> LoraWeights:
    rank = 32
    rows, columns = module.weight.shape
    starts = [0, rows]
    if isinstance(module, ColumnParallelLinear):
        starts = [*(start for start, _, _ in module.offsets.values()), rows]
    a = torch.randn(ADAPTERS, (len(starts) - 1) * rank, columns, device=DEVICE, dtype=DTYPE) * columns**-0.5
    b = torch.randn(ADAPTERS, rows, rank, device=DEVICE, dtype=DTYPE) * 0.1
    b[: ADAPTERS // 2, :, rank // 2 :] = 0
    return LoraWeights(a, b, starts, tokens)


class SharedShape(NamedTuple):
    """Sequences, their query heads (8 KV heads), tokens that all share, and tokens of their own."""

    batch: int
    heads: int
    prefix: int
    own: int


SHARED_SHAPES = (
    SharedShape(256, 16, 4096, 128), SharedShape(1024, 16, 1024, 128), SharedShape(64, 16, 1024, 128), SharedShape(16, 16, 1024, 128),
    SharedShape(256, 32, 4096, 128), SharedShape(64, 32, 1024, 128), SharedShape(16, 32, 4096, 128),
)  # fmt: skip
# What attends to the shared tokens: rows, tile, stages, warps, programs a multiprocessor.
SHARED_VARIANTS = (
    (64, 64, 3, 4, 2), (64, 64, 2, 4, 2), (64, 64, 3, 4, 1), (64, 64, 3, 4, 4), (32, 64, 3, 4, 2), (128, 64, 2, 8, 1), (128, 64, 3, 8, 1),
    (128, 128, 2, 8, 1),
)  # fmt: skip
# What attends to a sequence's own and joins: tile, stages, warps, programs a multiprocessor.
OWN_VARIANTS = (
    (64, 6, 4, 2), (64, 3, 4, 2), (64, 6, 4, 4), (32, 6, 2, 4), (32, 3, 2, 4), (32, 6, 2, 8), (32, 6, 4, 2), (32, 6, 4, 4),
)  # fmt: skip


def shared_section(block_size: int) -> list[Row]:
    """Decode of sequences with a common prefix: each for itself, the prefix once for all, and the two kernels of the latter apart.

    The limit counts the prefix once. The plain path reads the same blocks for every sequence, so the L2 cache helps it.
    """
    rows: list[Row] = []
    for shape in SHARED_SHAPES:
        rows += _shared_rows(shape, block_size)
    return rows


def _shared_rows(case: SharedShape, block_size: int) -> list[Row]:
    batch, num_heads, prefix, own = case
    num_kv_heads, layers, dim = 8, 6, 128
    group = num_heads // num_kv_heads
    first, width = prefix // block_size, -(-(prefix + own) // block_size)
    blocks = first + batch * (width - first)
    tables = torch.empty(batch, width, dtype=torch.int32)
    order = torch.randperm(blocks, dtype=torch.int32)
    tables[:, :first] = order[:first]
    tables[:, first:] = order[first:].view(batch, -1)
    pool = torch.randn(2, layers, blocks, block_size, num_kv_heads, dim, device=DEVICE, dtype=DTYPE)
    backend = TritonBackend(num_heads, num_kv_heads, dim, batch, DEVICE, DTYPE)
    spec = AttentionSpec(dim**-0.5)
    backend.add_window(spec.window)
    capacity = Capacity.of(batch)
    backend.enable_sharing(capacity, batch)
    assert backend.shared is not None
    lens = np.full(batch, prefix + own)
    slots, lens_gpu, tables_gpu = (
        torch.arange(batch, device=DEVICE),
        torch.from_numpy(lens).to(DEVICE),
        tables.to(DEVICE),
    )
    q = torch.randn(batch, num_heads, dim, device=DEVICE, dtype=DTYPE)
    out = torch.empty_like(q)
    shape = backend.sharing_shape(num_heads, num_kv_heads, dim, DTYPE)

    def share(members: int, programs: int) -> int:
        """Cut the prefix into items for so many members and programs; how many there are."""
        cut = shape._replace(tile=members, items=programs)
        found = find_shared(tables.numpy(), lens, np.arange(batch), block_size, cut, capacity, 0)
        if found is None:
            raise SystemExit("nothing is shared")
        backend.load_shared(found)
        return len(found.items)

    row: Row = {
        "shared": prefix,
        "own": own,
        "batch": batch,
        "heads": num_heads,
        "items": share(shape.tile, shape.items),
    }
    num_bytes = (prefix + batch * own) * shape.token_bytes + 2 * q.nbytes
    gb_per_s = bytes_ceiling(num_bytes)
    row |= limit(num_bytes, 4 * batch * (prefix + own) * num_heads * dim, gb_per_s)
    step = AttentionBatch(tables_gpu, block_size, slots, lens_gpu, None)
    results = []
    for name, shares in (("plain_us", False), ("us", True)):
        plan = backend.plan(step._replace(shares=shares))
        calls = [partial(backend.attend, q, pool[0, i], pool[1, i], plan, spec) for i in range(layers)]
        row[name] = round(layer_us(calls), 1)
        results.append(calls[0]())
    row["of_limit"] = round(row["limit_us"] / row["us"], 3)
    rows = [row | {"difference": difference(results[1], results[0])}]
    print(rows[-1], flush=True)

    def own_calls(tile: int, stages: int, warps: int, per_sm: int, joins: bool = True) -> list[Callable[[], object]]:
        """The own tokens of each layer; not `joins`: as if there were no others."""
        programs = paged_decode.decode_programs(num_kv_heads, DEVICE, per_sm)
        launch = paged_decode.DecodeLaunch(per_sm, stages, warps)
        buffers = paged_decode.make_decode_buffers(batch, programs, num_heads, num_kv_heads, dim, DEVICE)
        shared = backend.shared if joins else None
        paged_decode.plan_decode(slots, lens_gpu - (0 if joins else prefix), programs, buffers, tile, shared=shared)
        table = tables_gpu if joins else tables_gpu[:, first:].contiguous()
        return [
            partial(
                paged_decode.paged_decode, q, pool[0, i], pool[1, i], table, programs, buffers, spec.scale, out,
                tile=tile, launch=launch, other_kernel_between=True, shared=shared,
            )
            for i in range(layers)
        ]  # fmt: skip

    def shared_calls(rows: int, tile: int, stages: int, warps: int, per_sm: int) -> list[Callable[[], object]]:
        assert backend.shared is not None
        programs = paged_decode.decode_programs(num_kv_heads, DEVICE, per_sm)
        return [
            partial(
                attend_shared, q, pool[0, i], pool[1, i], tables_gpu, backend.shared, spec.scale,
                programs=programs, rows=rows, tile=tile, num_stages=stages, num_warps=warps, other_kernel_between=True,
            )
            for i in range(layers)
        ]  # fmt: skip

    compile_all([own_calls(*variant)[0] for variant in OWN_VARIANTS])
    compile_all([shared_calls(*variant)[0] for variant in SHARED_VARIANTS])
    of: Row = {"batch": batch, "heads": num_heads, "shared": prefix, "own": own}
    alone = timed(own_calls(*OWN_VARIANTS[0], joins=False))
    rows.append(of | {"part": "own tokens, nothing joined", "us": alone and round(alone, 1)})
    print(rows[-1], flush=True)
    for part, variants in (("own tokens", OWN_VARIANTS), ("shared tokens", SHARED_VARIANTS)):
        for variant in variants:
            items = 0
            if part == "shared tokens":
                programs = paged_decode.decode_programs(num_kv_heads, DEVICE, variant[-1])
                items = share(members_of_tile(group, variant[0]), programs)
                calls = shared_calls(*variant)
            else:
                calls = own_calls(*variant)
            us = timed(calls)
            if us is None:
                continue
            if items:
                calls[0]()
            own_calls(*(OWN_VARIANTS[0] if items else variant))[0]()
            rows.append(of | {"part": part, "variant": variant, "items": items, "us": round(us, 1)})
            if difference(out, results[0]) > 0.01:
                raise SystemExit(f"wrong results: {rows[-1]}")
            print(rows[-1], flush=True)
    return rows


def grouped_sections(sections: list[str] | None, block_size: int) -> Iterator[tuple[str, list[Row]]]:
    """Those of `sections` (None: every one) that are here, one by one, as rows."""
    torch.manual_seed(0)
    there: dict[str, Callable[[], list[Row]]] = {
        "moe": moe_section,
        "lora": lora_section,
        "shared": partial(shared_section, block_size),
    }
    for name, section in there.items():
        if sections is None or name in sections:
            yield name, section()
