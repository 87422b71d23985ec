"""Tensor parallelism over the GPUs of one host: the sum over ranks alone, decode steps of an 8B model, and its tokens.

`python bench/tensor_parallel.py --save tensor_parallel` runs all three parts for one and two GPUs in under five minutes:

- sum: all-reduce, residual and RMSNorm, by NCCL and `add_rms_norm` and by the one kernel over symmetric memory, in CUDA
  graphs, for several numbers of tokens. Where the two cross is what `PULLED_BYTES` in `layers/parallel.py` should be.
- decode: seconds a decode step with one GPU, with two, and with two and `NANOVLLM_SYMMETRIC_MEMORY=0` (NCCL for all sums).
- tokens: greedy tokens of one and of two GPUs on random weights, and how likely `transformers` in float32 finds them.

`--sizes 1 2 4 8` has the first two parts for other groups; a group whose weights do not fit its GPUs is left out and said so.
On a CPU (gloo): `--decode-model qwen3-42m --tokens-model qwen3-42m --batches 2 --prompt-len 40 --sum-tokens 1 2`.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from common import SHAPES, model_dir, save
from correctness import random_prompts, write_model
from roofline import load_config

from nanovllm import LLM, SamplingParams
from nanovllm.engine.ranks import RANK_ENVIRONMENT
from nanovllm.layers import parallel
from nanovllm.utils.roofline import ELEMENT_BYTES, Costs

SUM_TOKENS = (1, 16, 64, 256, 1024, 2048, 4096)
CALLS, REPLAYS = 40, 20
SUM_TIMEOUT = 300  # seconds of one size
SHORT, LONG = 16, 144
WEIGHTS_PART = 0.85  # of a device's memory; the rest is the KV cache's, the sums', the graphs'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["sum", "decode", "tokens"], default=["sum", "decode", "tokens"])
    parser.add_argument("--decode-model", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--tokens-model", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=LONG - SHORT, help="decode steps that are timed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2], metavar="N", help="ranks, of sum and decode")
    parser.add_argument("--sum-tokens", type=int, nargs="+", default=SUM_TOKENS, metavar="N")
    parser.add_argument("--no-nccl", action="store_true", help="decode: only as the engine does by itself")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json, after each part")
    parser.add_argument(
        "--rank", type=int, nargs=2, help=argparse.SUPPRESS
    )  # of a child of the first part, and of how many
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# The sum alone


def sum_times(rank: int, size: int, hidden: int, counts: Sequence[int], store: Path) -> None:
    """One rank of the first part; rank 0 writes the table beside `store`."""
    # Before CUDA starts. Buffers for more tokens than the engine's, to see beyond where it turns to NCCL.
    for name, value in RANK_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    parallel.PULLED_BYTES = max(counts) * hidden * 2 * (size - 1)
    from nanovllm.engine.rank_worker import join_ranks
    from nanovllm.kernels.layernorm import add_rms_norm, add_rms_norm_torch

    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", rank), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    if not gpu:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    add_norm = add_rms_norm if gpu else add_rms_norm_torch
    micros_of, library = (graph_micros, "nccl") if gpu else (loop_micros, "gloo")
    tp = join_ranks(rank, size, device, str(store))
    weight = torch.ones(hidden, dtype=dtype, device=device)
    rows: list[dict[str, Any]] = []
    for tokens in counts:
        partial = torch.randn(tokens, hidden, device=device).to(dtype)
        work, residual = torch.empty_like(partial), torch.zeros_like(partial)

        def copy(_: int, partial: torch.Tensor = partial, work: torch.Tensor = work) -> None:
            work.copy_(partial)

        def norm(_: int, partial: Any = partial, work: Any = work, residual: Any = residual) -> None:
            work.copy_(partial)
            add_norm(work, residual, weight, 1e-6)

        def summed(_: int, partial: Any = partial, work: Any = work, residual: Any = residual) -> None:
            work.copy_(partial)  # stands for the product that makes the partial sums
            add_norm(tp.all_reduce(work), residual, weight, 1e-6)

        def fused(turn: int, partial: Any = partial, residual: Any = residual) -> None:
            buffer = tp.partial_buffer(turn % 2, *partial.shape, partial.dtype)
            buffer.copy_(partial)
            tp.all_reduce_add_norm(buffer, residual, weight, 1e-6)

        ways: dict[str, Callable[[int], None]] = {"copy": copy, "norm": norm, library: summed}
        if tp.reducer is not None:
            ways["fused"] = fused
        micros = {name: micros_of(function, tp) for name, function in ways.items()}
        row: dict[str, Any] = {"ranks": size, "tokens": tokens}
        row |= {name: round(value - micros["copy"], 2) for name, value in micros.items()}
        row["copy"] = round(micros["copy"], 2)
        if "fused" in row:
            row["speedup"] = round(row["nccl"] / row["fused"], 2)
            row["pulled_gb_per_s"] = round((size - 1) * partial.numel() * 2 / row["fused"] / 1e3, 1)
        rows.append(row)
        if rank == 0:
            print(row, flush=True)
    if rank == 0:
        store.with_name("sum.json").write_text(json.dumps({"ranks": tp.summary, "us_per_call": rows}))
    tp.all_reduce(torch.zeros(1, device=device))
    if gpu:
        torch.cuda.synchronize()
    os._exit(0)


def graph_micros(function: Callable[[int], None], tp: parallel.TensorParallel) -> float:
    """Microseconds of one call, of `CALLS` in a graph; the slowest rank's."""
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
            tp.all_reduce(torch.zeros(1, device="cuda"))  # all start together
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / REPLAYS / CALLS)
        slowest = tp.all_reduce_max(torch.tensor(min(times), device="cuda"))
        return float(slowest.item())


def loop_micros(function: Callable[[int], None], tp: parallel.TensorParallel) -> float:
    """The same on a CPU, of `CALLS` one after the other."""
    with torch.inference_mode():
        function(0)
        times = []
        for _ in range(3):
            tp.all_reduce(torch.zeros(1))
            start = time.perf_counter()
            for turn in range(CALLS):
                function(turn)
            times.append((time.perf_counter() - start) * 1e6 / CALLS)
        return float(tp.all_reduce_max(torch.tensor(min(times))).item())


def measure_sum(args: argparse.Namespace) -> dict[str, Any]:
    hidden = SHAPES[args.decode_model]["hidden_size"]
    result: dict[str, Any] = {"hidden": hidden, "dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    result |= {"ranks": {}, "us_per_call": []}
    for size in args.sizes:
        if size > 1:
            table = sums_of(size, args)
            result["ranks"][str(size)] = table["ranks"]
            result["us_per_call"] += table["us_per_call"]
    return result


def sums_of(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """The table of one size, from its ranks."""
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        command = [sys.executable, __file__, "--store", str(store), "--decode-model", args.decode_model]
        command += ["--sum-tokens", *map(str, args.sum_tokens), "--rank"]
        ranks = [
            subprocess.Popen([*command, str(rank), str(size)], env={**RANK_ENVIRONMENT, **os.environ})
            for rank in range(size)
        ]
        deadline = time.monotonic() + SUM_TIMEOUT
        try:
            # One that fails leaves the others waiting for it.
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(code != 0 for code in codes):
            raise SystemExit(f"the ranks of the first part ended with {codes}")
        result: dict[str, Any] = json.loads(store.with_name("sum.json").read_text())
    return result


# Decode steps


def measure_decode(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"model": args.decode_model, "prompt_len": args.prompt_len, "steps": args.steps}
    for size in args.sizes:
        lacking = lacks_room(args.decode_model, size, device_bytes(size))
        if lacking:
            result.setdefault("skipped", {})[f"tp{size}"] = lacking
            print(f"tp{size} is left out: {lacking}", flush=True)
            continue
        ways = {f"tp{size}": "1"}
        if size > 1 and torch.cuda.is_available() and not args.no_nccl:
            ways[f"tp{size}_nccl"] = "0"
        for name, switch in ways.items():
            os.environ[parallel.SWITCH] = switch
            result[name] = decode_times(args, size)
            print(name, result[name], flush=True)
        del os.environ[parallel.SWITCH]
        for name, slow in ((f"tp1_to_tp{size}", "tp1"), (f"tp{size}_nccl_to_one_kernel", f"tp{size}_nccl")):
            if size > 1 and slow in result:
                result[name] = ratios(result, slow, f"tp{size}")
                print({name: result[name]}, flush=True)
    return result


def device_bytes(size: int) -> float:
    """Memory of a rank's device; ranks on CPUs share the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(psutil.virtual_memory().total / size)


def lacks_room(model: str, size: int, memory: float) -> str | None:
    """Why the weights do not fit `size` devices of `memory` bytes each; None where they do."""
    config = load_config(model)
    costs = Costs.of(config)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    count = costs.parameters + costs.expert_parameters + costs.lm_head + embedding
    share, room = count * ELEMENT_BYTES[config.dtype] / size, memory * WEIGHTS_PART
    if share <= room:
        return None
    return f"{share / 1e9:.0f} GB of weights a device, and {room / 1e9:.0f} GB of its {memory / 1e9:.0f} may be theirs"


def ratios(result: dict[str, Any], slow: str, fast: str) -> dict[str, float]:
    """How many times as fast a step of `fast` is, for each batch."""
    steps = {name: result[name]["step_ms"] for name in (slow, fast)}
    return {batch: round(steps[slow][batch] / steps[fast][batch], 3) for batch in steps[slow]}


def decode_times(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """Milliseconds a decode step and tokens a second for each batch.

    Prompts are in the prefix cache after the first call, but for one token each; a long call minus a short one is steps of
    decode only, with contexts from `prompt_len + SHORT` to `prompt_len + SHORT + steps`.
    """
    longest = SHORT + args.steps
    start = time.perf_counter()
    llm = LLM(
        model_dir(args.decode_model),
        load_format="dummy",
        tensor_parallel_size=size,
        max_num_seqs=max(args.batches),
        max_model_len=args.prompt_len + longest + 256,
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
        steps = [(seconds(batch, longest) - seconds(batch, SHORT)) / args.steps for _ in range(args.runs)]
        # On a machine with other work the longer call may be the faster one.
        step_ms[str(batch)] = max(0.001, round(statistics.median(steps) * 1e3, 3))
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
        rank, size = args.rank
        sum_times(rank, size, SHAPES[args.decode_model]["hidden_size"], args.sum_tokens, args.store)
        return
    gpus = torch.cuda.device_count()
    if gpus and max(args.sizes) > gpus:
        raise SystemExit(f"--sizes {max(args.sizes)} needs as many GPUs, and {gpus} are here; give others")
    result: dict[str, Any] = {"benchmark": "tensor_parallel", "gpus": gpus}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "sum": lambda: measure_sum(args),
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
