"""What prefix routing saves: questions about documents, in random order, through `generate.py` with routing off, by column and by prefix.

`python bench/prefix_routing.py --save prefix_routing_cpu`. The KV cache holds a tenth of the documents, so that a job in the order of the
input finds few of them there. Every mode is a job of its own on a Ray of its own; the files of all must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, SHAPES, end_on_sigterm, run_process, save, write_shape

DEMO = ROOT / "pipelines" / "demo" / "model"
MODES = {
    "off": [],
    "group_by": ["run.group_by=document"],
    "prefix_sort": ["run.prefix_sort=auto"],
}
QUESTION_TOKENS = 24


def write_rows(path: Path, args: argparse.Namespace) -> None:
    """Questions as token ids, each after its document."""
    rng = random.Random(0)
    documents = [rng.choices(range(10, 500), k=rng.randint(*args.document_len)) for _ in range(args.documents)]
    asked = [number for number in range(args.documents) for _ in range(args.questions)]
    rng.shuffle(asked)
    prompts = [documents[number] + rng.choices(range(10, 500), k=QUESTION_TOKENS) for number in asked]
    pq.write_table(pa.table({"document": asked, "prompt": prompts}), path, row_group_size=1000)


def model_arguments(model: str, directory: Path) -> list[str]:
    """Of the job. A built-in shape gets random weights, and the demo's tokenizer, which jobs insist on and prompts of ids do not use."""
    if model not in SHAPES:
        return ["--model", model]
    place = write_shape(model, directory / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, place)
    return ["--model", str(place), "engine.load_format=dummy"]


def run_job(directory: Path, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """One job from process start to exit."""
    output = directory / mode
    rows = args.documents * args.questions
    blocks = args.documents * sum(args.document_len) // 2 // 10 // args.block_size
    command = [sys.executable, str(ROOT / "pipelines" / "generate.py"), *model_arguments(args.model, directory)]
    command += ["--input", str(directory / "rows.parquet"), "--output", str(output), "--quiet"]
    command += [f"run.shard_rows={rows // args.shards}", f"run.replicas={args.engines}", f"engine.device={args.device}"]
    command += [f"engine.max_num_seqs={args.max_num_seqs}", f"engine.kvcache_block_size={args.block_size}"]
    command += [f"engine.num_kvcache_blocks={blocks}", "sampling.temperature=0", "sampling.ignore_eos=true"]
    command += [f"sampling.max_tokens={args.max_tokens}", *MODES[mode]]
    began = time.monotonic()
    status = run_process(command, args.timeout)
    if status:
        raise SystemExit(f"{mode}: exit status {status}")
    wall = time.monotonic() - began
    report = json.loads((output / "_run" / "report.json").read_text())
    digest = hashlib.sha256()
    for part in sorted(output.glob("part-*.parquet")):
        digest.update(part.name.encode() + part.read_bytes())
    cost, routing = report["cost"], report["routing"]
    return {
        "wall_s": round(wall, 1),
        "job_s": report["this_start"]["seconds"],
        "prompt_tokens": cost["engine_input_tokens"],
        "prefix_hit_tokens": cost["engine_cached_tokens"],
        "prefix_hit_rate": round(cost["engine_cached_tokens"] / cost["engine_input_tokens"], 4),
        "rows": report["rows"],
        "shards": len(list(output.glob("part-*.parquet"))),
        "routing_s": routing and routing["seconds"],
        "decision": routing and routing["why"],
        "files": digest.hexdigest()[:16],
    }


def main() -> None:
    """Run the modes in turns and print or save what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help=f"directory, hub id or built-in shape ({', '.join(SHAPES)})")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--document-len", type=int, nargs=2, default=(200, 400), metavar=("MIN", "MAX"))
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--save", metavar="NAME")
    args = parser.parse_args()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write_rows(directory / "rows.parquet", args)
        results = {}
        for mode in args.modes:
            results[mode] = run_job(directory, mode, args)
            print(mode, json.dumps(results[mode]), flush=True)
    if len({result["files"] for result in results.values()}) > 1:
        raise SystemExit("the modes wrote different files")
    settings = {name: value for name, value in vars(args).items() if name not in ("save", "model", "modes", "timeout")}
    if args.save:
        save(args.save, {"workload": {**settings, "model": Path(args.model).name}, "modes": results})


if __name__ == "__main__":
    main()
