"""What adapters cost: a workload in an engine without any (plain); in one that has some, without (base) and with several mixed in every batch.

`python bench/lora.py --workload 8b --adapters 8 --rank 16 32` makes random adapters of all linear layers in PEFT's format; the engine pads
them to the largest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import SHAPES, Workload, add_workload_arguments, model_dir, name_value, save, workload_spec
from roofline import load_config
from safetensors.torch import save_file

from nanovllm import LLM, SamplingParams
from nanovllm.layers.backends.torch_backend import TorchBackend
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.loader import linear_layers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of the adapters in turn")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--runs", type=int, default=3, help="of each kind")
    parser.add_argument(
        "--option",
        type=name_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option; repeatable",
    )
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def write_adapters(model: str, count: int, ranks: list[int], directory: Path) -> dict[str, str]:
    """`count` random adapters for the model directory `model`; name -> directory."""
    config = load_config(model)
    with torch.device("meta"):
        whole = ARCHITECTURES[config.architecture].load()(config, TensorParallel(), TorchBackend(1, 1, 1), 1)
    shapes = {}
    for name, (module, part) in linear_layers(whole).items():
        rows, columns = module.weight.shape
        shapes[name] = (rows if part is None else module.offsets[part][1], columns)
    found = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number in range(count):
        rank = ranks[number % len(ranks)]
        path = directory / f"adapter{number}"
        path.mkdir()
        tensors = {}
        for name, (rows, columns) in shapes.items():
            key = f"base_model.model.{name}.lora_"
            tensors[f"{key}A.weight"] = (torch.randn(rank, columns, device=device) * columns**-0.5).bfloat16().cpu()
            tensors[f"{key}B.weight"] = (torch.randn(rows, rank, device=device) * 0.01).bfloat16().cpu()
        save_file(tensors, path / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        found[path.name] = str(path)
    return found


def timed_run(llm: LLM, work: Workload, run: int, adapters: list[str | None], temperature: float) -> float:
    """Seconds of the workload whose rows take `adapters` in turn."""
    params = [
        SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, lora_adapter=adapters[i % len(adapters)])
        for i, n in enumerate(work.max_tokens)
    ]
    prompts = work.for_run(run)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    failed = [output["error"] for output in outputs if output["error"]]
    if failed:
        raise SystemExit(f"{len(failed)} rows failed, the first with: {failed[0]}")
    return seconds


def main() -> None:
    args = parse_args()
    spec = workload_spec(args)
    model = model_dir(spec.model)
    options = {"max_num_seqs": spec.max_num_seqs, "load_format": "dummy" if spec.model in SHAPES else "auto"}
    options |= dict(args.option)
    total, seconds = 0, {name: [] for name in ("plain", "base", "mixed")}
    with tempfile.TemporaryDirectory() as directory:
        adapters = write_adapters(model, args.adapters, args.rank, Path(directory))
        for engine in ({}, adapters):
            start = time.perf_counter()
            llm = LLM(model, lora_adapters=engine, **options)
            load_s = time.perf_counter() - start
            work = spec.make(llm.model_config.vocab_size)
            total = sum(work.max_tokens)
            kinds: dict[str, list[str | None]] = (
                {"base": [None], "mixed": sorted(engine)} if engine else {"plain": [None]}
            )
            # Not timed: the same prompts with few tokens, and rows that end one after another, so that all sizes of steps are captured.
            short = work._replace(max_tokens=[-(-n // 16) for n in work.max_tokens])
            for names in kinds.values():
                timed_run(llm, short, 2 * args.runs, names, args.temperature)
            for run in range(args.runs):
                for name, names in kinds.items():
                    seconds[name].append(timed_run(llm, work, 2 * run + (name == "mixed"), names, args.temperature))
                    print(f"{name} {run}: {total / seconds[name][-1]:.1f} output tok/s", flush=True)
            used = llm.config.model_dump(exclude={"model", "lora_adapters"})
            llm.exit()
    rates = {name: round(total / statistics.median(times), 1) for name, times in seconds.items()}
    result = {
        "benchmark": "lora",
        "workload": args.workload,
        "model": spec.model,
        "num_seqs": spec.num_seqs,
        "adapters": args.adapters,
        "ranks": args.rank,
        "engine_options": used,
        "load_s": round(load_s, 2),
        "seconds": {name: [round(s, 3) for s in times] for name, times in seconds.items()},
        "plain_tokens_per_s": rates["plain"],
        "base_tokens_per_s": rates["base"],
        "output_tokens_per_s": rates["mixed"],
        "base_share": round(rates["base"] / rates["plain"], 4),
        "share": round(rates["mixed"] / rates["base"], 4),
    }
    print(
        f"{rates}, share {result['share']}, without adapters in the engine's rows {result['base_share']} of an engine without any"
    )
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
