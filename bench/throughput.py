"""Output tokens a second of the bare engine on a workload by name, beside the least time any engine needs.

`python bench/throughput.py` runs the seed's job (256 sequences, 100 to 1024 tokens in and out, temperature 0.6) on random
weights of Qwen3-0.6B's shape; `--workload labelling --save labelling` another one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from common import SHAPES, Workload, add_workload_arguments, model_dir, name_value, save, workload_spec
from engines import NanoVLLM, memory, timed_runs, warm_up
from roofline import add_ceiling_arguments, engine_roofline
from trace_summary import profile_steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add_ceiling_arguments(parser)
    parser.add_argument(
        "--load-format", choices=["auto", "dummy"], help="dummy: random weights (default for built-in shapes)"
    )
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--option",
        type=name_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option; repeatable",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profile one more run; write a summary as JSON")
    parser.add_argument("--profile-steps", type=int, default=50, help="steps of it, from the middle of the run")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    return args


def profile(engine: NanoVLLM, args: argparse.Namespace, work: Workload, steps: int) -> None:
    """One more run of the workload under the profiler."""
    prompts = work.for_run(args.runs)
    summary = profile_steps(
        engine.llm,
        lambda: engine.generate(prompts, work.max_tokens, args.temperature),
        steps,
        args.profile_steps,
    )
    args.profile.write_text(json.dumps(summary, indent=1) + "\n")
    busy, families = summary["gpu_busy_fraction"], summary["seconds_by_family"]
    print(f"profile of {summary['steps']} steps: GPU busy {busy:.1%}, seconds {families}; {args.profile}", flush=True)


def main() -> None:
    args = parse_args()
    spec = workload_spec(args)
    options = {"max_num_seqs": spec.max_num_seqs, "load_format": "dummy" if spec.model in SHAPES else "auto"}
    options |= dict(args.option)
    if args.load_format:
        options["load_format"] = args.load_format
    start = time.perf_counter()
    engine = NanoVLLM("nanovllm", model_dir(spec.model), options)
    load_s = time.perf_counter() - start
    llm = engine.llm
    work = spec.make(llm.model_config.vocab_size)
    warm_up(engine, args.temperature)
    steps = llm.stats().steps
    seconds = timed_runs(engine, work, args.runs, args.temperature)
    steps = (llm.stats().steps - steps) // args.runs
    median = statistics.median(seconds)
    input_tokens, output_tokens = sum(map(len, work.prompts)), sum(work.max_tokens)
    used = memory()
    engine_options = llm.config.model_dump(exclude={"model"})
    result = {
        "benchmark": "throughput",
        "workload": args.workload,
        "model": spec.model,
        "engine_options": engine_options,
        "num_seqs": spec.num_seqs,
        "prefix_len": spec.prefix_len,
        "temperature": args.temperature,
        "digest": work.digest(),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "load_s": round(load_s, 2),
        "seconds": [round(s, 3) for s in seconds],
        "median_s": round(median, 3),
        "output_tokens_per_s": round(output_tokens / median, 1),
        "total_tokens_per_s": round((output_tokens + input_tokens) / median, 1),
        "rows_per_s": round(spec.num_seqs / median, 2),
        "steps": steps,
        "preemptions": llm.stats().preemptions,
        "cached_tokens": llm.stats().cached_tokens // args.runs,
        **used,
    }
    print(
        f"median: {result['output_tokens_per_s']} output tok/s, {result['rows_per_s']} rows/s; loaded in {load_s:.1f} s, "
        f"{result['preemptions']} preemptions, MiB {used}"
    )
    # The ceilings are a GPU's; a CPU has none here.
    if "gpu_used_mib" in used and engine_options["device"] != "cpu":
        limit = engine_roofline(llm.model_config, work, engine_options, args).as_dict(median)
        result |= limit
        print(f"roofline: {limit}")
    if args.profile:
        profile(engine, args, work, steps)
    if args.save:
        print(save(args.save, result))
    engine.close()


if __name__ == "__main__":
    main()
