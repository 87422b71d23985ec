"""Every benchmark that can run on this machine, and one table of all results: `python bench/run_all.py`.

Without a GPU everything runs on a small shape with a few sequences, to show that it runs; such results end in `_cpu`.
`--table-only` makes `bench/results/TABLE.md` anew from the JSON files beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, WORKLOADS, end_on_sigterm, run_process

BENCH = Path(__file__).resolve().parent
SMALL = ["--model", "qwen3-42m", "--runs", "2"]
SMALL_WORKLOADS = {
    "seed": ["--num-seqs", "8", "--input-len", "16", "64", "--output-len", "8", "32"],
    "8b": ["--num-seqs", "16", "--input-len", "16", "64", "--output-len", "8", "32"],
    "30b-a3b": ["--num-seqs", "16", "--input-len", "16", "64", "--output-len", "8", "32"],
    "llama-8b-1000": ["--num-seqs", "16", "--input-len", "40", "40", "--output-len", "40", "40"],
    "llama-8b-128": ["--num-seqs", "16", "--input-len", "16", "16", "--output-len", "64", "64"],
    "stream": ["--num-seqs", "16", "--input-len", "16", "64", "--output-len", "8", "32"],
    "labelling": ["--num-seqs", "32", "--prefix-len", "256", "--input-len", "8", "32", "--output-len", "1", "4"],
}
SMALL_COMPARISON = ["--num-seqs", "16", "--input-len", "16", "64", "--output-len", "16", "64", "--batch-sizes", "16"]
COLUMNS = (
    "result",
    "model",
    "workload",
    "output tok/s",
    "rows/s",
    "of roofline",
    "beside",
    "machine",
    "torch",
    "commit",
)


class Step(NamedTuple):
    """One benchmark: the result's name, the script and its arguments."""

    name: str
    script: str
    arguments: list[str]


def plan(gpu: bool, peer_arguments: list[str]) -> list[Step]:
    """All steps of a machine with or without a GPU."""
    where = "gpu" if gpu else "cpu"
    steps = [Step(f"roofline_{name}", "roofline.py", ["--workload", name]) for name in WORKLOADS]
    sizes = {name: [] if gpu else SMALL + SMALL_WORKLOADS[name] for name in WORKLOADS}
    for name, size in sizes.items():
        steps.append(Step(f"throughput_{name}_{where}", "throughput.py", ["--workload", name, *size]))
    for name in ("seed", "8b"):
        steps.append(Step(f"lora_{name}_{where}", "lora.py", ["--workload", name, "--rank", "16", "32", *sizes[name]]))
    steps.append(Step(f"kernels_{where}", "kernels.py", []))
    steps.append(Step(f"plan_{where}", "plan.py", []))
    steps.append(Step("grammar_cpu", "grammar.py", []))
    steps.append(Step("tail_cpu", "tail.py", []))
    few = ["--num-seqs", "8", "--input-len", "8", "32", "--max-length", "20", "--max-tokens", "200", "--rounds", "1"]
    steps.append(
        Step(f"sampling_options_{where}", "sampling_options.py", [] if gpu else ["--shape", "qwen3-42m", *few])
    )
    steps.append(Step(f"prompts_{where}", "prompts.py", []))
    small = ["--shape", "qwen3-42m"]
    steps.append(Step(f"correctness_{where}", "correctness.py", [] if gpu else [*small, "--contexts", "40", "300"]))
    steps.append(Step(f"startup_{where}", "startup.py", [] if gpu else small))
    steps.append(Step(f"soak_{where}", "soak.py", [] if gpu else [*small, "--num-seqs", "100", "--rounds", "2"]))
    if not gpu:
        steps.append(Step("compare_hf_cpu", "compare_hf.py", [*SMALL_COMPARISON, "--rounds", "2"]))
    for name, size in sizes.items():
        steps.append(Step(f"peers_vllm_{name}_{where}", "peers.py", ["--workload", name, *size, *peer_arguments]))
    return steps


def run(steps: list[Step], timeout: float) -> list[str]:
    """Run the steps one after the other; the names of those that failed."""
    failed = []
    no_peer = False
    for step in steps:
        if no_peer and step.script == "peers.py":
            continue
        print(f"== {step.name}", flush=True)
        start = time.perf_counter()
        status = run_process(
            [sys.executable, str(BENCH / step.script), *step.arguments, "--save", step.name], timeout, grace=30
        )
        no_peer = step.script == "peers.py" and status == 2
        if no_peer:
            print("== no peer here; comparisons skipped", flush=True)
        elif status:
            failed.append(step.name)
            print(f"== {step.name} failed with status {status}", flush=True)
        else:
            print(f"== {step.name} took {time.perf_counter() - start:.1f} s", flush=True)
    return failed


def table_row(name: str, result: dict[str, Any]) -> dict[str, str]:
    """A result file as one row of the table; what it does not hold stays empty."""
    kind = result.get("benchmark", "")
    ours = result.get("ours") or result.get("nanovllm") or result
    beside, version = "", result.get("versions", {})
    if kind == "peers":
        peer = result["peer"]
        beside = f"{result['ratio']}x {result['peer_name']} {peer['version'] or ''} ({peer['output_tokens_per_s']})"
    elif kind == "compare_hf":
        beside = f"{result['ratio']}x transformers ({result['transformers']['output_tokens_per_s']})"
    fraction = "limit" if kind == "roofline" else _percent(ours.get("roofline_fraction"))
    machine = result.get("machine", {})
    values = (
        name,
        result.get("model", result.get("shape")),
        f"{result.get('workload', '')} {result.get('num_seqs', '')}".strip(),
        ours.get("output_tokens_per_s"),
        ours.get("rows_per_s"),
        fraction,
        beside.replace("  ", " "),
        machine.get("gpu") or f"{machine.get('cpus')} x {machine.get('processor')}",
        version.get("torch"),
        f"{result.get('commit', '')} {result.get('date', '')}".strip(),
    )
    if kind == "roofline":  # an H200's ceilings, whatever machine did the sum
        values = (*values[:7], f"{result['bandwidth_tb_s']} TB/s, {result['tflops']} TFLOP/s", "", values[9])
    return {column: "" if value is None else str(value) for column, value in zip(COLUMNS, values, strict=True)}


def make_table(directory: Path) -> str:
    """Markdown of all result files of a directory: one table, then one for each list of measurements inside a result."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    main_table, details = [], []
    for name, result in results.items():
        lists = {key: rows for key, rows in result.items() if _is_table(rows)}
        if not lists:
            main_table.append(table_row(name, result))
        for key, rows in lists.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            machine = result.get("machine", {})
            where = machine.get("gpu") or machine.get("processor")
            details.append(f"## {name}: {key} ({where}, {result.get('commit')})\n\n{markdown(columns, rows)}")
    head = "# Results\n\nMade from the JSON files beside it: `python bench/run_all.py --table-only`.\n"
    return "\n".join([head, markdown(list(COLUMNS), main_table), *details])


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def markdown(columns: list[str], rows: list[dict[str, Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="steps whose name holds one of these")
    parser.add_argument("--peer-path", metavar="DIR", help="where vLLM is, if not installed")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="environment of the peer; repeatable")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one step")
    args = parser.parse_args()
    end_on_sigterm()
    failed: list[str] = []
    if not args.table_only:
        import torch

        peer_arguments = ["--peer-path", args.peer_path] if args.peer_path else []
        peer_arguments += [argument for pair in args.env for argument in ("--env", pair)]
        steps = plan(torch.cuda.is_available(), peer_arguments)
        wanted = args.only or [""]
        failed = run([step for step in steps if any(text in step.name for text in wanted)], args.timeout)
    RESULTS.mkdir(exist_ok=True)
    table = make_table(RESULTS)
    (RESULTS / "TABLE.md").write_text(table)
    print(table)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
