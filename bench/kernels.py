"""Time of one layer's decode attention, backend by backend and variant by variant, beside the bytes of keys and values it reads.

`python bench/kernels.py --threads 1` compares group sizes of the torch backend on a CPU.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from common import save

from nanovllm.layers.attention import AttentionBatch, TorchBackend


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, nargs=2, default=(32, 400), metavar=("MIN", "MAX"))
    parser.add_argument("--heads", type=int, nargs=3, default=(8, 4, 64), metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def decode_batch(args: argparse.Namespace) -> AttentionBatch:
    """Random contexts, longest first, in blocks scattered over the pool."""
    rng = random.Random(0)
    lens = sorted((rng.randint(*args.context) for _ in range(args.batch)), reverse=True)
    width = -(-lens[0] // args.block_size)
    generator = torch.Generator().manual_seed(0)
    tables = torch.randperm(args.batch * width, generator=generator).view(args.batch, width)
    return AttentionBatch(args.batch, [1] * args.batch, lens, tables, args.block_size)


def best_ms(backend: TorchBackend, batch: AttentionBatch, repeats: int = 15) -> float:
    """Least milliseconds of `attend` over some repeats, one untimed call first."""
    blocks = batch.block_tables.numel()
    shape = (blocks, batch.block_size, backend.num_kv_heads, backend.head_dim)
    k_cache, v_cache = torch.randn(shape), torch.randn(shape)
    q = torch.randn(batch.num_decodes, backend.num_heads, backend.head_dim)
    plan = backend.plan(batch)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend.attend(q, k_cache, v_cache, plan)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * 1e3


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    batch = decode_batch(args)
    _, kv_heads, dim = args.heads
    kv_bytes = 2 * sum(batch.context_lens) * kv_heads * dim * 4
    rows = []
    for fill, elements in ((0.0, 1 << 40), (0.7, 1 << 40), (0.7, 1 << 20), (0.7, 1 << 19), (0.7, 1 << 18)):
        backend = TorchBackend(*args.heads)
        backend.min_fill, backend.max_group_elements = fill, elements
        ms = best_ms(backend, batch)
        rows.append(
            {
                "min_fill": fill,
                "max_group_elements": elements,
                "ms": round(ms, 2),
                "gb_per_s": round(kv_bytes / ms / 1e6, 2),
            }
        )
        print(rows[-1], flush=True)
    if args.save:
        print(
            save(
                args.save,
                {"benchmark": "kernels", "threads": args.threads, "kv_bytes": kv_bytes, "decode_attention": rows},
            )
        )


if __name__ == "__main__":
    main()
