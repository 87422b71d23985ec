"""Times of the engine's kernels, variant by variant, beside the bytes they move and the peer's kernels where one is there.

On a GPU: decode and prefill attention and the small kernels (`bench/kernels_gpu.py`), mixtures of experts, adapters and shared
prefixes (`bench/kernels_grouped_gpu.py`). On a CPU: group sizes of the torch
backend's decode attention; `python bench/kernels.py --threads 1`.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from common import save

from nanovllm.layers.attention import AttentionBatch, AttentionSpec
from nanovllm.layers.backends.torch_backend import TorchBackend


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sections",
        nargs="+",
        help="GPU: which of decode, fp8, contexts, prefill, small, layer, fp8_linear, moe, lora, shared to run (default: all)",
    )
    parser.add_argument("--batch", type=int, default=64, help="CPU: sequences")
    parser.add_argument(
        "--context", type=int, nargs=2, default=(32, 400), metavar=("MIN", "MAX"), help="CPU: tokens each"
    )
    parser.add_argument("--heads", type=int, nargs=3, default=(8, 4, 64), metavar=("QUERY", "KV", "DIM"), help="CPU")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def decode_batch(args: argparse.Namespace) -> AttentionBatch:
    """Random contexts, longest first, in blocks scattered over the pool."""
    rng = random.Random(0)
    lens = sorted((rng.randint(*args.context) for _ in range(args.batch)), reverse=True)
    width = -(-lens[0] // args.block_size)
    generator = torch.Generator().manual_seed(0)
    tables = torch.randperm(args.batch * width, generator=generator).view(args.batch, width)
    return AttentionBatch(tables, args.block_size, torch.arange(args.batch), torch.tensor(lens), lens)


def best_ms(backend: TorchBackend, batch: AttentionBatch, repeats: int = 15) -> float:
    """Least milliseconds of `attend` over some repeats, one untimed call first."""
    blocks = batch.block_tables.numel()
    shape = (blocks, batch.block_size, backend.num_kv_heads, backend.head_dim)
    k_cache, v_cache = torch.randn(shape), torch.randn(shape)
    q = torch.randn(len(batch.decode_slots), backend.num_heads, backend.head_dim)
    spec = AttentionSpec(backend.head_dim**-0.5)
    backend.add_window(spec.window)
    plan = backend.plan(batch)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend.attend(q, k_cache, v_cache, plan, spec)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * 1e3


def cpu_result(args: argparse.Namespace) -> dict[str, object]:
    """Decode attention of the torch backend, by the size of its groups."""
    torch.set_num_threads(args.threads)
    batch = decode_batch(args)
    _, kv_heads, dim = args.heads
    kv_bytes = 2 * int(batch.decode_lens.sum()) * kv_heads * dim * 4
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
    return {"threads": args.threads, "kv_bytes": kv_bytes, "decode_attention": rows}


def main() -> None:
    args = parse_args()
    if torch.cuda.is_available():
        from kernels_gpu import gpu_result
        from kernels_grouped_gpu import grouped_sections

        result = gpu_result(args.sections, args.block_size)
        for name, rows in grouped_sections(args.sections, args.block_size):
            result[name] = rows
            if args.save:  # what is measured stays where a run is cut off
                save(args.save, {"benchmark": "kernels", **result})
    else:
        result = cpu_result(args)
    if args.save:
        print(save(args.save, {"benchmark": "kernels", **result}))


if __name__ == "__main__":
    main()
