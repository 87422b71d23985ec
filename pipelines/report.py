"""The report of a job: `_run/report.json` for programs and `_run/report.html`, one page that needs nothing else, for people."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from typing import Any

from pipelines.counts import Counts
from pipelines.progress import duration

WIDTH, HEIGHT = 560, 120
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
) -> dict[str, Any]:
    """The report as plain values. `seconds`, `samples` and the `..._rows` but the total are of this start of the job."""
    new_tokens = samples[-1] if samples else {"input_tokens": 0, "generated_tokens": 0}
    return {
        "status": status,
        "rows": counts.rows,
        "planned_rows": total_rows,
        "samples": counts.samples,
        "error_rows": counts.error_rows,
        "errors": dict(sorted(counts.errors.items(), key=lambda kind: -kind[1])),
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
            "input_tokens": new_tokens["input_tokens"],
            "generated_tokens": new_tokens["generated_tokens"],
            "samples": list(samples),
            "shards": list(shards),
        },
        "failed_shards": dict(failures),
        "versions": versions(),
        "config": dict(config),
    }


def to_json(report: Mapping[str, Any]) -> bytes:
    """The content of `report.json`."""
    return json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"


def to_html(report: Mapping[str, Any]) -> bytes:
    """The content of `report.html`."""
    now = report["this_start"]
    facts = {
        "status": report["status"],
        "rows": f"{report['rows']:,} of {report['planned_rows']:,}",
        "rows with an error": f"{report['error_rows']:,}",
        **({"samples": f"{report['samples']:,}"} if report["samples"] != report["rows"] else {}),
        "tokens in": f"{report['input_tokens']:,} ({report['cached_tokens']:,} from the prefix cache)",
        "tokens out": f"{report['generated_tokens']:,}",
        "this start took": duration(now["seconds"]),
        "rows from earlier starts": f"{now['resumed_rows']:,} committed, {now['reused_rows']:,} from journals",
        **({"rows copied from equal ones": f"{now['copied_rows']:,}"} if now["copied_rows"] else {}),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    samples = now["samples"]
    rates = [
        (late["seconds"], (late["generated_tokens"] - early["generated_tokens"]) / (late["seconds"] - early["seconds"]))
        for early, late in pairwise(samples)
        if late["seconds"] > early["seconds"]
    ]
    parts = [
        "<!doctype html><meta charset=utf-8><title>Nano-vLLM job report</title><style>",
        "body{font:14px/1.5 system-ui,sans-serif;max-width:600px;margin:2em auto;padding:0 1em;color:#222}",
        "td,th{text-align:left;padding:1px 14px 1px 0;vertical-align:top}svg{width:100%;height:auto}"
        "text{font:10px system-ui;fill:#666}h2{font-size:15px;margin:1.6em 0 .4em}pre{font-size:12px;overflow:auto}</style>",
        "<h1>Nano-vLLM job report</h1>",
        _table(facts.items()),
        "<h2>Output tokens a second</h2>",
        _curve(rates),
        "<h2>KV cache in use (%)</h2>",
        _curve([(sample["seconds"], 100 * sample["kv_usage"]) for sample in samples]),
        "<h2>Prompt length (tokens, rows)</h2>",
        _bars(report["input_lengths"]),
        "<h2>Output length (tokens, samples)</h2>",
        _bars(report["generated_lengths"]),
        "<h2>Finish reasons</h2>",
        _table((reason, f"{rows:,}") for reason, rows in report["finish_reasons"].items()),
    ]
    if report["errors"]:
        parts += ["<h2>Row errors</h2>", _table((kind, f"{n:,}") for kind, n in list(report["errors"].items())[:20])]
    if report["failed_shards"]:
        parts += ["<h2>Failed shards</h2>", _table(list(report["failed_shards"].items())[:50])]
    config = html.escape(json.dumps(report["config"], indent=1, ensure_ascii=False))
    parts.append(f"<h2>Configuration</h2><pre>{config}</pre>")
    return "\n".join(parts).encode()


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(str(a))}<td>{html.escape(str(b))}" for a, b in rows)
    return f"<table>{cells}</table>"


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A line over seconds, as inline SVG."""
    if len(points) < 2:
        return "<p>too short to plot</p>"
    right, top = points[-1][0], max(max(y for _, y in points), 1e-9)
    path = " ".join(f"{x / right * WIDTH:.1f},{HEIGHT - y / top * HEIGHT:.1f}" for x, y in points)
    return (
        f'<svg viewBox="0 -14 {WIDTH} {HEIGHT + 30}"><polyline points="{path}" fill="none" stroke="#27c" '
        f'stroke-width="1.5"/><path d="M0 {HEIGHT}H{WIDTH}" stroke="#ccc"/><text x="0" y="-4">{top:,.0f}</text>'
        f'<text x="0" y="{HEIGHT + 13}">0 s</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 13}" text-anchor="end">{duration(right)}</text></svg>'
    )


def _bars(counts: Sequence[int]) -> str:
    """A histogram over powers of two, as inline SVG."""
    filled = [bucket for bucket, rows in enumerate(counts) if rows]
    if not filled:
        return "<p>no rows</p>"
    first, last = filled[0], filled[-1]
    step = WIDTH / max(6, last - first + 1)
    top = max(counts)
    bars = []
    for place, bucket in enumerate(range(first, last + 1)):
        height = counts[bucket] / top * HEIGHT
        label = "0" if bucket == 0 else str(2 ** (bucket - 1))
        bars.append(
            f'<rect x="{place * step + 2:.1f}" y="{HEIGHT - height:.1f}" width="{step - 4:.1f}" height="{height:.1f}" '
            f'fill="#27c"/><text x="{place * step + 2:.1f}" y="{HEIGHT + 13}">{label}</text>'
            f'<text x="{place * step + 2:.1f}" y="{HEIGHT - height - 3:.1f}">{counts[bucket]:,}</text>'
        )
    return f'<svg viewBox="0 -14 {WIDTH} {HEIGHT + 30}">{"".join(bars)}</svg>'
