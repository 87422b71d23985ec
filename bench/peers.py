"""Our engine beside another on the same machine, in one run, on the same tokens: `vllm`, or any module with nano-vllm's
`LLM` and `SamplingParams`. Each engine is a process of its own, so its memory is too; the two take turns.

`python bench/peers.py --peer vllm --peer-path SITE --env VLLM_USE_V2_MODEL_RUNNER=1 --save peers_vllm_seed`;
`python bench/peers.py --peer nanovllm_style --module nanovllm --peer-path OTHER_CHECKOUT --model DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    SHAPES,
    TIMED_OUT,
    WorkloadSpec,
    add_workload_arguments,
    end_on_sigterm,
    model_dir,
    name_value,
    run_process,
    save,
    workload_spec,
)
from roofline import add_ceiling_arguments, engine_roofline, load_config

MAX_MODEL_LEN = 4096
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add_ceiling_arguments(parser)
    parser.add_argument("--peer", choices=["vllm", "nanovllm_style"], default="vllm")
    parser.add_argument("--module", help="the peer's module (default: vllm; nanovllm)")
    parser.add_argument("--peer-path", type=Path, metavar="DIR", help="first on the peer's PYTHONPATH, and on no other")
    parser.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="environment of the peer's process; repeatable"
    )
    for engine, whose in (("option", "our engine"), ("peer-option", "the peer")):
        parser.add_argument(
            f"--{engine}", type=name_value, action="append", default=[], metavar="NAME=VALUE", help=f"for {whose}"
        )
    parser.add_argument("--backend", default="FLASH_ATTN", help="vLLM's attention: FLASH_ATTN (default) or TRITON_ATTN")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of both engines")
    parser.add_argument("--tp", type=int, default=1, help="ranks of either engine")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine")
    parser.add_argument("--runs", type=int, default=3, help="of the workload in each turn, which counts by its median")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one turn")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    args = parser.parse_args()
    if wrong := [pair for pair in args.env if "=" not in pair]:
        parser.error(f"--env {wrong[0]} is not K=V")
    args.module = args.module or {"vllm": "vllm", "nanovllm_style": "nanovllm"}[args.peer]
    return args


def common_options(args: argparse.Namespace, spec: WorkloadSpec) -> dict[str, Any]:
    """What both engines are told."""
    options: dict[str, Any] = {"max_num_seqs": spec.max_num_seqs, "max_model_len": MAX_MODEL_LEN}
    options |= {"max_num_batched_tokens": 16384, "gpu_memory_utilization": 0.9, "tensor_parallel_size": args.tp}
    options |= {"load_format": "dummy"} if spec.model in SHAPES else {}
    options |= {"kv_cache_dtype": args.kv_cache_dtype} if args.kv_cache_dtype != "auto" else {}
    return options


def vllm_options(args: argparse.Namespace, spec: WorkloadSpec) -> dict[str, Any]:
    """What only vLLM is told: prefix caching costs it time, so it is on where there is a prefix."""
    return {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": spec.prefix_len > 0,
        "attention_config": {"backend": args.backend},
    }


def peer_environment(args: argparse.Namespace) -> dict[str, str]:
    environment = {**QUIET, **os.environ, **dict(pair.split("=", 1) for pair in args.env)}
    first = str(args.peer_path.resolve()) if args.peer_path else None
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [first, environment.get("PYTHONPATH"), str(ROOT)]))
    return environment


def turn(who: str, job: dict[str, Any], environment: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """One engine's turn: start, run the workload some times, end."""
    print(f"{who}: {job['module']}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        job_file, result_file = Path(directory) / "job.json", Path(directory) / "result.json"
        job_file.write_text(json.dumps(job))
        engines = Path(__file__).with_name("engines.py")
        status = run_process([sys.executable, str(engines), str(job_file), str(result_file)], timeout, environment)
        if not result_file.is_file():
            reason = f"took more than {timeout:g} s" if status == TIMED_OUT else f"ended with status {status}"
            raise SystemExit(f"{who} ({job['module']}) {reason}; see its output above")
        result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def check_peer(args: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Leave with status 2 where the peer cannot be imported, before anything is measured."""
    command = [sys.executable, "-c", f"import {args.module}"]
    # In another folder, so that `import` finds nothing of the current one.
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            command, env=environment, cwd=elsewhere, capture_output=True, text=True, check=False, timeout=args.timeout
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"the peer {args.module} cannot be imported ({reason}); give --peer-path DIR", file=sys.stderr)
        raise SystemExit(2)


def summary(turns: list[dict[str, Any]], tokens: int, rows: int, options: dict[str, Any]) -> dict[str, Any]:
    median = statistics.median(statistics.median(turn["seconds"]) for turn in turns)
    memory = {name: max(turn[name] for turn in turns) for name in turns[0] if name.endswith("_mib")}
    return {
        "version": turns[0]["version"],
        "options": options,
        "load_s": [turn["load_s"] for turn in turns],
        "seconds": [[round(s, 3) for s in turn["seconds"]] for turn in turns],
        "median_s": round(median, 3),
        "output_tokens_per_s": round(tokens / median, 1),
        "rows_per_s": round(rows / median, 2),
        **memory,
    }


def main() -> None:
    args = parse_args()
    end_on_sigterm()
    spec = workload_spec(args)
    environment = peer_environment(args)
    check_peer(args, environment)
    model = load_config(spec.model)
    work = spec.make(model.vocab_size)
    shared = common_options(args, spec)
    options = {
        "ours": shared | dict(args.option),
        "peer": shared | (vllm_options(args, spec) if args.peer == "vllm" else {}) | dict(args.peer_option),
    }
    job = {
        "model": model_dir(spec.model),
        "workload": spec._asdict(),
        "vocab_size": model.vocab_size,
        "runs": args.runs,
        "temperature": args.temperature,
    }
    ours = {**job, "engine": "nanovllm_style", "module": "nanovllm", "path": str(ROOT), "options": options["ours"]}
    path = str(args.peer_path.resolve()) if args.peer_path else None
    peer = {**job, "engine": args.peer, "module": args.module, "path": path, "options": options["peer"]}
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    ratios = []
    for _ in range(args.rounds):
        turns["ours"].append(turn("ours", ours, os.environ, args.timeout))
        turns["peer"].append(turn("peer", peer, environment, args.timeout))
        our_s, peer_s = (statistics.median(turns[who][-1]["seconds"]) for who in ("ours", "peer"))
        ratios.append(peer_s / our_s)
        print(f"round {len(ratios)}: ours {our_s:.3f} s, peer {peer_s:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
    digests = {result["digest"] for results in turns.values() for result in results}
    if digests != {work.digest()}:
        raise SystemExit(f"the engines were given different tokens: {digests}")
    tokens = sum(work.max_tokens)
    sides = {who: summary(results, tokens, spec.num_seqs, options[who]) for who, results in turns.items()}
    if "gpu_used_mib" in sides["ours"]:
        for side in sides.values():
            side |= engine_roofline(model, work, side["options"], args).as_dict(side["median_s"])
    result = {
        "benchmark": "peers",
        "workload": args.workload,
        "model": spec.model,
        "peer_name": args.module,
        "peer_environment": dict(pair.split("=", 1) for pair in args.env),
        "num_seqs": spec.num_seqs,
        "prefix_len": spec.prefix_len,
        "temperature": args.temperature,
        "digest": work.digest(),
        "input_tokens": sum(map(len, work.prompts)),
        "output_tokens": tokens,
        **sides,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }
    print(
        f"median ratio {result['ratio']}: ours {sides['ours']['output_tokens_per_s']} output tok/s, "
        f"{args.module} {sides['peer']['output_tokens_per_s']}"
    )
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
