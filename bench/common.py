"""What every benchmark shares: built-in model shapes, workloads by name, and results that say where they come from."""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results"
TIMED_OUT = 124

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
_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
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
    "qwen3-30b-a3b": _QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-70b": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


class Workload(NamedTuple):
    """Prompts as token ids and the output tokens asked for, one each; all prompts share their first `prefix_len` tokens."""

    prompts: list[list[int]]
    max_tokens: list[int]
    prefix_len: int = 0

    def for_run(self, run: int) -> list[list[int]]:
        """The prompts with another first token a run, so that no run finds those of the one before in the prefix cache."""
        return [[run + 1, *prompt[1:]] for prompt in self.prompts]

    def digest(self) -> str:
        """Two engines with the same digest were given the same tokens."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]


class WorkloadSpec(NamedTuple):
    """A workload by its numbers: another process makes it again from them, token for token."""

    model: str
    num_seqs: int
    input_range: tuple[int, int]
    output_range: tuple[int, int]
    prefix_len: int = 0
    max_num_seqs: int = 512
    seed: int = 0

    def make(self, vocab_size: int) -> Workload:
        """Every prompt is the shared prefix and then `input_range` tokens of its own."""
        work = make_workload(self.num_seqs, self.input_range, self.output_range, vocab_size, self.seed)
        rng = random.Random(f"prefix {self.seed}")
        prefix = [rng.randint(0, min(10000, vocab_size - 1)) for _ in range(self.prefix_len)]
        return Workload([prefix + prompt for prompt in work.prompts], work.max_tokens, self.prefix_len)


WORKLOADS = {
    "seed": WorkloadSpec("qwen3-0.6b", 256, (100, 1024), (100, 1024), max_num_seqs=256),
    "8b": WorkloadSpec("qwen3-8b", 1024, (100, 1024), (100, 1024), max_num_seqs=1024),
    "30b-a3b": WorkloadSpec("qwen3-30b-a3b", 1024, (100, 1024), (100, 1024), max_num_seqs=1024),
    # What publishers of other engines measure: all rows alike, all queued at once.
    "llama-8b-1000": WorkloadSpec("llama-3.1-8b", 2048, (1000, 1000), (1000, 1000), max_num_seqs=1024),
    "llama-8b-128": WorkloadSpec("llama-3.1-8b", 2048, (128, 128), (2048, 2048), max_num_seqs=1024),
    # More rows than slots: one is admitted whenever one ends, as in a job.
    "stream": WorkloadSpec("qwen3-0.6b", 768, (100, 1024), (100, 1024), max_num_seqs=256),
    # One instruction for all rows, a short text and a short answer each.
    "labelling": WorkloadSpec("qwen3-0.6b", 4096, (64, 256), (1, 32), prefix_len=1024, max_num_seqs=1024),
}


def make_workload(
    num_seqs: int, input_range: tuple[int, int], output_range: tuple[int, int], vocab_size: int, seed: int = 0
) -> Workload:
    """Random prompts drawn as nano-vllm's `bench.py` draws them: with its numbers it is the same job, token for token."""
    rng = random.Random(seed)
    top = min(10000, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(*input_range))] for _ in range(num_seqs)]
    return Workload(prompts, [rng.randint(*output_range) for _ in range(num_seqs)])


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """`--workload NAME`, and an option for each of its numbers."""
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="seed", help="default: seed")
    parser.add_argument(
        "--model", help=f"directory, hub id or built-in shape ({', '.join(SHAPES)}); default: workload's"
    )
    parser.add_argument("--num-seqs", type=int)
    parser.add_argument("--input-len", type=int, nargs=2, metavar=("MIN", "MAX"), help="tokens after the shared prefix")
    parser.add_argument("--output-len", type=int, nargs=2, metavar=("MIN", "MAX"))
    parser.add_argument("--prefix-len", type=int, help="tokens that all prompts share")
    parser.add_argument("--seed", type=int)


def workload_spec(args: argparse.Namespace) -> WorkloadSpec:
    """The named workload with the numbers given on the command line."""
    given = {
        "model": args.model,
        "num_seqs": args.num_seqs,
        "input_range": args.input_len and tuple(args.input_len),
        "output_range": args.output_len and tuple(args.output_len),
        "prefix_len": args.prefix_len,
        "seed": args.seed,
    }
    return WORKLOADS[args.workload]._replace(**{name: value for name, value in given.items() if value is not None})


def name_value(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of a command line; a value that reads as a Python literal is one."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def write_shape(name: str, directory: Path) -> Path:
    """A model directory with the config of a built-in shape and no weights (for `load_format=dummy`)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return directory


def model_dir(model: str) -> str:
    """A built-in shape's name becomes a directory; anything else is a directory or hub id already."""
    if model not in SHAPES:
        return model
    directory = Path(tempfile.mkdtemp(prefix=f"{model}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return str(write_shape(model, directory))


def provenance() -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    import torch

    packages = ("torch", "transformers", "triton", "numpy", "ray")
    versions: dict[str, str | None] = {}
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
    """Write a result with its provenance to `bench/results/NAME.json`, or to `NAME.json` where that is an absolute path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")  # a run that is ended here leaves what it had saved before
    scratch.write_text(json.dumps({**result, **provenance()}, indent=1) + "\n")
    scratch.replace(path)
    return path


def run_process(
    command: list[str], timeout: float | None, environment: Mapping[str, str] | None = None, grace: float = 10
) -> int:
    """Run a command in a process group of its own and leave nothing of it behind, whatever happens here.

    It gets SIGTERM and `grace` seconds to end what it started elsewhere. Returns its exit status, or `TIMED_OUT`.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_on_sigterm() -> None:
    """Let SIGTERM unwind the stack, so that `run_process` ends what it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
