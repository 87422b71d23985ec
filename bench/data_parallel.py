"""Data parallel over the GPUs of one host: rows through `generate.py`, beside as many bare engines and beside one GPU.

`python bench/data_parallel.py --workload seed --gpus 1 2 --save data_parallel_seed_gpu` runs, for each number of GPUs, the whole
job (a local Ray, Parquet in, Parquet out, exactly once) and then bare engines in as many processes, each with its share of the
same rows. Weights are random; prompts are token ids. Targets: two GPUs 1.95 times one, and 95 % of bare engines.

    whole    from the start of the process to its end
    steady   from the first engine that is ready to the last file committed (`committed_s`: to each), without Ray's start and the loading of
             engines

`--tensor-parallel T` gives each engine T of the GPUs, `--rows-per-gpu` grows the job with the GPUs, `--no-bare` runs the job alone.

On CPUs: `--device cpu --model qwen3-42m --num-seqs 32 --input-len 8 32 --output-len 8 16 --gpus 1 2`; each engine then has its share
of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    SHAPES,
    TIMED_OUT,
    Workload,
    WorkloadSpec,
    add_workload_arguments,
    end_on_sigterm,
    run_process,
    save,
    workload_spec,
)
from sampling_options import write_model

ROWS = {"seed": 6144, "8b": 2048, "stream": 6144, "labelling": 65536}  # so many that two GPUs take a minute or so
SCALING, OF_BARE = 1.95, 0.95  # targets
TEMPERATURE = 0.6


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line, or of `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs, or of ranks on CPUs")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="T", help="GPUs of an engine")
    parser.add_argument("--rows-per-gpu", type=int, metavar="N", help="in the place of --num-seqs: N times the GPUs")
    parser.add_argument("--no-bare", action="store_true", help="the job alone, without the bare engines beside it")
    parser.add_argument("--no-warm-up", action="store_true", help="this machine has compiled for the model before")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the job (engine.*: of both)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of each; the best counts")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of one run")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json, after each number of GPUs")
    parser.add_argument("--bare", nargs=2, type=Path, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_rows(work: Workload, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True)
    columns = {
        "prompt": pa.array(work.prompts, pa.list_(pa.int32())),
        "max_tokens": pa.array(work.max_tokens, pa.int32()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=512)


def engine_settings(spec: WorkloadSpec, args: argparse.Namespace) -> dict[str, Any]:
    """Options that the job's engines and the bare ones share."""
    import yaml

    given = (pair.partition("=") for pair in args.set if pair.startswith("engine."))
    settings = {
        "load_format": "dummy" if spec.model in SHAPES else "auto",
        "max_num_seqs": spec.max_num_seqs,
        "device": args.device,
        "tensor_parallel_size": args.tensor_parallel,
    }
    return settings | {name.removeprefix("engine."): yaml.safe_load(value) for name, _, value in given}


def visible(count: int, first: int = 0) -> dict[str, str]:
    """The environment of a process that sees some of the GPUs this one sees."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = mine.split(",") if mine else [str(number) for number in range(first + count)]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + count])}


def run_job(directory: Path, model: str, spec: WorkloadSpec, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """The job over `count` GPUs; its seconds by its own report."""
    engines = count // args.tensor_parallel
    output = directory / f"out-{count}-{time.monotonic_ns()}"
    command = [sys.executable, str(ROOT / "pipelines" / "generate.py")]
    command += ["--model", model, "--input", str(directory / f"in-{spec.num_seqs}"), "--output", str(output)]
    command += ["sampling.ignore_eos=true", f"sampling.temperature={TEMPERATURE}"]
    command += ["sampling_columns.max_tokens=max_tokens", f"run.replicas={engines}"]
    command += [f"engine.{name}={json.dumps(value)}" for name, value in engine_settings(spec, args).items()]
    command += [pair for pair in args.set if not pair.startswith("engine.")]
    offline = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    began = time.perf_counter()
    status = run_process(command, args.timeout, {**visible(count), **offline, **paths}, grace=30)
    whole = time.perf_counter() - began
    if status:
        raise SystemExit(
            f"the job over {count} ended with {'a time-out' if status == TIMED_OUT else f'status {status}'}"
        )
    report = json.loads((output / "_run" / "report.json").read_text())
    lives = [life for actor in report["this_start"]["actors"] for life in actor["lives"]]
    if report["error_rows"] or len(lives) != engines:
        raise SystemExit(f"{report['error_rows']} rows failed, and {len(lives)} engines ran in the place of {engines}")
    # Engines are heard of once a second, and for a while after their last row.
    ready = report["starts"][-1]["began"] + min(life["ready"] for life in lives)
    committed = sorted(part.stat().st_mtime - ready for part in output.glob("part-*.parquet"))
    steady = committed[-1]
    return {
        "whole_s": round(whole, 3),
        "steady_s": round(steady, 3),
        "committed_s": [round(seconds, 2) for seconds in committed],
        "load_s": [round(life["ready"] - life["began"], 2) for life in lives],
        "busy_s": [round(life["heard"] - life["ready"], 2) for life in lives],
        "rows": report["rows"],
        "output_tokens": report["generated_tokens"],
        "engine_tokens": [actor["generated_tokens"] for actor in report["this_start"]["actors"]],
    }


def run_bare(directory: Path, model: str, spec: WorkloadSpec, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """As many bare engines at once, each on its GPUs with every n-th row."""
    size = args.tensor_parallel
    engines = count // size
    runs = directory / f"bare-{count}-{time.monotonic_ns()}"
    runs.mkdir()
    processes = []
    began = time.perf_counter()
    try:
        for number in range(engines):
            job = runs / f"job-{number}.json"
            job.write_text(
                json.dumps(
                    {
                        "model": model,
                        "workload": spec._asdict(),
                        "vocab_size": vocab_size(model),
                        "options": engine_settings(spec, args),
                        "share": [number, engines],
                        "ready": str(runs),
                    }
                )
            )
            environment = visible(size, number * size)
            if args.device == "cpu":
                environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))  # each rank's
            command = [sys.executable, __file__, "--bare", str(job), str(runs / f"result-{number}.json")]
            processes.append(subprocess.Popen(command, env={**environment, "HF_HUB_OFFLINE": "1"}))
        for process in processes:
            if process.wait(args.timeout):
                raise SystemExit(f"a bare engine ended with status {process.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    whole = time.perf_counter() - began
    results = [json.loads(path.read_text()) for path in sorted(runs.glob("result-*.json"))]
    return {
        "whole_s": round(whole, 3),
        "steady_s": round(max(one["end"] for one in results) - min(one["start"] for one in results), 3),
        "load_s": [round(one["load_s"], 2) for one in results],
        "busy_s": [round(one["end"] - one["start"], 2) for one in results],
        "rows": sum(one["rows"] for one in results),
        "output_tokens": sum(one["output_tokens"] for one in results),
        "engine_tokens": [one["output_tokens"] for one in results],
    }


def bare(job_file: Path, result_file: Path) -> None:
    """One bare engine: it begins when all are ready."""
    from nanovllm import LLM, SamplingParams

    job = json.loads(job_file.read_text())
    number, count = job["share"]
    work = WorkloadSpec(**{**job["workload"], "input_range": tuple(job["workload"]["input_range"])}).make(
        job["vocab_size"]
    )
    prompts, lengths = work.prompts[number::count], work.max_tokens[number::count]
    began = time.perf_counter()
    llm = LLM(job["model"], **job["options"])
    load_s = time.perf_counter() - began
    ready = Path(job["ready"])
    (ready / f"ready-{number}").touch()
    while len(list(ready.glob("ready-*"))) < count:
        time.sleep(0.005)
    params = [SamplingParams(temperature=TEMPERATURE, max_tokens=length, ignore_eos=True) for length in lengths]
    start = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    end = time.monotonic()
    made = sum(output["num_generated_tokens"] for output in outputs)
    llm.exit()
    result = {"load_s": load_s, "start": start, "end": end, "rows": len(outputs), "output_tokens": made}
    result_file.write_text(json.dumps(result))


def vocab_size(model: str) -> int:
    size: int = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    return size


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of some runs, with its rates."""
    run = min(runs, key=lambda one: one["steady_s"])
    tokens = run["output_tokens"]
    return {
        **run,
        "output_tokens_per_s": round(tokens / run["steady_s"], 1),
        "whole_output_tokens_per_s": round(tokens / run["whole_s"], 1),
        "rows_per_s": round(run["rows"] / run["steady_s"], 2),
        "all_steady_s": [one["steady_s"] for one in runs],
    }


def main() -> None:
    args = parse_args()
    if args.bare:
        bare(*args.bare)
        return
    end_on_sigterm()
    for result in measure(args):
        print(line_of(result["runs"][-1]), flush=True)
        if args.save:
            print(save(args.save, result), flush=True)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result so far after each number of GPUs, the last of `runs` being its row. Raises SystemExit where one fails."""
    spec = workload_spec(args)
    if args.num_seqs is None:
        spec = spec._replace(num_seqs=ROWS.get(args.workload, spec.num_seqs))
    if spec.model not in SHAPES:
        raise SystemExit(f"--model {spec.model!r} is no built-in shape; give one of {', '.join(SHAPES)}")
    if odd := [count for count in args.gpus if count % args.tensor_parallel]:
        raise SystemExit(f"--gpus {odd[0]} cannot be shared out to engines of --tensor-parallel {args.tensor_parallel}")
    result: dict[str, Any] = {
        "benchmark": "data_parallel",
        "workload": args.workload,
        "model": spec.model,
        "device": args.device,
        "num_seqs": spec.num_seqs,
        "engine_options": engine_settings(spec, args),
        "settings": args.set,
        "targets": {"scaling": SCALING, "of_bare": OF_BARE},
    }
    if args.rows_per_gpu:
        result["rows_per_gpu"] = args.rows_per_gpu
        del result["num_seqs"]
    with tempfile.TemporaryDirectory(prefix="data-parallel-") as name:
        directory = Path(name)
        model = str(directory / "model")
        write_model(spec.model, Path(model))
        if (
            args.device == "cuda" and not args.no_warm_up
        ):  # what is compiled once a machine is compiled before anything is timed
            run_bare(directory, model, spec._replace(num_seqs=16), args.tensor_parallel, args)
        rows: list[dict[str, Any]] = []
        for count in args.gpus:
            if args.rows_per_gpu:
                spec = spec._replace(num_seqs=args.rows_per_gpu * count)
            work = spec.make(vocab_size(model))
            source = directory / f"in-{spec.num_seqs}" / "rows.parquet"
            if not source.exists():
                write_rows(work, source)
            sizes = {"input_tokens": sum(map(len, work.prompts)), "output_tokens": sum(work.max_tokens)}
            if not args.rows_per_gpu:
                result |= sizes
            ways = {"job": run_job} if args.no_bare else {"job": run_job, "bare": run_bare}
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, run_once in ways.items():
                    run = run_once(directory, model, spec, count, args)
                    if (run["rows"], run["output_tokens"]) != (spec.num_seqs, sizes["output_tokens"]):
                        raise SystemExit(f"{run['rows']} rows of {run['output_tokens']} tokens came back")
                    runs[way].append(run)
            fastest = {way: best(of_way) for way, of_way in runs.items()}
            rows.append(row_of(count, fastest["job"], fastest.get("bare"), rows))
            result["runs"] = rows
            result[f"on_{count}"] = fastest
            yield result


def row_of(
    count: int, job: dict[str, Any], bare: dict[str, Any] | None, before: list[dict[str, Any]]
) -> dict[str, Any]:
    """One number of GPUs: output tokens a second of both ways, and their ratios, to each other and to what one GPU did."""
    ways = {"job": job} | ({"bare": bare} if bare else {})
    row: dict[str, Any] = {"gpus": count}
    for name, way in ways.items():
        row |= {f"{name}_tok_s": way["output_tokens_per_s"], f"{name}_whole_tok_s": way["whole_output_tokens_per_s"]}
    row |= {f"{name}_s": way["steady_s"] for name, way in ways.items()}
    if bare:
        row["of_bare"] = round(row["job_tok_s"] / row["bare_tok_s"], 4)
        row["of_bare_whole"] = round(row["job_whole_tok_s"] / row["bare_whole_tok_s"], 4)
    one = next((earlier for earlier in [*before, row] if earlier["gpus"] == 1), None)
    for name in ("job", "job_whole", *(["bare"] if bare else [])):
        row[f"{name}_scaling"] = round(row[f"{name}_tok_s"] / one[f"{name}_tok_s"], 3) if one else None
    return row


def line_of(row: dict[str, Any]) -> str:
    """What a person wants of it."""
    count = row["gpus"]
    parts = [
        f"{count}: job {row['job_tok_s']:,.0f} output tok/s steady in {row['job_s']} s, {row['job_whole_tok_s']:,.0f} whole"
    ]
    if count > 1 and row["job_scaling"] is not None:
        parts.append(f"{row['job_scaling']:.3f}x one" + (f" (target {SCALING}x)" if count == 2 else ""))
    if "bare_s" in row:
        parts.append(f"bare {row['bare_tok_s']:,.0f} in {row['bare_s']} s")
        parts.append(f"{row['of_bare']:.1%} of bare (target {OF_BARE:.0%})")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
