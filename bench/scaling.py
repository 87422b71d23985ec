"""Scaling over the GPUs of one host: data parallel, tensor parallel, and grids of both.

`python bench/scaling.py` finds the GPUs G and measures three parts, each piece of which is saved as soon as it is done:

    dp    the whole job (`generate.py`) with 1, 2, 4, ... G engines, rows in proportion (`data_parallel.py`): the seed and the
          labelling workload on the 0.6B and on the 8B shape. Efficiency: tokens a second of N over N times those of one.
    tp    milliseconds a decode step with 1, 2, 4, ... ranks of the 8B shape and of a 70B one (`tensor_parallel.py`), and what
          part of the step the sums over ranks take when timed alone. Efficiency: speed-up over the ranks' number.
    grid  the job on the 8B shape with equal GPUs in all ways to group them: 4x1, 2x2, 1x4 (engines x ranks).

It writes `bench/results/scaling-gpu-G.json`, a table (`.md`) and a plot of efficiency over GPUs (`.svg`) beside it. Before each
piece it says about how long that takes; on 4 H200s by estimate an hour in all, `--quick` 25 minutes. `--resume` leaves out what the JSON
holds, `--budget S` begins nothing that would end later than S seconds after the start. A piece that fails, or for which there was no
time, is named at the end, and the exit status is 1.

Without a GPU, ranks of a tiny model share the cores (gloo): that shows that all of it runs, and no more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data_parallel
from common import RESULTS, ROOT, SHAPES, TIMED_OUT, end_on_sigterm, provenance, run_process, save
from run_all import markdown

from nanovllm.layers.parallel import PULLED_BYTES
from pipelines.charts import text

PARTS = ("dp", "tp", "grid")
DP_TARGET = 0.97
BATCHES = (1, 64, 256)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
Row = dict[str, Any]


class Load(NamedTuple):
    """Rows for a GPU, and about how long they take it; `arguments` are for `data_parallel.py`."""

    workload: str
    model: str
    rows: int
    seconds: float
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As tables and plots have it."""
        return f"{'seed' if self.workload == '8b' else self.workload} {self.model}"


# Shards as large as `tail.py` finds best for jobs this short: with those of `auto`, two engines would end 5 % apart, eight 17 %.
LOADS = (
    Load("seed", "qwen3-0.6b", 3072, 65, ("--set", "run.shard_rows=256")),
    Load("labelling", "qwen3-0.6b", 65536, 55, ("--set", "run.shard_rows=512")),
    # The seed's law of lengths, with slots for as many sequences as an H200 holds.
    Load("8b", "qwen3-8b", 2048, 75, ("--set", "run.shard_rows=256")),
    Load("labelling", "qwen3-8b", 8192, 55, ("--set", "run.shard_rows=128", "--set", "run.shards_in_flight=16")),
)
GRID_LOAD = LOADS[2]
TINY = ("--input-len", "4", "8", "--output-len", "4", "8", "--set", "engine.num_kvcache_blocks=64")
CPU_LOADS = (
    Load("seed", "qwen3-42m", 16, 5, TINY),
    Load("labelling", "qwen3-42m", 16, 5, (*TINY, "--prefix-len", "16")),
)
START_S = 30.0  # Ray, an engine's load and the end of a job; of bare engines, half
TP_MODELS = {"qwen3-8b": 30.0, "llama-70b": 60.0}  # seconds of one size with --quick, else twice that


class Piece(NamedTuple):
    """What is measured and saved at once: its part, its name, about how long it takes, and what makes its rows."""

    part: str
    name: str
    seconds: float
    measure: Callable[[], list[Row]]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line, or of `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="N", help="default: 1, 2, 4, ... and all; 1 and 2 on CPUs"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="pieces whose name holds one of these")
    parser.add_argument(
        "--list", action="store_true", help="print the pieces and about how long each takes; run nothing"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="half the rows, no bare engines, one batch, no NCCL, grids of all GPUs only",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what the JSON has already")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="seconds for everything")
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="of one job or one size of ranks")
    parser.add_argument("--save", metavar="NAME", help="bench/results/NAME.json; default: scaling-{gpu,cpu}-G")
    return parser.parse_args(argv)


class Host(NamedTuple):
    """Where it runs: numbers of GPUs, or of ranks that share CPUs."""

    device: str
    counts: tuple[int, ...]

    @classmethod
    def find(cls, wanted: Sequence[int] | None) -> Host:
        """This machine. Raises SystemExit where more GPUs are wanted than it has."""
        import torch

        gpus = torch.cuda.device_count()
        there = gpus or 2
        counts = tuple(sorted(set(wanted))) if wanted else (*powers(there), *([there] if there & (there - 1) else []))
        if counts[0] < 1 or (gpus and counts[-1] > gpus):
            raise SystemExit(f"--gpus {' '.join(map(str, counts))}: this host has {gpus}; give numbers from 1 to that")
        return cls("cuda" if gpus else "cpu", counts)


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << bit for bit in range(most.bit_length())]


# The pieces


def pieces(args: argparse.Namespace, host: Host, done: dict[str, Any]) -> Iterator[Piece]:
    """All that the options ask for and `done` does not hold."""
    small = host.device == "cpu"
    warm: set[tuple[str, int]] = set()  # what this start has compiled
    had = {(part, row["piece"]) for part in PARTS for row in done[part]}
    for load in CPU_LOADS[:1] if small and args.quick else CPU_LOADS if small else LOADS:
        for count in host.counts:
            piece = Piece(
                "dp", f"{load.name} x{count}", job_seconds(load, args), job_rows(load, count, 1, args, host, warm)
            )
            if "dp" in args.parts and ("dp", piece.name) not in had:
                yield piece
    for model, seconds in {"qwen3-42m": 15.0}.items() if small else TP_MODELS.items():
        for size in host.counts:
            if size & (size - 1):
                continue  # heads are shared out to powers of two
            piece = Piece(
                "tp", f"{model} tp{size}", seconds * (1 if args.quick else 2), tp_rows(model, size, args, host)
            )
            if "tp" in args.parts and ("tp", piece.name) not in had:
                yield piece
    load = CPU_LOADS[0] if small else GRID_LOAD
    for count in [count for count in host.counts if count > 1][-1 if args.quick else 0 :]:
        for size in powers(count):
            if count % size:
                continue
            name = f"{load.name} {count // size}x{size}"
            piece = Piece("grid", name, job_seconds(load, args), job_rows(load, count, size, args, host, warm))
            if "grid" in args.parts and ("grid", piece.name) not in had:
                yield piece


def job_seconds(load: Load, args: argparse.Namespace) -> float:
    """About how long one number of GPUs takes: the warm-up, the job and, but where it is quick, the bare engines."""
    return START_S / 2 + (START_S + load.seconds / 2 if args.quick else 1.5 * START_S + 2 * load.seconds)


def job_rows(
    load: Load, count: int, size: int, args: argparse.Namespace, host: Host, warm: set[tuple[str, int]]
) -> Callable[[], list[Row]]:
    """Measures the job on `count` GPUs, `size` to an engine."""

    def measure() -> list[Row]:
        rows = max(1, load.rows // 2) if args.quick else load.rows
        options = ["--workload", load.workload, "--model", load.model, "--device", host.device, *load.arguments]
        options += ["--rows-per-gpu", str(rows), "--gpus", str(count), "--tensor-parallel", str(size)]
        options += ["--timeout", str(args.timeout), *(["--no-bare"] if args.quick else [])]
        if (load.model, size) in warm:
            options += ["--no-warm-up"]
        if host.device == "cpu":
            options += ["--set", f"run.shard_rows={max(1, rows // 4)}"]
        result = next(data_parallel.measure(data_parallel.parse_args(options)))
        warm.add((load.model, size))
        row, job = result["runs"][-1], result[f"on_{count}"]["job"]
        return [
            {
                "load": load.name,
                "gpus": count,
                "grid": f"{count // size}x{size}",
                "rows": job["rows"],
                **{key: value for key, value in row.items() if key != "gpus" and not key.endswith("_scaling")},
                "load_s": max(job["load_s"]),
                "least_busy_s": min(job["busy_s"]),
                "most_busy_s": max(job["busy_s"]),
            }
        ]

    return measure


def tp_rows(model: str, size: int, args: argparse.Namespace, host: Host) -> Callable[[], list[Row]]:
    """Measures decode steps of one number of ranks, and its sums."""

    def measure() -> list[Row]:
        small = host.device == "cpu"
        batches = [2] if small else [BATCHES[-1]] if args.quick else list(BATCHES)
        command = [sys.executable, str(ROOT / "bench" / "tensor_parallel.py"), "--parts", "sum", "decode"]
        command += ["--decode-model", model, "--sizes", str(size), "--batches", *map(str, batches)]
        command += ["--sum-tokens", *map(str, batches), *(["--no-nccl", "--runs", "2"] if args.quick else [])]
        if small:
            command += ["--prompt-len", "16", "--steps", "16", "--runs", "1"]
        with tempfile.TemporaryDirectory(prefix="scaling-") as directory:
            saved = Path(directory) / "tp"
            status = run_process([*command, "--save", str(saved)], args.timeout, grace=30)
            if status:
                raise SystemExit("it took too long" if status == TIMED_OUT else f"it ended with status {status}")
            result = json.loads(saved.with_suffix(".json").read_text())
        return rows_of_tp(model, size, batches, result)

    return measure


def rows_of_tp(model: str, size: int, batches: Sequence[int], result: dict[str, Any]) -> list[Row]:
    """A row for each batch of `tensor_parallel.py`'s result of one size; one that says why where the model does not fit."""
    decode, sums = result["decode"], {row["tokens"]: row for row in result["sum"]["us_per_call"]}
    if f"tp{size}" not in decode:
        return [{"model": model, "gpus": size, "skipped": decode["skipped"][f"tp{size}"]}]
    rows: list[Row] = []
    for batch in batches:
        step_ms = decode[f"tp{size}"]["step_ms"][str(batch)]
        row: Row = {"model": model, "gpus": size, "batch": batch, "step_ms": step_ms}
        row["tok_s"] = round(batch / step_ms * 1e3)
        if nccl := decode.get(f"tp{size}_nccl"):
            row["nccl_step_ms"] = nccl["step_ms"][str(batch)]
        if size > 1:
            row |= sums_of_step(SHAPES[model], sums[batch], step_ms)
        rows.append(row)
    return rows


def sums_of_step(shape: dict[str, Any], sums: Row, step_ms: float) -> Row:
    """What the sums over ranks take of a decode step: those of the layers, each with its norm, and the embedding's.

    The sums were timed alone: in a step a rank may also wait for another, which counts as the step's here. `sums_part` is of the
    whole calls, `added_part` without the time of the norm that one GPU has too. The sampler's exchange is left out.
    """
    library = "nccl" if "nccl" in sums else "gloo"
    pulled = sums["tokens"] * shape["hidden_size"] * 2 * (sums["ranks"] - 1)
    way = "fused" if "fused" in sums and pulled <= PULLED_BYTES else library
    calls = 2 * shape["num_hidden_layers"]
    embedding = sums[library] - sums["norm"]
    whole, added = calls * sums[way] + embedding, calls * (sums[way] - sums["norm"]) + embedding
    return {
        "sums": calls + 1,
        "sum_way": way,
        "sum_us": sums[way],
        "norm_us": sums["norm"],
        "sums_part": round(whole / step_ms / 1e3, 4),
        "added_part": round(added / step_ms / 1e3, 4),
    }


# What is made of the rows


def with_efficiency(result: dict[str, Any]) -> None:
    """Set each row's ratios, to one GPU's or to the fewest that the model fits, from all rows there are by now."""
    for row in result["dp"]:
        one = next((other for other in result["dp"] if other["load"] == row["load"] and other["gpus"] == 1), None)
        for way, name in (("job", "efficiency"), ("job_whole", "whole_efficiency"), ("bare", "bare_efficiency")):
            if one and f"{way}_tok_s" in row and f"{way}_tok_s" in one:
                row[name] = round(row[f"{way}_tok_s"] / row["gpus"] / one[f"{way}_tok_s"], 4)
    for row in result["tp"]:
        alike = [other for other in result["tp"] if other.get("step_ms") and other["model"] == row["model"]]
        least = min((o for o in alike if o["batch"] == row.get("batch")), key=lambda o: int(o["gpus"]), default=None)
        if least:
            row["of_gpus"] = least["gpus"]
            speedup = least["step_ms"] / row["step_ms"]
            row |= {"speedup": round(speedup, 3), "efficiency": round(speedup * least["gpus"] / row["gpus"], 4)}
    for row in result["grid"]:
        best = max(other["job_tok_s"] for other in result["grid"] if other["gpus"] == row["gpus"])
        row["of_best"] = round(row["job_tok_s"] / best, 4)


def curves(result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Efficiency over GPUs, by what is measured."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["dp"]:
        lines.setdefault(f"dp {row['load']}", []).append((row["gpus"], row.get("efficiency", math.nan)))
    batches = [row["batch"] for row in result["tp"] if "batch" in row]
    for row in result["tp"]:
        if row.get("batch") == max(batches, default=None):
            lines.setdefault(f"tp {row['model']}, {row['batch']} rows", []).append((row["gpus"], row["efficiency"]))
    points = {name: sorted(point for point in line if not math.isnan(point[1])) for name, line in lines.items()}
    return {name: line for name, line in points.items() if line}


def plot(lines: dict[str, list[tuple[int, float]]], title: str) -> str:
    """An SVG of efficiencies over numbers of GPUs, the x axis by powers of two."""
    left, top, width, height = 60, 50, 620, 360
    counts = sorted({count for line in lines.values() for count, _ in line}) or [1]
    most = max([1.0, *(share for line in lines.values() for _, share in line)])
    highest, doublings = math.ceil(most * 5 - 1e-9) / 5, max(1.0, math.log2(counts[-1]))

    def at(count: int, share: float) -> tuple[float, float]:
        return left + width * math.log2(count) / doublings, top + height * (1 - share / highest)

    below = top + height
    shapes = [f'<text x="{left}" y="24" font-size="16">{text(title)}</text>']
    for step in range(round(highest * 5) + 1):
        y = at(1, step / 5)[1]
        shapes.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        shapes.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{step / 5:.0%}</text>')
    for count in counts:
        shapes.append(f'<text x="{at(count, 0)[0]:.1f}" y="{below + 20}" text-anchor="middle">{count}</text>')
    shapes.append(f'<text x="{left + width / 2}" y="{below + 40}" text-anchor="middle">GPUs</text>')
    for place, (name, line) in enumerate(lines.items()):
        colour, points = COLOURS[place % len(COLOURS)], [at(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
        y = below + 66 + 20 * place
        shapes.append(f'<path d="M{left} {y - 4}h24" stroke="{colour}" stroke-width="3"/>')
        shapes.append(
            f'<text x="{left + 32}" y="{y}">{text(name)}: {", ".join(f"{n}: {e:.1%}" for n, e in line)}</text>'
        )
    size = f"{left + width + 40} {below + 70 + 20 * len(lines)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


def tables(result: dict[str, Any]) -> str:
    """Markdown: a table for each part, and what is missing."""
    out = [f"# Scaling on {result['counts'][-1]} {'GPUs' if result['device'] == 'cuda' else 'ranks that share CPUs'}\n"]
    if result["quick"]:
        out.append("`--quick`: half the rows, no bare engines beside the job.\n")
    for part in PARTS:
        if rows := result[part]:
            columns = [column for column in dict.fromkeys(key for row in rows for key in row) if column != "piece"]
            out.append(f"## {part}\n\n{markdown(columns, rows)}")
    low = [row for row in result["dp"] if row.get("efficiency", 1) < DP_TARGET]
    out += [f"- below {DP_TARGET:.0%}: dp {row['piece']}, {row['efficiency']:.1%}" for row in low]
    out += [f"- missing: {name} ({why})" for name, why in result["missing"].items()]
    return "\n".join(out) + "\n"


def write(name: str, result: dict[str, Any]) -> Path:
    """The JSON, the table and the plot."""
    with_efficiency(result)
    path = save(name, result)
    path.with_suffix(".md").write_text(tables(result))
    where = "GPUs of one host" if result["device"] == "cuda" else "ranks that share CPUs"
    path.with_suffix(".svg").write_text(plot(curves(result), f"Efficiency over {where}"))
    return path


def load_before(name: str, result: dict[str, Any]) -> None:
    """Take over the rows that are saved. Raises SystemExit where they were measured in another way."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return
    before, here = json.loads(path.read_text()), {**result, **provenance()}
    for name, old, new in (
        ("device", before["device"], here["device"]),
        ("GPU", before["machine"]["gpu"], here["machine"]["gpu"]),
        ("quick", before["quick"], here["quick"]),
    ):
        if old != new:
            raise SystemExit(f"--resume: {path} has {name} {old}, and this run {new}; give another --save")
    result |= {part: before[part] for part in PARTS}
    result["resumed"] = [*before.get("resumed", []), before["commit"]]  # that some of the rows are of


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where something that was asked for is missing."""
    args = parse_args(argv)
    end_on_sigterm()
    host = Host.find(args.gpus)
    name = args.save or f"scaling-{'gpu' if host.device == 'cuda' else 'cpu'}-{host.counts[-1]}"
    result: dict[str, Any] = {"benchmark": "scaling", "device": host.device, "quick": args.quick}
    result |= {"counts": host.counts, "dp": [], "tp": [], "grid": [], "missing": {}}
    if args.resume:
        load_before(name, result)
    wanted = args.only or [""]
    plan = [
        piece for piece in pieces(args, host, result) if any(some in f"{piece.part} {piece.name}" for some in wanted)
    ]
    print(
        f"{len(plan)} pieces, about {sum(piece.seconds for piece in plan) / 60:.0f} min (as estimated for H200s)",
        flush=True,
    )
    began = time.monotonic()
    for number, piece in enumerate(plan, 1):
        title = f"{piece.part} {piece.name}"
        print(f"[{number}/{len(plan)}] {title}: about {piece.seconds:.0f} s", flush=True)
        if args.list:
            continue
        if time.monotonic() - began + piece.seconds > args.budget:
            result["missing"][title] = "no time left"
            continue
        start = time.monotonic()
        try:
            rows = again(piece, result) or piece.measure()
            seconds = round(time.monotonic() - start, 1)
            result[piece.part] += [{"piece": piece.name, **row, "seconds": seconds} for row in rows]
            print(*(json.dumps(row) for row in result[piece.part][-len(rows) :]), sep="\n", flush=True)
        except (Exception, SystemExit) as error:  # the other pieces are worth as much without it
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                raise  # SIGTERM
            result["missing"][title] = str(error) or type(error).__name__
            print(f"{title} failed: {result['missing'][title]}", flush=True)
        write(name, result)
    if args.list:
        return 0
    path = write(name, result)
    print(tables(result), path, sep="\n", flush=True)
    return bool(result["missing"])


def again(piece: Piece, result: dict[str, Any]) -> list[Row] | None:
    """A grid of engines of one rank each is the data parallel run that is there already."""
    load, _, grid = piece.name.rpartition(" ")
    ratios = {"efficiency", "whole_efficiency", "bare_efficiency"}
    same = [row for row in result["dp"] if (row["load"], row["grid"]) == (load, grid)] if piece.part == "grid" else []
    return [
        {key: value for key, value in row.items() if key not in ratios | {"piece", "seconds"}} for row in same
    ] or None


if __name__ == "__main__":
    sys.exit(main())
