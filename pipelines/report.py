"""The content of a job's report, `_run/report.json`: sums over all rows, what this start and its actors did, cost and roofline.

`report_page` makes the page for people of it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from nanovllm import UserError
from nanovllm.utils.roofline import ELEMENT_BYTES, Costs, Device, Work, find_device, least_seconds, weight_costs
from pipelines.counts import Counts
from pipelines.history import Start, Usage, total_usage
from pipelines.models import look

PACKAGES = ("nanovllm", "ray", "torch", "transformers", "pyarrow", "pydantic")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "nanovllm" not in found:
        from nanovllm import __version__

        found["nanovllm"] = __version__
    return found


def build_report(
    *,
    status: str,
    config: Mapping[str, Any],
    counts: Counts,
    total_rows: int,
    seconds: float,
    resumed_rows: int,
    reused_rows: int,
    copied_rows: int,
    samples: Sequence[Mapping[str, Any]],
    shards: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
    starts: Sequence[Start],
    actors: Sequence[Mapping[str, Any]],
    routing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as plain values. `seconds`, `samples`, `actors` and the `..._rows` but the total are of this start of the job;
    `starts` are all, this one last."""
    now, usage = starts[-1].usage, total_usage(starts)
    gpu = next((start.gpu for start in reversed(starts) if start.gpu), "")
    return {
        "status": status,
        "rows": counts.rows,
        "planned_rows": total_rows,
        "samples": counts.samples,
        "error_rows": counts.error_rows,
        "errors": dict(sorted(counts.errors.items(), key=lambda kind: -kind[1])),
        "error_samples": [sample._asdict() for sample in counts.error_samples],
        "finish_reasons": counts.finish_reasons,
        "input_tokens": counts.input_tokens,
        "generated_tokens": counts.generated_tokens,
        "cached_tokens": counts.cached_tokens,
        "input_lengths": counts.input_lengths,
        "generated_lengths": counts.generated_lengths,
        "this_start": {
            "seconds": round(seconds, 2),
            "resumed_rows": resumed_rows,
            "reused_rows": reused_rows,
            "copied_rows": copied_rows,
            "input_tokens": now.input_tokens,
            "generated_tokens": now.generated_tokens,
            "samples": list(samples),
            "shards": list(shards),
            "actors": list(actors),
        },
        "failed_shards": dict(failures),
        "starts": [
            {
                **start._asdict(),
                "usage": start.usage._asdict(),
                "events": [event._asdict() for event in start.events],
            }
            for start in starts
        ],
        "events": [
            {"start": number, **event._asdict()} for number, start in enumerate(starts) for event in start.events
        ],
        "cost": cost(usage, counts, gpu),
        "roofline": roofline(usage, counts, gpu, config),
        "routing": routing,
        "versions": versions(),
        "config": dict(config),
    }


def cost(usage: Usage, counts: Counts, gpu: str) -> dict[str, Any]:
    """What all starts took. Where there is no GPU, an engine takes its place: `unit` says which of them is counted."""
    on_gpus = usage.gpu_seconds > 0
    seconds = usage.gpu_seconds if on_gpus else usage.actor_seconds
    loading = usage.gpu_loading_seconds if on_gpus else usage.loading_seconds
    tokens = counts.input_tokens + counts.generated_tokens
    hours = seconds / 3600
    return {
        "unit": "GPU" if on_gpus else "engine",
        "gpu": gpu,
        "hours": round(hours, 6),
        "gpu_hours": round(usage.gpu_seconds / 3600, 6),
        "engine_hours": round(usage.actor_seconds / 3600, 6),
        "loading_hours": round(loading / 3600, 6),
        "output_tokens_per_second": _ratio(counts.generated_tokens, seconds),
        "tokens_per_second": _ratio(tokens, seconds),
        "hours_per_million_output_tokens": _ratio(hours * 1e6, counts.generated_tokens),
        "hours_per_million_tokens": _ratio(hours * 1e6, tokens),
        "hours_per_million_rows": _ratio(hours * 1e6, counts.rows),
        "engine_input_tokens": usage.input_tokens,
        "engine_cached_tokens": usage.cached_tokens,
        "engine_generated_tokens": usage.generated_tokens,
    }


def roofline(usage: Usage, counts: Counts, gpu: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The least GPU time for the rows of the job beside the time it took; `known` is false where there is none, `reason` says why.

    Prompts count as far as they were not in the prefix cache, rows that were copied from equal ones not at all.
    """
    device = find_device(gpu)
    if not usage.gpu_seconds:
        return {
            "known": False,
            "reason": "engines ran on CPUs, whose limit is not known" if usage.actor_seconds else "",
        }
    if device is None:
        return {"known": False, "reason": f"bandwidth and arithmetic of {gpu!r} are not known"}
    engine = config["engine"]
    try:
        directory = look(config["model"], config.get("run", {}).get("model_cache"), weights=False)
        costs = _costs(directory, engine, device)
    except (UserError, OSError, KeyError) as error:
        return {"known": False, "reason": f"the model's shape cannot be read: {error}"}
    cached = min(1.0, usage.cached_tokens / max(1, usage.input_tokens))
    # Engines that did less than what is in the files have copied; what they did more, in attempts that died, is no work.
    done = min(1.0, usage.generated_tokens / max(1, counts.generated_tokens))
    work = Work(
        rows=counts.rows * done,
        prefill_tokens=counts.input_tokens * done * (1 - cached),
        prefill_pairs=counts.prompt_pairs * done * (1 - cached**2),
        decode_tokens=counts.decode_tokens * done,
        decode_context=counts.decode_context * done,
    )
    most = counts.samples / max(1, usage.actors)
    batch = max(1.0, min(engine["max_num_seqs"], most))
    parts = least_seconds(costs, work, batch)
    tp = engine["tensor_parallel_size"]
    least = parts.seconds * tp  # of one GPU
    loaded = usage.gpu_seconds - usage.gpu_loading_seconds
    return {
        "known": True,
        "device": device.name,
        "measured": device.measured,
        "bandwidth": device.bandwidth,
        "flops": device.flops,
        "batch": round(batch, 1),
        "least_gpu_seconds": round(least, 3),
        "parts": {name: round(value * tp, 3) for name, value in parts._asdict().items()},
        "limit_output_tokens_per_gpu_second": _ratio(counts.generated_tokens * done, least),
        "fraction": _ratio(least, usage.gpu_seconds),
        "fraction_loaded": _ratio(least, loaded),
    }


def _costs(directory: Path, engine: Mapping[str, Any], device: Device) -> Costs:
    from nanovllm.models.config import ModelConfig
    from nanovllm.models.registry import ARCHITECTURES

    shape = ModelConfig.from_dir(directory, ARCHITECTURES)
    element = ELEMENT_BYTES[shape.dtype if engine["dtype"] == "auto" else engine["dtype"]]
    weight_bytes, eight_bit = weight_costs(shape, engine.get("quantization"))
    return Costs.of(
        shape,
        tp=engine["tensor_parallel_size"],
        weight_bytes=(weight_bytes or element) if device.fp8 else element,
        kv_bytes=1 if "8" in str(engine.get("kv_cache_dtype")) else element,
        bandwidth=device.bandwidth,
        flops=device.flops,
        linear_flops=device.flops_8bit if eight_bit else device.flops,
    )


def _ratio(value: float, base: float) -> float | None:
    """To five digits; None where there is nothing to divide by."""
    return float(f"{value / base:.5g}") if base else None


def to_json(report: Mapping[str, Any]) -> bytes:
    """The content of `report.json`."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"  # a name that is no Unicode keeps its JSON escape
