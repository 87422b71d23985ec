"""What every benchmark shares: built-in model shapes, the seed workload, and results that say where they come from."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results"

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "eos_token_id": 151645,
}
SHAPES: dict[str, dict[str, Any]] = {
    # 42 M parameters: large enough that arithmetic counts, small enough for two CPU cores.
    "qwen3-42m": _QWEN3
    | {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "qwen3-8b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


class Workload(NamedTuple):
    """Prompts as token ids and the output tokens asked for, one each."""

    prompts: list[list[int]]
    max_tokens: list[int]


def make_workload(
    num_seqs: int, input_range: tuple[int, int], output_range: tuple[int, int], vocab_size: int, seed: int = 0
) -> Workload:
    """Random prompts drawn as nano-vllm's `bench.py` draws them: with its numbers it is the same job, token for token."""
    rng = random.Random(seed)
    top = min(10000, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(*input_range))] for _ in range(num_seqs)]
    return Workload(prompts, [rng.randint(*output_range) for _ in range(num_seqs)])


def write_shape(name: str, directory: Path) -> Path:
    """A model directory with the config of a built-in shape and no weights (for `load_format=dummy`)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return directory


def model_dir(model: str) -> str:
    """A built-in shape's name becomes a directory; anything else is a directory or hub id already."""
    if model in SHAPES:
        return str(write_shape(model, Path(tempfile.mkdtemp(prefix=f"{model}-"))))
    return model


def provenance() -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    import torch

    packages = ("torch", "transformers", "triton", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return {
        "machine": {
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result with its provenance to `bench/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, **provenance()}, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
