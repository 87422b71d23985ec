"""The engine beside `transformers` `generate` on the same machine, model and sequences, in one run.

transformers gets padded batches and its best batch size; each batch runs to its longest output. Each engine is a process of
its own, so that its peak memory is its own; the two take turns. `python bench/compare_hf.py --save compare_hf`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SHAPES, Workload, make_workload, save, write_shape


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-42m")
    parser.add_argument("--num-seqs", type=int, default=64)
    parser.add_argument("--input-len", type=int, nargs=2, default=(16, 256), metavar=("MIN", "MAX"))
    parser.add_argument("--output-len", type=int, nargs=2, default=(16, 256), metavar=("MIN", "MAX"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="tried for transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads of either engine (default: torch's)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    parser.add_argument("--child", choices=["nanovllm", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def workload(args: argparse.Namespace) -> Workload:
    return make_workload(args.num_seqs, tuple(args.input_len), tuple(args.output_len), SHAPES[args.shape]["vocab_size"])


def write_model(shape: str, directory: Path) -> None:
    """Random weights of the shape, saved as a checkpoint both engines load."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_shape(shape, directory))).save_pretrained(
        directory
    )


def run_nanovllm(model: Path, work: Workload) -> dict[str, Any]:
    from nanovllm import LLM, SamplingParams

    llm = LLM(str(model), dtype="float32", device="cpu")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in work.max_tokens]
    llm.generate([[1, 2, 3]] * 4, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(work.prompts, params, use_tqdm=False)
    return {"seconds": time.perf_counter() - start, "token_ids": [output["token_ids"] for output in outputs]}


def run_transformers(model: Path, work: Workload, batch_size: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None
    hf.generate(torch.tensor([[1, 2, 3]] * 4), max_new_tokens=4, do_sample=False, pad_token_id=0)
    token_ids: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(work.prompts), batch_size):
        prompts = work.prompts[first : first + batch_size]
        wanted = work.max_tokens[first : first + batch_size]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = hf.generate(ids, attention_mask=mask, max_new_tokens=max(wanted), do_sample=False, pad_token_id=0)
        token_ids += [row[width : width + n].tolist() for row, n in zip(out, wanted, strict=True)]
    return {"seconds": time.perf_counter() - start, "token_ids": token_ids}


def child(args: argparse.Namespace) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    work = workload(args)
    if args.child == "nanovllm":
        result = run_nanovllm(args.model_dir, work)
    else:
        result = run_transformers(args.model_dir, work, args.batch_sizes[0])
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


def measure(args: argparse.Namespace, engine: str, batch_size: int, model: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", engine, "--model-dir", str(model), "--shape", args.shape]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--num-seqs", str(args.num_seqs), "--batch-sizes", str(batch_size)]
    command += ["--input-len", *map(str, args.input_len), "--output-len", *map(str, args.output_len)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(runs: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    median = statistics.median(run["seconds"] for run in runs)
    return {
        "seconds": [round(run["seconds"], 2) for run in runs],
        "output_tokens_per_s": round(tokens / median, 1),
        "peak_rss_mib": max(run["peak_rss_mib"] for run in runs),
    }


def main() -> None:
    args = parse_args()
    if args.child:
        child(args)
        return
    tokens = sum(workload(args).max_tokens)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        write_model(args.shape, model)
        tried = {size: measure(args, "transformers", size, model) for size in args.batch_sizes}
        for size, run in tried.items():
            print(f"transformers, batches of {size}: {tokens / run['seconds']:.1f} output tok/s", flush=True)
        best = min(tried, key=lambda size: tried[size]["seconds"])
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for _ in range(args.rounds):
            ours.append(measure(args, "nanovllm", 0, model))
            theirs.append(measure(args, "transformers", best, model))
    ratios = [their["seconds"] / our["seconds"] for our, their in zip(ours, theirs, strict=True)]
    pairs = list(zip(ours[0]["token_ids"], theirs[0]["token_ids"], strict=True))
    result = {
        "benchmark": "compare_hf",
        "shape": args.shape,
        "num_seqs": args.num_seqs,
        "threads": args.threads,
        "output_tokens": tokens,
        "nanovllm": summary(ours, tokens),
        "transformers": summary(theirs, tokens)
        | {"batch_size": best, "tried": {size: round(tokens / run["seconds"], 1) for size, run in tried.items()}},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "sequences_with_equal_tokens": sum(our == their for our, their in pairs),
    }
    print(json.dumps(result, indent=1))
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
