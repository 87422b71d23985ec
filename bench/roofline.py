"""The least time any engine needs for a workload: every byte moved once at the memory's pace, or the arithmetic where that
takes longer. `python bench/roofline.py --workload 8b`; `throughput.py` and `peers.py` print what they reached beside it.

The default ceilings are an H200's as measured: 4.3 TB/s for a device-to-device copy, 790 TFLOP/s for a large bf16 matrix
product. Activations, launches and communication between ranks count as free. With more sequences than may run at once,
the longest outputs go first and a finished sequence is replaced at once.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from common import Workload, add_workload_arguments, model_dir, save, workload_spec

from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.roofline import ELEMENT_BYTES, H200, Costs, weight_costs

BANDWIDTH, FLOPS = H200.bandwidth, H200.flops


class Roofline(NamedTuple):
    """Seconds, and where they go. `kv` counts a shared prefix once a sequence, `kv_prefix_once` once a decode step, as an
    attention kernel that shares its reads would."""

    prefill: float
    weights: float
    kv: float
    lm_head: float
    kv_prefix_once: float
    steps: int

    @property
    def seconds(self) -> float:
        """The least time of an engine whose sequences each read their whole context."""
        return self.prefill + self.weights + self.kv + self.lm_head

    @property
    def seconds_prefix_once(self) -> float:
        """The least time of an engine that reads a shared prefix once for all sequences of a step."""
        return self.seconds - self.kv + self.kv_prefix_once

    def as_dict(self, seconds: float | None = None) -> dict[str, Any]:
        """For a result file; with measured `seconds` also the fraction of the limit that was reached."""
        result: dict[str, Any] = {"roofline_seconds": round(self.seconds, 4)}
        shared = self.kv_prefix_once < self.kv
        if shared:
            result["roofline_seconds_prefix_once"] = round(self.seconds_prefix_once, 4)
        if seconds:
            result["roofline_fraction"] = round(self.seconds / seconds, 4)
            if shared:
                result["roofline_fraction_prefix_once"] = round(self.seconds_prefix_once / seconds, 4)
        parts = {name: round(value, 4) for name, value in self._asdict().items() if shared or name != "kv_prefix_once"}
        return result | {"roofline": parts}


def roofline(
    model: ModelConfig,
    work: Workload,
    max_num_seqs: int | None = None,
    tp: int = 1,
    weight_bytes: float | None = None,
    kv_bytes: float | None = None,
    bandwidth: float = BANDWIDTH,
    flops: float = FLOPS,
    linear_flops: float | None = None,
) -> Roofline:
    """Least seconds of `work` on `tp` devices of `bandwidth` B/s and `flops` FLOP/s each, `linear_flops` in the linear layers.

    `weight_bytes` and `kv_bytes` are those of one element (default: the model's type); `max_num_seqs` None is no cap.
    """
    ceilings = {"bandwidth": bandwidth, "flops": flops, "linear_flops": linear_flops}
    costs = Costs.of(model, tp=tp, weight_bytes=weight_bytes, kv_bytes=kv_bytes, **ceilings)
    # A shared prefix is computed once.
    lens, prefix = [len(prompt) for prompt in work.prompts], work.prefix_len
    tokens = prefix + sum(n - prefix for n in lens)
    pairs = prefix**2 + sum(n**2 - prefix**2 for n in lens)
    prefill = costs.prefill(tokens, pairs, len(lens))
    weights = kv = kv_once = logits = 0.0
    steps = 0
    for batch, context in decode_steps(lens, work.max_tokens, max_num_seqs):
        steps += 1
        weights += costs.weights(batch)
        kv += costs.kv(batch, context)
        kv_once += costs.kv(batch, context, read=context - (batch - 1) * prefix)
        logits += costs.logits(batch)
    return Roofline(prefill, weights, kv, logits, kv_once, steps)


def decode_steps(prompt_lens: list[int], max_tokens: list[int], cap: int | None) -> Iterator[tuple[int, int]]:
    """(sequences, tokens of context) of each decode step. Prefill makes a sequence's first token, so n tokens need n - 1."""
    waiting = sorted((outs - 1, prompt) for prompt, outs in zip(prompt_lens, max_tokens, strict=True) if outs > 1)
    ending: dict[int, list[int]] = defaultdict(list)
    step = batch = context = 0
    while waiting or batch:
        step += 1
        while waiting and (cap is None or batch < cap):
            left, prompt = waiting.pop()
            batch, context = batch + 1, context + prompt
            ending[step + left - 1].append(prompt + left)
        context += batch
        yield batch, context
        for length in ending.pop(step, ()):
            batch, context = batch - 1, context - length


def load_config(model: str) -> ModelConfig:
    """The configuration of a built-in shape, a model directory or a hub id."""
    return ModelConfig.from_dir(resolve_model(model_dir(model)), ARCHITECTURES)


def engine_roofline(
    model: ModelConfig, work: Workload, options: Mapping[str, Any], ceilings: argparse.Namespace
) -> Roofline:
    """`roofline` of an engine with these options, at the ceilings of `add_ceiling_arguments`."""
    dtype = options.get("dtype", "auto")
    element = ELEMENT_BYTES[model.dtype if dtype == "auto" else dtype]
    weight_bytes, eight_bit = weight_costs(model, options.get("quantization"))
    eight_bit_kv = "8" in str(options.get("kv_cache_dtype", "auto"))
    return roofline(
        model,
        work,
        max_num_seqs=options.get("max_num_seqs"),
        tp=options.get("tensor_parallel_size", 1),
        weight_bytes=weight_bytes or element,
        kv_bytes=1 if eight_bit_kv else element,
        bandwidth=ceilings.bandwidth * 1e12,
        flops=ceilings.tflops * 1e12,
        linear_flops=ceilings.tflops * (2e12 if eight_bit else 1e12),
    )


def add_ceiling_arguments(parser: argparse.ArgumentParser) -> None:
    """`--bandwidth` and `--tflops` of one device."""
    parser.add_argument(
        "--bandwidth", type=float, default=BANDWIDTH / 1e12, metavar="TB/S", help="default: %(default)s"
    )
    parser.add_argument(
        "--tflops", type=float, default=FLOPS / 1e12, help="of one device; default: %(default)s (H200, bf16)"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add_ceiling_arguments(parser)
    parser.add_argument("--max-num-seqs", type=int, help="sequences at once (default: the workload's)")
    parser.add_argument("--tp", type=int, default=1, help="devices that share one copy of the model")
    parser.add_argument(
        "--weight-bytes", type=float, help="of one weight of the linear layers (default: the model's type)"
    )
    parser.add_argument("--linear-tflops", type=float, help="of the linear layers' products (default: as --tflops)")
    parser.add_argument("--kv-bytes", type=float, help="of one element of the KV cache (default: the model's type)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    spec = workload_spec(args)
    model = load_config(spec.model)
    work = spec.make(model.vocab_size)
    cap = args.max_num_seqs or spec.max_num_seqs
    ceilings = {"bandwidth": args.bandwidth * 1e12, "flops": args.tflops * 1e12}
    ceilings["linear_flops"] = (args.linear_tflops or args.tflops) * 1e12
    limit = roofline(model, work, cap, args.tp, args.weight_bytes, args.kv_bytes, **ceilings)
    result = {
        "benchmark": "roofline",
        "workload": args.workload,
        "model": spec.model,
        "num_seqs": spec.num_seqs,
        "input_tokens": sum(map(len, work.prompts)),
        "output_tokens": sum(work.max_tokens),
        "max_num_seqs": cap,
        "tensor_parallel_size": args.tp,
        "bandwidth_tb_s": args.bandwidth,
        "tflops": args.tflops,
        "output_tokens_per_s": round(sum(work.max_tokens) / limit.seconds),
        "rows_per_s": round(spec.num_seqs / limit.seconds, 1),
        **limit.as_dict(),
    }
    print(json.dumps(result, indent=1))
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
