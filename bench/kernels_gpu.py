# ruff: noqa: B023, E731 - each closure is timed before its loop goes on
"""The GPU part of `bench/kernels.py`: median times in bfloat16 on random inputs.

Decode attention and the small kernels are timed as they run in the engine: one after the other in a CUDA graph, attention on
layers of its own, so that no cache helps. Prefill is timed call by call, with the L2 cache flushed.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from nanovllm.kernels import (
    activation,
    layernorm,
    packed_linear,
    paged_decode,
    paged_prefill,
    qk_norm_rope,
    quantize,
    sampling,
    scaled_linear,
    skinny_linear,
)
from nanovllm.kernels.fp8_cache import quantize_kv_rows
from nanovllm.kernels.paged_attention import context_slots, paged_decode_torch
from nanovllm.utils.roofline import H200

try:  # the FlashAttention-3 of vLLM, without vLLM
    import vfa3
except ImportError:
    vfa3 = None

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
Row = dict[str, Any]
DEFAULTS = paged_decode.LAUNCH
DECODE_DEFAULTS = (
    DEFAULTS.programs_per_sm,
    paged_decode.decode_tile(128, DTYPE),
    DEFAULTS.num_stages,
    DEFAULTS.num_warps,
    paged_decode.ITEM_TILES,
)


def median_ms(call: Callable[[], object], rep: int = 60) -> float:
    """Median time; the L2 cache is flushed before each call."""
    return float(triton.testing.do_bench(call, warmup=10, rep=rep, return_mode="median"))


def layer_us(calls: Sequence[Callable[[], object]], replays: int = 15) -> float:
    """Median microseconds of one of `calls`, each on data of its own, as they follow one another in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


@triton.jit
def _read_kernel(source, out, per_program, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * per_program
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, per_program, BLOCK, num_stages=4):
        acc += tl.load(source + start + i + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(acc))


def read_ceiling(num_bytes: int, layers: int = 8) -> float:
    """GB/s of reading `num_bytes` and adding them up, one call after the other: the best of some shapes."""
    best = 0.0
    for block, per_program, warps in itertools.product((4096, 8192), (1 << 13, 1 << 14, 1 << 15), (4, 8)):
        programs = num_bytes // 4 // per_program
        sources = [torch.randn(programs * per_program, device=DEVICE) for _ in range(layers)]
        out = torch.empty(programs, device=DEVICE)
        calls = [
            lambda source=source: _read_kernel[(programs,)](source, out, per_program, BLOCK=block, num_warps=warps)
            for source in sources
        ]
        best = max(best, sources[0].nbytes / layer_us(calls) / 1e3)
    return best


class Cache:
    """Random keys and values in scattered blocks for sequences of `lens` tokens; `layout` orders tokens and heads in a block.

    `fp8`: in eight bits, with scales beside them.
    """

    def __init__(
        self,
        lens: list[int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        layout: str = "NHD",
        layers: int = 1,
        fp8: bool = False,
    ) -> None:
        width = -(-max(lens) // block_size)
        counts = [-(-length // block_size) for length in lens]
        order = torch.randperm(sum(counts)).tolist()
        self.tables = torch.zeros(len(lens), width, dtype=torch.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        self.tables = self.tables.to(DEVICE)
        if layout == "NHD":
            pool = torch.randn(2, layers, sum(counts), block_size, num_kv_heads, head_dim, device=DEVICE, dtype=DTYPE)
        else:
            pool = torch.randn(2, layers, sum(counts), num_kv_heads, block_size, head_dim, device=DEVICE, dtype=DTYPE)
            pool = pool.transpose(3, 4)
        self.layers = list(zip(pool[0], pool[1], strict=True))
        # In the keyword arguments of the kernels.
        self.scales: list[dict[str, torch.Tensor]] = [{} for _ in self.layers]
        if fp8:
            for i, layer in enumerate(self.layers):
                values, scales = zip(*map(quantize_kv_rows, layer), strict=True)
                self.layers[i] = values
                self.scales[i] = {"scales": torch.stack(scales, -1).transpose(1, 2).contiguous()}
        self.k, self.v = self.layers[0]
        self.lens = torch.tensor(lens, device=DEVICE)
        self.lens32 = self.lens.int()
        self.slots = torch.arange(len(lens), device=DEVICE)
        self.bytes = 2 * sum(lens) * num_kv_heads * (head_dim + 2 if fp8 else head_dim * DTYPE.itemsize)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5

    def decode(
        self,
        per_sm: int,
        tile: int,
        stages: int,
        warps: int,
        item_tiles: int,
        registers: int | None = None,
        narrow_scores: bool = False,
    ) -> tuple[list[Callable[[], object]], torch.Tensor]:
        """Our decode of each layer, and its output."""
        batch = len(self.lens)
        self.q = q = torch.randn(batch, self.num_heads, self.head_dim, device=DEVICE, dtype=DTYPE)
        programs = paged_decode.decode_programs(self.num_kv_heads, DEVICE, per_sm)
        buffers = paged_decode.make_decode_buffers(
            batch, programs, self.num_heads, self.num_kv_heads, self.head_dim, DEVICE
        )
        out = torch.full_like(q, float("nan"))
        paged_decode.plan_decode(self.slots, self.lens, programs, buffers, tile=tile, item_tiles=item_tiles)
        launch = DEFAULTS._replace(
            programs_per_sm=per_sm,
            num_stages=stages,
            num_warps=warps,
            max_registers=registers,
            narrow_scores=narrow_scores,
        )
        options = {"tile": tile, "launch": launch}
        return [
            partial(
                paged_decode.paged_decode, q, k, v, self.tables, programs, buffers, self.scale, out,
                other_kernel_between=True, **options, **scales,
            )
            for (k, v), scales in zip(self.layers, self.scales, strict=True)
        ], out  # fmt: skip

    def check(self, call: Callable[[], object], out: torch.Tensor) -> None:
        """Fast and wrong is no result: the first layer's `call` must give what plain torch does."""
        out.fill_(float("nan"))
        call()
        slots = context_slots(self.tables, self.k.shape[1], int(self.lens.max()))
        mask = torch.arange(slots.shape[1], device=DEVICE) < self.lens[:, None]
        k, v = self.k.contiguous(), self.v.contiguous()
        error = difference(out, paged_decode_torch(self.q, k, v, slots, mask, self.scale, **self.scales[0]))
        if not error < 0.01:
            raise SystemExit(f"the decode kernel is wrong: relative difference {error}")

    def fa3_decode(self) -> list[Callable[[], torch.Tensor]]:
        """FlashAttention-3 on the same queries, with its own schedule made beforehand."""
        batch = len(self.lens)
        starts = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32)
        longest = int(self.lens.max())
        options = {"seqused_k": self.lens32, "max_k": longest, "page_table": self.tables, "causal": True}
        return [partial(vfa3.varlen, self.q, k, v, starts, 1, **options) for k, v in self.layers]


def random_lens(count: int, low: int, high: int) -> list[int]:
    rng = random.Random(count)
    return [rng.randint(low, high) for _ in range(count)]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return round(float((a.float() - b.float()).norm() / b.float().norm()), 5)


def decode_section(block_size: int) -> list[Row]:
    """Decode at mean context 800 as it runs in a graph, layer after layer: tiles, stages, warps, split, layout."""
    rows: list[Row] = []
    for batch in (256, 128, 32):
        lens = random_lens(batch, 100, 1500)
        caches = {layout: Cache(lens, 16, 8, 128, block_size, layout, layers=8) for layout in ("NHD", "HND")}
        ceiling = read_ceiling(caches["NHD"].bytes)
        rows.append({"batch": batch, "kernel": "read", "gb_per_s": round(ceiling)})
        print(rows[-1], flush=True)
        shapes = ((32, 6, 2), (64, 6, 4), (16, 10, 1), (32, 8, 2))
        variants = [("NHD", w, *shape, cost) for shape in shapes for w in (2, 3, 4, 5, 6, 10) for cost in (0, 2, 4)]
        variants += [("HND", 4, 32, 6, 2, 2)]
        best: Row | None = None
        for layout, per_sm, tile, stages, warps, cost in variants:
            cache = caches[layout]
            try:
                calls, out = cache.decode(per_sm, tile, stages, warps, cost)
                us = layer_us(calls)
                cache.check(calls[0], out)
            except triton.runtime.errors.OutOfResources as error:
                print(layout, per_sm, tile, stages, warps, error, flush=True)
                continue
            row = {
                "batch": batch, "layout": layout, "programs_per_sm": per_sm, "tile": tile, "stages": stages, "warps": warps, "item_tiles": cost,
                "us": round(us, 1), "of_read_ceiling": round(cache.bytes / us / 1e3 / ceiling, 3),
            }  # fmt: skip
            rows.append(row)
            best = min(best or row, row, key=lambda r: r["us"])
        print("best", best, flush=True)
        cache = caches["NHD"]
        if vfa3 is not None:
            calls, out = cache.decode(*DECODE_DEFAULTS)
            calls[0]()
            theirs = cache.fa3_decode()
            row = {"batch": batch, "kernel": "FlashAttention-3", "us": round(layer_us(theirs), 1)}
            rows.append(row | {"difference": difference(out, theirs[0]())})
            print(rows[-1], flush=True)
        programs = paged_decode.decode_programs(8, DEVICE, DEFAULTS.programs_per_sm)
        buffers = paged_decode.make_decode_buffers(batch, programs, 16, 8, 128, DEVICE)
        us = layer_us([lambda: paged_decode.plan_decode(cache.slots, cache.lens, programs, buffers, 64)] * 8)
        rows.append({"batch": batch, "kernel": "plan_decode", "us": round(us, 1)})
        print(rows[-1], flush=True)
    return rows


def fp8_section(block_size: int) -> list[Row]:
    """Decode, prefill and the store with a cache in eight bits, beside the same in bfloat16."""
    rows: list[Row] = []
    forms = [
        (4, 32, 8, 2, None, False), (2, 128, 6, 4, None, False), (2, 128, 6, 4, None, True), (2, 64, 8, 4, None, True),
        (3, 64, 5, 4, 168, True), (3, 64, 6, 4, 168, True), (3, 128, 4, 4, 168, True), (4, 64, 5, 4, 128, True),
    ]  # fmt: skip
    for batch in (256, 128, 32):
        lens = random_lens(batch, 100, 1500)
        cache = Cache(lens, 16, 8, 128, block_size, layers=8)
        calls, out = cache.decode(*DECODE_DEFAULTS)
        rows.append({"batch": batch, "kernel": "decode, bfloat16", "us": round(layer_us(calls), 1)})
        print(rows[-1], flush=True)
        cache = Cache(lens, 16, 8, 128, block_size, layers=16, fp8=True)
        ceiling = read_ceiling(cache.bytes)
        for per_sm, tile, stages, warps, registers, narrow in forms:
            try:
                calls, out = cache.decode(per_sm, tile, stages, warps, paged_decode.ITEM_TILES, registers, narrow)
                us = layer_us(calls)
                cache.check(calls[0], out)
            except triton.runtime.errors.OutOfResources as error:
                print(per_sm, tile, stages, warps, narrow, error, flush=True)
                continue
            rows.append({
                "batch": batch, "kernel": "decode, fp8", "programs_per_sm": per_sm, "tile": tile, "stages": stages, "warps": warps,
                "registers": registers, "narrow_scores": narrow, "us": round(us, 1),
                "of_read_ceiling": round(cache.bytes / us / 1e3 / ceiling, 3),
            })  # fmt: skip
            print(rows[-1], flush=True)
    chunks = {"16 x 1024": [(1024, 1024)] * 16, "100 x 160 after 1024": [(160, 1184)] * 100}
    for (name, lengths), fp8 in itertools.product(chunks.items(), (False, True)):
        query_lens, context_lens = (np.array(column) for column in zip(*lengths, strict=True))
        cache = Cache(context_lens.tolist(), 16, 8, 128, block_size, fp8=fp8)
        q = torch.randn(int(query_lens.sum()), 16, 128, device=DEVICE, dtype=DTYPE)
        tiles = torch.from_numpy(paged_prefill.prefill_tiles(np.arange(len(lengths)), query_lens, context_lens, 0, 2))
        call = partial(
            paged_prefill.paged_prefill, q, cache.k, cache.v, cache.tables, tiles.to(DEVICE), cache.scale, torch.empty_like(q),
            **cache.scales[0],
        )  # fmt: skip
        rows.append({"prefill": name, "fp8": fp8, "us": round(median_ms(call) * 1e3, 1)})
        print(rows[-1], flush=True)
    for tokens, fp8 in itertools.product((256, 16384), (False, True)):
        cache = Cache([tokens], 16, 8, 128, block_size, fp8=fp8)
        qkv = torch.randn(tokens, 32 * 128, device=DEVICE, dtype=DTYPE)
        table, norm = torch.rand(tokens, 128, device=DEVICE, dtype=DTYPE), torch.ones(128, device=DEVICE, dtype=DTYPE)
        slots = torch.arange(tokens, device=DEVICE)
        store = partial(
            qk_norm_rope.qk_norm_rope_store, qkv, slots, table, table, norm, norm, 1e-6, cache.k, cache.v, slots, **cache.scales[0]
        )  # fmt: skip
        rows.append({"store": tokens, "fp8": fp8, "us": round(layer_us([store] * 8), 1)})
        print(rows[-1], flush=True)
    return rows


def contexts_section(block_size: int) -> list[Row]:
    """Decode at growing contexts beside FlashAttention-3."""
    rows = []
    shapes = (
        (512, 256), (1024, 256), (2048, 128), (4096, 64), (8192, 32), (16384, 16), (32768, 8), (512, 1), (4096, 1), (32768, 1)
    )  # fmt: skip
    for context, batch in shapes:
        for heads in ((16, 8), (32, 8)):
            layers = max(2, min(8, (1 << 33) // (context * batch * 4096)))
            cache = Cache([context] * batch, heads[0], heads[1], 128, block_size, layers=layers)
            calls, out = cache.decode(*DECODE_DEFAULTS)
            row: Row = {"context": context, "batch": batch, "heads": heads, "us": round(layer_us(calls), 1)}
            cache.check(calls[0], out)
            if vfa3 is not None:
                theirs = cache.fa3_decode()
                row["fa3_us"] = round(layer_us(theirs), 1)
                row["of_fa3"] = round(row["us"] / row["fa3_us"], 3)
                calls[0]()
                row["difference"] = difference(out, theirs[0]())
            rows.append(row)
            print(row, flush=True)
    return rows


def prefill_section(block_size: int) -> list[Row]:
    """Prefill: whole prompts, a long one, and suffixes behind a cached prefix, each behind its own and all behind the same one."""
    rows = []
    suffixes = [(160, 1184)] * 100
    shapes = {
        "16 x 1024": [(1024, 1024)] * 16, "1 x 8192": [(8192, 8192)],
        "100 x 160 after 1024": suffixes, "100 x 160 after the same 1024": suffixes,
    }  # fmt: skip
    for name, chunks in shapes.items():
        for num_heads, num_kv_heads in ((16, 8), (32, 8)):
            query_lens, lens = (np.array(column) for column in zip(*chunks, strict=True))
            cache = Cache(lens.tolist(), num_heads, num_kv_heads, 128, block_size)
            if "the same" in name:
                cache.tables[:, : 1024 // block_size] = cache.tables[0, : 1024 // block_size]
            q = torch.randn(int(query_lens.sum()), num_heads, 128, device=DEVICE, dtype=DTYPE)
            pairs = sum(query * length - query * (query - 1) // 2 for query, length in chunks)
            flops = 4 * pairs * num_heads * 128
            best: Row | None = None
            for block_m, block_n, stages, warps in ((64, 64, 3, 4), (64, 128, 2, 4), (128, 64, 3, 8), (128, 128, 2, 8)):
                tiles = paged_prefill.prefill_tiles(
                    np.arange(len(chunks)), query_lens, lens, 0, num_heads // num_kv_heads, block_m
                )
                tiles_gpu = torch.from_numpy(tiles).to(DEVICE)
                out = torch.full_like(q, float("nan"))
                call = lambda: paged_prefill.paged_prefill(
                    q, cache.k, cache.v, cache.tables, tiles_gpu, cache.scale, out,
                    block_m=block_m, block_n=block_n, num_stages=stages, num_warps=warps,
                )  # fmt: skip
                try:
                    ms = median_ms(call)
                except triton.runtime.errors.OutOfResources as error:
                    print(block_m, block_n, stages, warps, error, flush=True)
                    continue
                row = {
                    "prefill": name, "heads": (num_heads, num_kv_heads), "block_m": block_m, "block_n": block_n,
                    "stages": stages, "warps": warps, "us": round(ms * 1e3, 1), "tflops": round(flops / ms / 1e9),
                }  # fmt: skip
                rows.append(row)
                best = min(best or row, row, key=lambda r: r["us"])
            print("best", best, flush=True)
            if vfa3 is not None:
                starts = torch.tensor([0, *np.cumsum(query_lens)], device=DEVICE, dtype=torch.int32)
                theirs = lambda: vfa3.varlen(
                    q, cache.k, cache.v, starts, int(query_lens.max()), seqused_k=cache.lens32, max_k=int(lens.max()),
                    page_table=cache.tables, causal=True,
                )  # fmt: skip
                row = {"prefill": name, "heads": (num_heads, num_kv_heads), "kernel": "FlashAttention-3"}
                ms = median_ms(theirs)
                rows.append(
                    row
                    | {
                        "us": round(ms * 1e3, 1),
                        "tflops": round(flops / ms / 1e9),
                        "difference": difference(out, theirs()),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def _seed_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float() + residual.float()
    total = x.to(DTYPE)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(DTYPE) * weight, total


def _seed_sample(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    probs = torch.softmax(logits.float().div_(temperatures.unsqueeze(1)), dim=-1)
    return probs.div_(torch.empty_like(probs).exponential_(1).clamp_min_(1e-10)).argmax(dim=-1)


def small_section(block_size: int) -> list[Row]:
    """The small kernels beside `torch.compile` of the plain forms, one after the other in a graph, and what compiling costs."""
    rows: list[Row] = []

    def compare(name: str, tokens: int, ours: Callable[[], object], plain: Callable[[], object] | None) -> None:
        start = time.perf_counter()
        ours()
        torch.cuda.synchronize()
        row: Row = {"small": name, "tokens": tokens, "first_call_s": round(time.perf_counter() - start, 2)}
        row["us"] = round(layer_us([ours] * 8), 1)
        if plain is not None:
            row["torch_us"] = round(layer_us([plain] * 8), 1)
            torch._dynamo.reset()
            compiled = torch.compile(plain)
            start = time.perf_counter()
            compiled()
            torch.cuda.synchronize()
            row["compile_s"] = round(time.perf_counter() - start, 2)
            row["compiled_us"] = round(layer_us([compiled] * 8), 1)
        rows.append(row)
        print(row, flush=True)

    for tokens in (256, 16384):
        hidden, inter, heads, kv_heads, dim = 1024, 3072, 16, 8, 128
        x, residual = (torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
        weight = torch.randn(hidden, device=DEVICE, dtype=DTYPE)
        compare(
            "add_rms_norm", tokens,
            lambda: layernorm.add_rms_norm(x, residual, weight, 1e-6),
            lambda: _seed_rms_norm(x, residual, weight),
        )  # fmt: skip
        gate_up = torch.randn(tokens, 2 * inter, device=DEVICE, dtype=DTYPE)
        compare(
            "silu_and_mul", tokens,
            lambda: activation.silu_and_mul(gate_up),
            lambda: F.silu(gate_up[:, :inter]) * gate_up[:, inter:],
        )  # fmt: skip
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=DEVICE, dtype=DTYPE)
        positions = torch.randint(4096, (tokens,), device=DEVICE)
        cos, sin = (torch.rand(4096, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
        norms = [torch.randn(dim, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        caches = torch.zeros(2, -(-tokens // block_size), block_size, kv_heads, dim, device=DEVICE, dtype=DTYPE)
        slots = torch.randperm(caches.shape[1] * block_size, device=DEVICE)[:tokens]

        def plain_qk(
            qkv: torch.Tensor = qkv, positions: torch.Tensor = positions, cos: torch.Tensor = cos, sin: torch.Tensor = sin,
            norms: list[torch.Tensor] = norms, caches: torch.Tensor = caches, slots: torch.Tensor = slots,
        ) -> torch.Tensor:  # fmt: skip
            q, k, v = qkv.view(len(qkv), -1, dim).split((heads, kv_heads, kv_heads), dim=1)
            q, k = layernorm.rms_norm_torch(q, norms[0], 1e-6), layernorm.rms_norm_torch(k, norms[1], 1e-6)
            c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
            caches[0].view(-1, kv_heads, dim)[slots] = qk_norm_rope.rotate(k, c, s)
            caches[1].view(-1, kv_heads, dim)[slots] = v
            return qk_norm_rope.rotate(q, c, s)

        compare(
            "qk_norm_rope_store", tokens,
            lambda: qk_norm_rope.qk_norm_rope_store(qkv, positions, cos, sin, norms[0], norms[1], 1e-6, caches[0], caches[1], slots),
            plain_qk,
        )  # fmt: skip
    for tokens in (16, 256):
        logits = torch.randn(tokens, 151936, device=DEVICE, dtype=DTYPE)
        temperatures = torch.full((tokens,), 0.6, device=DEVICE)
        seeds, steps, order = (torch.arange(tokens, device=DEVICE) for _ in range(3))
        keys = torch.full((tokens,), sampling.LEAST_KEY, device=DEVICE)
        compare(
            "sample", tokens,
            lambda: sampling.sample_keys(logits, order, temperatures, seeds, steps, out=keys),
            lambda: _seed_sample(logits, temperatures),
        )  # fmt: skip
        greedy = torch.zeros_like(temperatures)
        compare(
            "sample greedy", tokens,
            lambda: sampling.sample_keys(logits, order, greedy, seeds, steps, out=keys),
            lambda: logits.argmax(dim=-1),
        )  # fmt: skip
    return rows


def layer_section(block_size: int) -> list[Row]:
    """What a decode step of Qwen3-0.6B's shape does in a layer beside attention: with our products and with cuBLAS."""
    layers, hidden, inter, heads, kv_heads, dim = 28, 1024, 3072, 16, 8, 128
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden), "o": (hidden, heads * dim),
        "gate_up": (2 * inter, hidden), "down": (hidden, inter),
    }  # fmt: skip
    weights = {name: torch.randn(layers, *shape, device=DEVICE, dtype=DTYPE) * 0.03 for name, shape in shapes.items()}
    norm, head_norm = torch.ones(hidden, device=DEVICE, dtype=DTYPE), torch.ones(dim, device=DEVICE, dtype=DTYPE)
    cos, sin = (torch.rand(4096, dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    rows: list[Row] = []
    for batch in (1, 16, 64, 128, 256):
        x, residual = (torch.randn(batch, hidden, device=DEVICE, dtype=DTYPE) for _ in range(2))
        positions = torch.arange(batch, device=DEVICE)
        caches = torch.zeros(2, -(-batch // block_size), block_size, kv_heads, dim, device=DEVICE, dtype=DTYPE)
        state = [x, residual]

        def product(
            name: str, x: torch.Tensor, layer: int, ours: bool, gated: bool = False, partial: bool = False
        ) -> torch.Tensor:
            weight = weights[name][layer]
            tiles = skinny_linear.choose_tiles(x, weight, gated=gated, partial=partial) if ours else None
            if tiles is not None:
                return skinny_linear.skinny_linear(x, weight, tiles, gated=gated)
            y = F.linear(x, weight)
            return activation.silu_and_mul(y) if gated else y

        def run(layer: int, ours: bool) -> None:
            hidden, state[1] = layernorm.add_rms_norm(state[0], state[1], norm, 1e-6)
            q = qk_norm_rope.qk_norm_rope_store(
                product("qkv", hidden, layer, ours), positions, cos, sin, head_norm, head_norm, 1e-6, *caches, positions
            )
            out = product("o", q.flatten(1), layer, ours, partial=True)
            hidden, state[1] = layernorm.add_rms_norm(out, state[1], norm, 1e-6)
            state[0] = product("down", product("gate_up", hidden, layer, ours, gated=True), layer, ours, partial=True)

        row: Row = {"layer": "without attention", "batch": batch}
        ends = []
        for name, ours in (("cublas_us", False), ("us", True)):
            state[:] = x, residual
            row[name] = round(layer_us([partial(run, layer, ours) for layer in range(layers)]), 2)
            state[:] = x, residual
            for layer in range(layers):
                run(layer, ours)
            ends.append(state[1])
        rows.append(row | {"difference": difference(ends[1], ends[0])})
        print(rows[-1], flush=True)
    return rows


# [N, K] of an 8B model's four products: Llama 3.1's.
LINEAR_SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
SCALED_TILES = [
    scaled_linear.ScaledTiles(*tiles)
    for tiles in (
        (64, 32, 1, 5, 4), (64, 32, 4, 5, 4), (64, 64, 1, 5, 4), (64, 64, 2, 5, 4), (64, 128, 1, 4, 4), (64, 128, 4, 4, 4),
        (128, 64, 1, 4, 4), (128, 64, 2, 4, 4), (128, 128, 1, 4, 8), (128, 128, 1, 3, 4), (128, 128, 1, 3, 8), (128, 64, 1, 4, 8), (128, 256, 1, 3, 8), (256, 128, 1, 3, 8),
    )
]  # fmt: skip


# As `PackedTiles`, for as many rows as there are.
PACKED_TILES = [
    packed_linear.PackedTiles(0, *tiles)
    for tiles in (
        (64, 64, 1, 4, 4), (64, 128, 1, 4, 4), (64, 32, 1, 6, 4), (128, 64, 1, 4, 4), (128, 64, 1, 4, 8), (128, 128, 1, 3, 8), (64, 64, 1, 3, 4),
        (64, 64, 2, 4, 4), (64, 64, 4, 4, 4), (64, 128, 4, 3, 4), (128, 64, 2, 4, 8), (128, 64, 4, 4, 8), (128, 64, 4, 3, 4),
    )
]  # fmt: skip


def linear_section(block_size: int) -> list[Row]:
    """Products with plain and quantised weights, as they follow one another in a graph, each on a weight of its own.

    Of a row, `share` is what was reached of the limit: the bytes at the memory's pace, or the arithmetic where that takes longer.
    `quantize` is what making the activations 8 bits takes before.
    """
    rows: list[Row] = []
    for name, (n, k) in LINEAR_SHAPES.items():
        layers = 8
        plain = [torch.randn(n, k, device=DEVICE, dtype=DTYPE) * 0.03 for _ in range(layers)]
        rounded = {
            (kind, group): [quantize.quantize_rows(weight, dtype, group) for weight in plain]
            for kind, dtype, group in (
                ("fp8", torch.float8_e4m3fn, 0),
                ("fp8", torch.float8_e4m3fn, scaled_linear.GROUP),
                ("int8", torch.int8, 0),
            )
        }
        packed = [
            (packed_linear.pack_columns(torch.randint(0, 16, (n, k), device=DEVICE)), torch.rand(k // 128, n, device=DEVICE))
            for _ in range(layers)
        ]  # fmt: skip
        for m in (1, 16, 64, 256, 1024, 4096, 16384):
            x = torch.randn(m, k, device=DEVICE, dtype=DTYPE)

            def report(
                form: str,
                calls: Sequence[Callable[[], torch.Tensor]],
                weight_bytes: float,
                peak: float,
                check: bool = True,
            ) -> float:
                us = layer_us(calls)
                limit = max((n * k * weight_bytes + m * n * 2 + m * k * 2) / H200.bandwidth, 2 * m * n * k / peak) * 1e6
                row: Row = {"linear": name, "m": m, "form": form, "us": round(us, 2), "share": round(limit / us, 3)}
                row |= {"tflops": round(2 * m * n * k / us / 1e6), "gb_per_s": round(n * k * weight_bytes / us / 1e3)}
                if check:
                    y = calls[0]()
                    row["difference"] = difference(y.sum(0) if y.dim() == 3 else y, F.linear(x, plain[0]))
                rows.append(row)
                print(row, flush=True)
                return us

            report("bf16", [partial(F.linear, x, weight) for weight in plain], 2, H200.flops)
            for (kind, group), weights in rounded.items():
                x8, x_scale = quantize.quantize_rows(x, weights[0][0].dtype, group)
                make = partial(quantize.quantize_rows, x, weights[0][0].dtype, group)
                rows.append(
                    {"linear": name, "m": m, "form": f"quantize {kind} {group}", "us": round(layer_us([make] * 8), 2)}
                )
                print(rows[-1], flush=True)
                if (kind, group) == ("fp8", 0):
                    theirs = [
                        partial(scaled_linear._cublas, x8, x_scale, weight, scale, None, None)
                        for weight, scale in weights
                    ]
                    report("fp8 _scaled_mm", theirs, 1, H200.flops_8bit)
                best: tuple[float, scaled_linear.ScaledTiles] | None = None
                chosen = scaled_linear.scaled_tiles(m, n, k, 132, grouped=group > 0, partial=name in ("o", "down"))
                for tiles in dict.fromkeys([chosen, *SCALED_TILES]):
                    small = tiles.block_m == 64
                    if (
                        (small and m > 256)
                        or (not small and m <= 64)
                        or (tiles.splits > 1 and (m > 256 or name not in ("o", "down")))
                    ):
                        continue
                    calls = [
                        partial(scaled_linear.triton_scaled_linear, x8, x_scale, weight, scale, DTYPE, tiles)
                        for weight, scale in weights
                    ]  # fmt: skip
                    try:
                        us = layer_us(calls)
                    except triton.runtime.errors.OutOfResources as error:
                        print(tiles, error, flush=True)
                        continue
                    best = min(best or (us, tiles), (us, tiles))
                    if tiles == chosen:
                        report(f"{kind} {group} chosen {tuple(tiles)}", calls, 1, H200.flops_8bit)
                assert best is not None
                calls = [
                    partial(scaled_linear.triton_scaled_linear, x8, x_scale, weight, scale, DTYPE, best[1])
                    for weight, scale in weights
                ]
                report(f"{kind} {group} best {tuple(best[1])}", calls, 1, H200.flops_8bit)
            wide = [partial(packed_linear.packed_linear, x, numbers, scale, None) for numbers, scale in packed]
            report("int4 128", wide, 0.5, H200.flops, check=False)
            if m <= packed_linear.MAX_ROWS:
                found = []
                for cut in PACKED_TILES:
                    cut = cut._replace(block_m=packed_linear.packed_tiles(m, n, k, 128, 132).block_m)
                    calls = [
                        partial(packed_linear.triton_packed_linear, x, numbers, scale, None, cut)
                        for numbers, scale in packed
                    ]
                    if cut.splits == 1 or name in ("o", "down"):
                        with contextlib.suppress(triton.runtime.errors.OutOfResources):
                            found.append((layer_us(calls), cut, calls))
                _, cut, calls = min(found, key=lambda one: one[0])
                report(f"int4 128 best {tuple(cut)}", calls, 0.5, H200.flops, check=False)
            if m <= 256:
                fp8 = [
                    partial(packed_linear.packed_linear, x, numbers, scale, None)
                    for numbers, scale in rounded["fp8", 0]
                ]
                report("fp8 widened", fp8, 1, H200.flops)
    return rows


def gpu_result(sections: list[str] | None, block_size: int) -> dict[str, Any]:
    """All `sections` (None: every one) as rows."""
    torch.manual_seed(0)
    wanted = sections or ["decode", "fp8", "contexts", "prefill", "small", "layer", "fp8_linear"]
    result: dict[str, Any] = {"block_size": block_size}
    if "decode" in wanted:
        result["decode"] = decode_section(block_size)
    if "fp8" in wanted:
        result["fp8"] = fp8_section(block_size)
    if "contexts" in wanted:
        result["contexts"] = contexts_section(block_size)
    if "prefill" in wanted:
        result["prefill"] = prefill_section(block_size)
    if "small" in wanted:
        result["small"] = small_section(block_size)
    if "layer" in wanted:
        result["layer"] = layer_section(block_size)
    if "fp8_linear" in wanted:
        result["fp8_linear"] = linear_section(block_size)
    return result
