"""Output tokens a second of the bare engine on a random workload; the defaults are the seed's job (256 sequences, 100 to 1024
tokens in and out, temperature 0.6). `python bench/throughput.py --model qwen3-0.6b --load-format dummy`."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

from common import SHAPES, make_workload, model_dir, save


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="qwen3-0.6b", help=f"directory, hub id or built-in shape: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--load-format", choices=["auto", "dummy"], help="dummy: random weights (default for built-in shapes)"
    )
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--input-len", type=int, nargs=2, default=(100, 1024), metavar=("MIN", "MAX"))
    parser.add_argument("--output-len", type=int, nargs=2, default=(100, 1024), metavar=("MIN", "MAX"))
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an engine option; repeatable"
    )
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = dict(option.split("=", 1) for option in args.option)
    options["load_format"] = args.load_format or ("dummy" if args.model in SHAPES else "auto")
    return options


def main() -> None:
    args = parse_args()
    from nanovllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(model_dir(args.model), **engine_options(args))
    load_s = time.perf_counter() - start
    work = make_workload(
        args.num_seqs, tuple(args.input_len), tuple(args.output_len), llm.model_config.vocab_size, args.seed
    )
    params = [SamplingParams(temperature=args.temperature, max_tokens=n, ignore_eos=True) for n in work.max_tokens]
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
    seconds = []
    for run in range(args.runs):
        # Another first token a run, so that no run finds the prompts of the one before in the prefix cache.
        prompts = [[run + 1, *prompt[1:]] for prompt in work.prompts]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        failed = [output["error"] for output in outputs if output["error"]]
        if failed:
            raise SystemExit(f"{len(failed)} prompts failed, the first with: {failed[0]}")
        print(f"run {run}: {sum(work.max_tokens) / seconds[-1]:.1f} output tok/s in {seconds[-1]:.2f} s", flush=True)
    median = statistics.median(seconds)
    result = {
        "benchmark": "throughput",
        "model": args.model,
        "engine_options": llm.config.model_dump(exclude={"model"}),
        "num_seqs": args.num_seqs,
        "input_tokens": sum(map(len, work.prompts)),
        "output_tokens": sum(work.max_tokens),
        "load_s": round(load_s, 2),
        "seconds": [round(s, 3) for s in seconds],
        "output_tokens_per_s": round(sum(work.max_tokens) / median, 1),
        "total_tokens_per_s": round((sum(work.max_tokens) + sum(map(len, work.prompts))) / median, 1),
        "preemptions": llm.stats().preemptions,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(
        f"median: {result['output_tokens_per_s']} output tok/s, loaded in {load_s:.1f} s, peak RSS {result['peak_rss_mib']} MiB"
    )
    if args.save:
        print(save(args.save, result))
    llm.exit()


if __name__ == "__main__":
    main()
