"""Where the GPU's time goes: a torch.profiler trace of some steps in the middle of a run, and its summary.

`throughput.py --profile FILE` calls `profile_steps`; `summarize` is a pure function over the events of a chrome trace.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# The first pattern that a kernel's name matches is its family: FlashAttention's names also hold "cutlass" and "gemm".
FAMILIES = {
    "attention": r"attn|attention|flash|fmha|paged|_decode_kernel|_prefill_kernel|_plan_kernel|combine|reshape_and_cache|store_kv",
    "communication": r"nccl|all_?reduce|all_?gather|reduce_?scatter",
    "gemm": r"gemm|gemv|cublas|nvjet|cutlass|splitk|matmul|xmma",
    "norm/rope/act": r"norm|rope|rotary|silu|act_and_mul|activation",
    "sampling": r"sampl|argmax|softmax|gumbel|exponential|topk|top_k|sort|multinomial|logits|_gather_kernel|_advance_kernel",
}
_PATTERNS = {family: re.compile(pattern, re.IGNORECASE) for family, pattern in FAMILIES.items()}
_COPIES = ("gpu_memcpy", "gpu_memset")
WARMUP_STEPS = 5


def family(event: dict[str, Any]) -> str:
    """The family of a GPU event."""
    if event["cat"] in _COPIES:
        return "memcpy"
    return next((name for name, pattern in _PATTERNS.items() if pattern.search(event["name"])), "other")


def summarize(events: list[dict[str, Any]], top: int = 15) -> dict[str, Any]:
    """GPU busy fraction, seconds by kernel family, gaps between kernels and the `top` kernels of a chrome trace.

    The window is that of the profiler's step marks, or where there are none that of the GPU's work; kernels are cut at
    its ends. Kernels that overlap count once in the busy time, each in its family.
    """
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    gpu = [event for event in timed if event.get("cat") in ("kernel", *_COPIES)]
    marks = [e for e in timed if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep")]
    start, end = _span(marks or gpu)
    by_family: dict[str, float] = defaultdict(float)
    by_kernel: dict[tuple[str, str], list[float]] = defaultdict(list)
    intervals = []
    for event in gpu:
        first, last = max(start, event["ts"]), min(end, event["ts"] + event["dur"])
        if first >= last:
            continue
        intervals.append((first, last))
        by_family[family(event)] += last - first
        by_kernel[family(event), event["name"]].append(last - first)
    busy = _union(intervals)
    gaps = [after[0] - before[1] for before, after in pairwise(busy)]
    launches = [event["dur"] for event in timed if re.match(r"cu(da)?(Graph)?Launch", event["name"])]
    largest = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:top]
    return {
        "wall_s": _seconds(end - start),
        "steps": len(marks),
        "gpu_busy_fraction": round(sum(b - a for a, b in busy) / (end - start), 4) if end > start else 0.0,
        "seconds_by_family": {
            name: _seconds(by_family[name]) for name in sorted(by_family, key=lambda name: -by_family[name])
        },
        "gaps": {
            "count": len(gaps),
            "seconds": _seconds(sum(gaps)),
            "median_us": round(statistics.median(gaps), 2) if gaps else 0.0,
            "longest_us": round(max(gaps, default=0.0), 2),
        },
        "launches": {"count": len(launches), "cpu_seconds": _seconds(sum(launches))},
        "top_kernels": [
            {"name": name, "family": kind, "count": len(us), "seconds": _seconds(sum(us))}
            for (kind, name), us in largest
        ],
    }


def profile_steps(llm: Any, run: Callable[[], object], steps_of_run: int, count: int = 50) -> dict[str, Any]:
    """The summary of `count` steps in the middle of `run`, which calls `llm.step` about `steps_of_run` times.

    A few steps more are run under the profiler first, so that its own start is not measured. Other ranks are not seen.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    warmup = min(WARMUP_STEPS, steps_of_run // 4)
    count = max(1, min(count, steps_of_run - warmup - 1))
    wait = max(0, (steps_of_run - count) // 2 - warmup)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    traces: list[list[dict[str, Any]]] = []

    def keep(profiler: Any) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trace.json"
            profiler.export_chrome_trace(str(path))
            traces.append(json.loads(path.read_text())["traceEvents"])

    step = llm.step
    phases = schedule(wait=wait, warmup=warmup, active=count, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=keep) as profiler:

        def profiled_step() -> Any:
            result = step()
            profiler.step()
            return result

        llm.step = profiled_step
        try:
            run()
        finally:
            llm.step = step
    if not traces:
        raise SystemExit(f"the profiled run ended before its step {wait + warmup}; profile a longer one")
    return summarize(traces[0])


def _span(events: list[dict[str, Any]]) -> tuple[float, float]:
    start = min((event["ts"] for event in events), default=0.0)
    return start, max((event["ts"] + event["dur"] for event in events), default=0.0)


def _union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points in time as disjoint intervals, in order."""
    merged: list[tuple[float, float]] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _seconds(microseconds: float) -> float:
    return round(microseconds / 1e6, 6)
