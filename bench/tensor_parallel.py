"""Tensor parallelism over two GPUs of one host: the sum over ranks alone, decode steps of an 8B model, and its tokens.

`python bench/tensor_parallel.py --save tensor_parallel` runs all three parts in under five minutes:

- sum: all-reduce, residual and RMSNorm, by NCCL and `add_rms_norm` and by the one kernel over symmetric memory, in CUDA
  graphs, for several numbers of tokens. Where the two cross is what `PULLED_BYTES` in `layers/parallel.py` should be.
- decode: seconds a decode step with one GPU, with two, and with two and `NANOVLLM_SYMMETRIC_MEMORY=0` (NCCL for all sums).
- tokens: greedy tokens of one and of two GPUs on random weights, and how likely `transformers` in float32 finds them.

On a CPU, `--parts decode tokens --decode-model qwen3-42m --tokens-model qwen3-42m --batches 2 --prompt-len 40` runs those.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, model_dir, save
from correctness import random_prompts, write_model

from nanovllm import LLM, SamplingParams
from nanovllm.engine.ranks import RANK_ENVIRONMENT
from nanovllm.layers import parallel

HIDDEN = 4096
SUM_TOKENS = (1, 16, 64, 256, 1024, 2048, 4096)
CALLS, REPLAYS = 40, 20
SHORT, LONG = 16, 144


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["sum", "decode", "tokens"], default=["sum", "decode", "tokens"])
    parser.add_argument("--decode-model", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--tokens-model", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json, after each part")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # of a child process of the first part
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# The sum alone


def sum_times(rank: int, store: Path) -> None:
    """One rank of the first part; rank 0 writes the table beside `store`."""
    # Before CUDA starts. Buffers for more tokens than the engine's, to see beyond where it turns to NCCL.
    for name, value in RANK_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    parallel.PULLED_BYTES = SUM_TOKENS[-1] * HIDDEN * 2
    from nanovllm.engine.rank_worker import join_ranks
    from nanovllm.kernels.layernorm import add_rms_norm

    device = torch.device("cuda", rank)
    tp = join_ranks(rank, 2, device, str(store))
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
    rows: list[dict[str, Any]] = []
    for tokens in SUM_TOKENS:
        partial = torch.randn(tokens, HIDDEN, device=device).to(torch.bfloat16)
        work, residual = torch.empty_like(partial), torch.zeros_like(partial)

        def copy(_: int, partial: torch.Tensor = partial, work: torch.Tensor = work) -> None:
            work.copy_(partial)

        def nccl(_: int, partial: Any = partial, work: Any = work, residual: Any = residual) -> None:
            work.copy_(partial)  # stands for the product that makes the partial sums
            add_rms_norm(tp.all_reduce(work), residual, weight, 1e-6)

        def fused(turn: int, partial: Any = partial, residual: Any = residual) -> None:
            buffer = tp.partial_buffer(turn % 2, *partial.shape, partial.dtype)
            buffer.copy_(partial)
            tp.all_reduce_add_norm(buffer, residual, weight, 1e-6)

        ways = {"copy": copy, "nccl": nccl} | ({"fused": fused} if tp.reducer is not None else {})
        micros = {name: graph_micros(function, tp) for name, function in ways.items()}
        row = {"tokens": tokens} | {name: round(value - micros["copy"], 2) for name, value in micros.items()}
        row["copy"] = round(micros["copy"], 2)
        if "fused" in row:
            row["speedup"] = round(row["nccl"] / row["fused"], 2)
            row["pulled_gb_per_s"] = round(partial.numel() * 2 / row["fused"] / 1e3, 1)
        rows.append(row)
        if rank == 0:
            print(row, flush=True)
    if rank == 0:
        store.with_name("sum.json").write_text(json.dumps({"ranks": tp.summary, "us_per_call": rows}))
    tp.all_reduce(torch.zeros(1, device=device))
    torch.cuda.synchronize()
    os._exit(0)


def graph_micros(function: Callable[[int], None], tp: parallel.TensorParallel) -> float:
    """Microseconds of one call, of `CALLS` in a graph; the slower rank's."""
    with torch.inference_mode():
        for turn in range(2):
            function(turn)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for turn in range(CALLS):
                function(turn)
        times = []
        for _ in range(3):
            tp.all_reduce(torch.zeros(1, device="cuda"))  # both start together
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / REPLAYS / CALLS)
        slowest = tp.all_reduce_max(torch.tensor(min(times), device="cuda"))
        return float(slowest.item())


def measure_sum() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        command = [sys.executable, __file__, "--store", str(store), "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)], env={**RANK_ENVIRONMENT, **os.environ}) for rank in range(2)]
        deadline = time.monotonic() + 120
        try:
            # One that fails leaves the other waiting for it.
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if codes != [0, 0]:
            raise SystemExit(f"the ranks of the first part ended with {codes}")
        result: dict[str, Any] = json.loads(store.with_name("sum.json").read_text())
    return {"hidden": HIDDEN, "dtype": "bfloat16", **result}


# Decode steps


def measure_decode(args: argparse.Namespace) -> dict[str, Any]:
    ways: dict[str, tuple[int, str]] = {"tp1": (1, "1"), "tp2": (2, "1"), "tp2_nccl": (2, "0")}
    result: dict[str, Any] = {"model": args.decode_model, "prompt_len": args.prompt_len, "steps": LONG - SHORT}
    for name, (size, switch) in ways.items():
        os.environ[parallel.SWITCH] = switch
        result[name] = decode_times(args, size)
        print(name, result[name], flush=True)
    del os.environ[parallel.SWITCH]
    result["tp1_to_tp2"] = ratios(result, "tp1", "tp2")
    result["nccl_to_one_kernel"] = ratios(result, "tp2_nccl", "tp2")
    print({name: result[name] for name in ("tp1_to_tp2", "nccl_to_one_kernel")}, flush=True)
    return result


def ratios(result: dict[str, Any], slow: str, fast: str) -> dict[str, float]:
    """How many times as fast a step of `fast` is, for each batch."""
    steps = {name: result[name]["step_ms"] for name in (slow, fast)}
    return {batch: round(steps[slow][batch] / steps[fast][batch], 3) for batch in steps[slow]}


def decode_times(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Milliseconds a decode step and tokens a second for each batch.

    Prompts are in the prefix cache after the first call, but for one token each; a long call minus a short one is steps of
    decode only, with contexts from `prompt_len + SHORT` to `prompt_len + LONG`.
    """
    start = time.perf_counter()
    llm = LLM(
        model_dir(args.decode_model),
        load_format="dummy",
        tensor_parallel_size=size,
        max_num_seqs=max(args.batches),
        max_model_len=args.prompt_len + LONG + 256,
    )
    load_s = time.perf_counter() - start
    rng = random.Random(0)
    prompts = [[rng.randrange(10000) for _ in range(args.prompt_len + 1)] for _ in range(max(args.batches))]

    def seconds(batch: int, tokens: int) -> float:
        params = SamplingParams(temperature=0.6, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts[:batch], params, use_tqdm=False)
        return time.perf_counter() - start

    prefill = seconds(len(prompts), 1)
    step_ms = {}
    for batch in args.batches:
        seconds(batch, SHORT)
        steps = [(seconds(batch, LONG) - seconds(batch, SHORT)) / (LONG - SHORT) for _ in range(args.runs)]
        step_ms[str(batch)] = round(statistics.median(steps) * 1e3, 3)
    summary, preemptions = llm.executor.summary, llm.stats().preemptions
    llm.exit()
    return {
        "engine": summary,
        "load_s": round(load_s, 1),
        "prefill_s": round(prefill, 2),
        "step_ms": step_ms,
        "tokens_per_s": {batch: round(int(batch) / ms * 1e3) for batch, ms in step_ms.items()},
        "preemptions": preemptions,
    }


# Tokens


def measure_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens of one and two ranks, each judged by a float32 model that is given them (teacher forcing)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = random.Random(3)
    prompts = random_prompts(
        [rng.randrange(20, 900) for _ in range(16)], SHAPES[args.tokens_model]["vocab_size"], seed=4
    )
    result: dict[str, Any] = {"model": args.tokens_model, "prompts": len(prompts), "new_tokens": 64}
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(args.tokens_model, Path(directory), device)
        made = {
            (dtype, size): greedy_tokens(model, prompts, dtype, size)
            for dtype in ("bfloat16", "float32")
            for size in (1, 2)
        }
        judge = Judge(model, device)
        for dtype in ("bfloat16", "float32"):
            one, two = made[dtype, 1], made[dtype, 2]
            result[dtype] = {
                "tp1_logprob_below_best": summary_of(judge.gaps(prompts, one)),
                "tp2_logprob_below_best": summary_of(judge.gaps(prompts, two)),
                **compare(judge, prompts, one, two),
            }
        # The yardstick: where `transformers` in bfloat16 would have gone on from the same tokens.
        result["bfloat16"]["transformers_logprob_below_best"] = summary_of(
            judge.gaps_of_bf16(prompts, made["bfloat16", 1])
        )
    print(json.dumps(result, indent=1), flush=True)
    return result


def greedy_tokens(model: Path, prompts: list[list[int]], dtype: str, size: int) -> list[list[int]]:
    llm = LLM(
        str(model),
        dtype=dtype,
        tensor_parallel_size=size,
        max_num_seqs=len(prompts),
        max_model_len=1024,
        gpu_memory_utilization=0.4,
    )
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    tokens = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
    llm.exit()
    return tokens


def summary_of(gaps: list[float]) -> dict[str, float]:
    """Of how much less likely, as a log-probability, the chosen token is than the best one."""
    return {
        "mean": round(statistics.mean(gaps), 6),
        "max": round(max(gaps), 5),
        "best_chosen": round(sum(gap <= 0 for gap in gaps) / len(gaps), 4),
    }


def compare(judge: Judge, prompts: list[list[int]], one: list[list[int]], two: list[list[int]]) -> dict[str, Any]:
    """How far the two go together, and how much the float32 model prefers either token where they part."""
    margins, together = [], 0
    for prompt, a, b in zip(prompts, one, two, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        together += len(a) if first is None else first
        if first is not None:
            logprobs = judge.logprobs(prompt, a[: first + 1])[-1]
            margins.append(round(abs(logprobs[a[first]] - logprobs[b[first]]).item(), 5))
    return {
        "equal_sequences": len(prompts) - len(margins),
        "equal_tokens_up_to_first_difference": round(together / sum(map(len, one)), 4),
        "margins_at_first_difference": sorted(margins),
    }


class Judge:
    """`transformers` in float32 on the checkpoint's weights."""

    def __init__(self, model: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self.exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
        self.bf16 = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], made: list[int], exact: bool = True) -> torch.Tensor:
        """Log-probabilities [tokens made, V] of each next token, with those before it given."""
        model = self.exact if exact else self.bf16
        ids = torch.tensor([prompt + made[:-1]], device=self.device)
        hidden = model.model(ids).last_hidden_state[0, len(prompt) - 1 :]
        return torch.log_softmax(model.lm_head(hidden).float(), dim=-1)

    def gaps(self, prompts: list[list[int]], tokens: list[list[int]]) -> list[float]:
        """For each token made, how much less likely it is than the best."""
        gaps: list[float] = []
        for prompt, made in zip(prompts, tokens, strict=True):
            logprobs = self.logprobs(prompt, made)
            chosen = logprobs.gather(1, torch.tensor(made, device=self.device).unsqueeze(1)).squeeze(1)
            gaps += (logprobs.amax(dim=1) - chosen).tolist()
        return gaps

    def gaps_of_bf16(self, prompts: list[list[int]], tokens: list[list[int]]) -> list[float]:
        """The same for what the bfloat16 model chooses in the place of each token made."""
        gaps: list[float] = []
        for prompt, made in zip(prompts, tokens, strict=True):
            logprobs = self.logprobs(prompt, made)
            choice = self.logprobs(prompt, made, exact=False).argmax(dim=1, keepdim=True)
            gaps += (logprobs.amax(dim=1) - logprobs.gather(1, choice).squeeze(1)).tolist()
        return gaps


def main() -> None:
    args = parse_args()
    if args.rank is not None:
        sum_times(args.rank, args.store)
        return
    result: dict[str, Any] = {"benchmark": "tensor_parallel", "gpus": torch.cuda.device_count()}
    if "sum" in args.parts and torch.cuda.device_count() < 2:
        raise SystemExit("the first part needs 2 GPUs; leave it out with --parts decode tokens")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "sum": measure_sum,
        "decode": lambda: measure_decode(args),
        "tokens": lambda: measure_tokens(args),
    }
    for part in args.parts:
        start = time.perf_counter()
        result[part] = parts[part]()
        result[part]["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{part}: {result[part]['seconds']} s", flush=True)
        if args.save:
            print(save(args.save, result), flush=True)


if __name__ == "__main__":
    main()
