"""Seconds from a process's start to its first token, with a checkpoint on disk: once with an empty Triton cache, then with it filled.

`python bench/startup.py --save startup_gpu`
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, SHAPES, save, write_shape

CHILD = """
import sys, time
start = float(sys.argv[1])
from nanovllm import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[2])
loaded = time.time()
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
print("seconds", imported - start, loaded - start, time.time() - start)
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def write_checkpoint(shape: str, directory: Path) -> None:
    """Random weights under the names that published checkpoints have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    write_shape(shape, directory)


def first_token(directory: Path, cache: str) -> dict[str, float]:
    """Times of one process."""
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(time.time()), str(directory)], env=environment, capture_output=True, text=True
    )
    line = next((line for line in child.stdout.splitlines() if line.startswith("seconds")), None)
    if line is None:
        raise SystemExit(child.stderr[-2000:])
    print(*(line for line in child.stderr.splitlines() if "graphs" in line), flush=True)
    imported, loaded, first = map(float, line.split()[1:])
    return {"imported_s": round(imported, 2), "loaded_s": round(loaded, 2), "first_token_s": round(first, 2)}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model_dir = Path(directory) / "model"
        model_dir.mkdir()
        write_checkpoint(args.shape, model_dir)
        result: dict[str, Any] = {"benchmark": "startup", "model": args.shape}
        for state in ("cold", "warm"):
            result[state] = first_token(model_dir, str(Path(directory) / "triton"))
            print(state, json.dumps(result[state]), flush=True)
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
