"""Many sequences of random lengths through one engine with a tight KV pool: memory must neither grow nor run out.

`python bench/soak.py --save soak_gpu`: 10,000 sequences on the 0.6B shape. `--num-seqs 300 --shape qwen3-42m` fits a CPU.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, model_dir, save

from nanovllm import LLM, SamplingParams


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--num-seqs", type=int, default=10_000)
    parser.add_argument(
        "--rounds", type=int, default=10, help="batches the sequences come in; memory is read after each"
    )
    parser.add_argument("--num-kvcache-blocks", type=int, default=600)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def heavy_tailed(rng: random.Random, low: int, high: int) -> int:
    """Mostly short, now and then `high`."""
    return min(high, int(low * rng.paretovariate(1.1)))


def used_mib() -> dict[str, int]:
    """Memory of the process, and on a GPU of its allocator and of the whole device."""
    used = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used |= {"reserved_mib": torch.cuda.memory_reserved() >> 20, "device_mib": (total - free) >> 20}
    return used


def main() -> None:
    args = parse_args()
    llm = LLM(
        str(Path(model_dir(args.shape))),
        load_format="dummy",
        num_kvcache_blocks=args.num_kvcache_blocks,
        max_num_seqs=512,
    )
    rng = random.Random(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for _ in range(args.rounds):
        count = args.num_seqs // args.rounds
        prompts = [[rng.randrange(vocab_size) for _ in range(heavy_tailed(rng, 20, 3000))] for _ in range(count)]
        params = [
            SamplingParams(temperature=0.8, max_tokens=heavy_tailed(rng, 10, 900), ignore_eos=True)
            for _ in range(count)
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        wrong = sum(len(o["token_ids"]) != p.max_tokens for o, p in zip(outputs, params, strict=True))
        if wrong or any(output["error"] for output in outputs):
            raise SystemExit(
                f"{wrong} outputs have the wrong length; {[o['error'] for o in outputs if o['error']][:1]}"
            )
        stats = llm.stats()
        rows.append({"generated": stats.generated_tokens, "preemptions": stats.preemptions, **used_mib()})
        print(rows[-1], flush=True)
        if llm.has_work or stats.kv_usage > 0:
            raise SystemExit(f"left behind after a batch: {stats}")
    result = {"benchmark": "soak", "model": args.shape, "num_seqs": args.num_seqs, "rounds": rows}
    result["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{args.num_seqs} sequences in {result['seconds']} s")
    llm.exit()
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
