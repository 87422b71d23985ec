"""The engine's log-probabilities on a GPU beside those of `transformers`, and its ways of running beside each other.

Random weights of the true Qwen3-0.6B shape (written to disk, so that they are loaded as a user's are), contexts up to 4k.
`python bench/correctness.py --save correctness_gpu`. On a CPU, `--shape qwen3-42m --contexts 40 300` runs every line.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import ROOT, SHAPES, save

from nanovllm import LLM, SamplingParams

NEW_TOKENS = 32
# Beside `transformers`; ways of running beside each other; the demo's accuracy.
PARTS = ("logprobs", "ways", "demo")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[37, 300, 1000, 2100, 3000, 4000])
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "pipelines/demo/prompts.parquet", help="Parquet, or JSON lines"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="default: all, two minutes on an H200 where nothing is compiled yet",
    )
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def write_model(shape: str, directory: Path, device: str) -> Path:
    """A checkpoint of random weights, larger than usual so that the distributions are not flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_dir = directory / "model"
    config = AutoConfig.for_model(**SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, param in model.named_parameters():
        if param.dim() > 1:
            param.data.normal_(0.0, 0.04 if "embed" not in name else 0.05)
    model.to(torch.bfloat16).save_pretrained(model_dir)
    return model_dir


@contextmanager
def recorded_logits(llm: LLM) -> Iterator[list[torch.Tensor]]:
    """Every step's logits [S, V], in the order of the steps."""
    model = llm.executor.runner.model  # type: ignore[attr-defined]
    compute = model.compute_logits
    steps: list[torch.Tensor] = []

    def record(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = compute(hidden)
        steps.append(logits.float().cpu())
        return logits

    model.compute_logits = record
    try:
        yield steps
    finally:
        del model.compute_logits


def engine_logprobs(model_dir: Path, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of each prompt, one prompt at a time, and the log-probabilities [tokens, V] of every step."""
    llm = LLM(str(model_dir), enforce_eager=True, gpu_memory_utilization=0.3, **options)
    tokens, rows = [], []
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for prompt in prompts:
        with recorded_logits(llm) as steps:
            tokens.append(llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"])
        rows.append(torch.cat([logits[:1] for logits in steps[-NEW_TOKENS:]]))
    llm.exit()
    return tokens, torch.log_softmax(torch.cat(rows), dim=-1)


def transformers_logprobs(
    model_dir: Path, prompts: list[list[int]], tokens: list[list[int]], dtype: torch.dtype, device: str
) -> torch.Tensor:
    """The same log-probabilities [tokens, V] with the tokens given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device).eval()
    rows = []
    with torch.inference_mode():
        for prompt, made in zip(prompts, tokens, strict=True):
            ids = torch.tensor([prompt + made[:-1]], device=device)
            hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 :]
            rows.append(model.lm_head(hidden).float().cpu())
    return torch.log_softmax(torch.cat(rows), dim=-1)


def difference(ours: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Of log-probabilities, over all tokens of the vocabulary."""
    error = (ours - other).abs()
    return {
        "mean": round(error.mean().item(), 6),
        "max": round(error.max().item(), 5),
        "same_best": round((ours.argmax(-1) == other.argmax(-1)).float().mean().item(), 4),
    }


def random_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def generate(model_dir: Path, prompts: list[list[int]], turns: int = 1, **options: Any) -> list[list[list[int]]]:
    """Tokens of `turns` batches of the same prompts, half of them greedy."""
    llm = LLM(str(model_dir), gpu_memory_utilization=0.3, max_num_seqs=len(prompts), **options)
    params = [
        SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=NEW_TOKENS + i % 5, ignore_eos=True)
        for i in range(len(prompts))
    ]
    result = [[o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)] for _ in range(turns)]
    cached = llm.stats().cached_tokens
    llm.exit()
    print(f"  {options}: {cached} cached tokens", flush=True)
    return result


def equal(a: list[list[int]], b: list[list[int]]) -> str:
    """How many sequences are the same, and how far the others go together."""
    same = sum(x == y for x, y in zip(a, b, strict=True))
    common = [
        next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), len(x))
        for x, y in zip(a, b, strict=True)
    ]
    return f"{same} of {len(a)}, the first difference at token {min(common)}"


def demo_accuracy(path: Path, **options: Any) -> float:
    """Part of the demo's held-out prompts that are answered right."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    llm = LLM(str(ROOT / "pipelines/demo/model"), gpu_memory_utilization=0.3, **options)
    outputs = llm.generate(
        [row["prompt"] for row in rows], SamplingParams(temperature=0.0, max_tokens=32), use_tqdm=False
    )
    llm.exit()
    right: list[bool] = [
        output["text"].strip() == row["answer"].strip() for output, row in zip(outputs, rows, strict=True)
    ]
    return sum(right) / len(right)


def compare_logprobs(model_dir: Path, args: argparse.Namespace, device: str, result: dict[str, Any]) -> None:
    """The engine beside `transformers`, in both types and with each cache."""
    backends = ["triton", "torch"] if device == "cuda" else ["torch"]
    prompts = random_prompts(args.contexts, SHAPES[args.shape]["vocab_size"])
    start = time.perf_counter()
    tokens, fp32 = engine_logprobs(
        model_dir, prompts, dtype="float32", attention_backend=backends[0], max_model_len=4096
    )
    print(f"float32 engine: {time.perf_counter() - start:.1f} s", flush=True)
    truth = transformers_logprobs(model_dir, prompts, tokens, torch.float32, device)
    result["fp32_vs_transformers_fp32"] = difference(fp32, truth)
    print(result["fp32_vs_transformers_fp32"], flush=True)
    # In bf16 each engine takes its own way after a near tie, so each is compared on its own tokens.
    kinds: dict[str, dict[str, Any]] = {backend: {"attention_backend": backend} for backend in backends}
    kinds["fp8_cache"] = {"kv_cache_dtype": "fp8"}
    for kind, options in kinds.items():
        tokens, made = engine_logprobs(model_dir, prompts, dtype="bfloat16", max_model_len=4096, **options)
        exact = transformers_logprobs(model_dir, prompts, tokens, torch.float32, device)
        theirs = transformers_logprobs(model_dir, prompts, tokens, torch.bfloat16, device)
        result[f"bf16_{kind}_vs_transformers_fp32"] = difference(made, exact)
        result[f"bf16_{kind}_vs_transformers_bf16"] = difference(made, theirs)
        result["bf16_transformers_vs_transformers_fp32"] = difference(theirs, exact)
        print({key: value for key, value in result.items() if "bf16" in key}, flush=True)


def compare_ways(model_dir: Path, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The engine's ways of running beside each other."""
    vocab_size = SHAPES[args.shape]["vocab_size"]
    lengths = [random.Random(1).randrange(20, 900) for _ in range(48)]
    shared = random_prompts([512], vocab_size, seed=5)[0]
    prompts = random_prompts(lengths, vocab_size, seed=2)
    prompts = [shared + p if i % 2 else p for i, p in enumerate(prompts)]
    for dtype in ("float32", "bfloat16"):
        base = generate(model_dir, prompts, turns=2, dtype=dtype)
        rows = {"a second time, prefixes cached": base[1]}
        ways: dict[str, dict[str, Any]] = {
            "eager": {"enforce_eager": True},
            "synchronous": {"async_scheduling": False},
            "no prefix cache": {"enable_prefix_caching": False},
            "chunks of 512": {"max_num_batched_tokens": 512},
            "blocks of 16": {"kvcache_block_size": 16},
            "torch attention": {"attention_backend": "torch"},
        }
        for name, options in ways.items():
            rows[name] = generate(model_dir, prompts, dtype=dtype, **options)[0]
        result[f"same_tokens_{dtype}"] = {name: equal(base[0], other) for name, other in rows.items()}
        print(json.dumps(result[f"same_tokens_{dtype}"], indent=1), flush=True)


def compare_demo(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """The demo model's accuracy by type and cache."""
    for dtype, cache in (("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8")):
        name = dtype if cache == "auto" else f"{dtype}_{cache}_cache"
        result[f"demo_accuracy_{name}"] = demo_accuracy(args.demo, dtype=dtype, kv_cache_dtype=cache)
        print(f"demo, {name}: {result[f'demo_accuracy_{name}']:.4%}", flush=True)


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"benchmark": "correctness", "model": args.shape, "contexts": args.contexts}
    if "logprobs" in args.parts or "ways" in args.parts:
        with tempfile.TemporaryDirectory() as directory:
            model_dir = write_model(args.shape, Path(directory), device)
            if "logprobs" in args.parts:
                compare_logprobs(model_dir, args, device, result)
            if "ways" in args.parts:
                compare_ways(model_dir, args, result)
    if "demo" in args.parts:
        compare_demo(args, result)
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
