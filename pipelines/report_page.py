"""The report as a page, `_run/report.html`: one file that needs nothing else, for screens and phones, light and dark."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from pipelines.charts import Bar, Lane, Mark, Series, histogram, lines, percent, stack, text, timeline
from pipelines.charts import duration as axis_time
from pipelines.progress import duration

COLOURS = 8  # lines that have a colour of their own
SHOWN_ACTORS = 20
SHOWN_EVENTS = 60
SHOWN_ERRORS = 20
SHOWN_SHARDS = 50
SHOWN_STARTS = 8  # on the time line
BINS = 120  # points of a curve of rates, at most
SIGNS = {  # of events: sign on the time line, class, what it means
    "death": ("✕", "bad", "engine died"),
    "hang": ("✕", "bad", "hung, killed"),
    "gone": ("○", "dim", "not heard of again"),
    "restart": ("▲", "good", "new process"),
    "retry": ("↻", "warn", "shard tried again"),
    "apart": ("◆", "warn", "suspect rows apart"),
    "failed": ("■", "bad", "failed"),
    "stopped": ("■", "warn", "stopped"),
}
_STATUS = {"finished": "good", "failed": "bad", "stopped": "warn", "running": "bad"}
_ENDED = {"running": "ended without a word (killed?)"}

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#fff;--line:#e2e5ea;--text:#1b1f24;--dim:#5f6875;--track:#f1f3f6;
--c1:#2563eb;--c2:#d97706;--c3:#059669;--c4:#dc2626;--c5:#7c3aed;--c6:#0891b2;--c7:#be185d;--c8:#65a30d;
--good:#047857;--warn:#b45309;--bad:#c81e1e;--rest:#a3abb8}
@media (prefers-color-scheme:dark){:root{--bg:#14171c;--card:#1b1f26;--line:#303642;--text:#e8eaee;--dim:#9aa4b2;--track:#262c36;
--c1:#6ea8fe;--c2:#fbbf24;--c3:#34d399;--c4:#f87171;--c5:#b79bfa;--c6:#22d3ee;--c7:#f472b6;--c8:#a3e635;
--good:#34d399;--warn:#fbbf24;--bad:#f87171;--rest:#5d6675}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:0;background:var(--bg);color:var(--text);
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:24px;margin:0;line-height:1.25}h2{font-size:18px;margin:36px 0 12px}h3{font-size:14px;font-weight:600;margin:0 0 10px}
p{margin:6px 0}.dim,.note,.none{color:var(--dim)}.note{font-size:13px}.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}
.rest{color:var(--rest)}
.head{display:flex;flex-wrap:wrap;gap:10px;align-items:center}
.pill{border:1px solid currentColor;border-radius:99px;padding:1px 12px;font-weight:600;font-size:14px}
.sub{color:var(--dim);overflow-wrap:anywhere;margin:6px 0 20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0}.two>.card{display:flex;flex-direction:column}
.tile b{display:block;font-size:21px;line-height:1.25;font-weight:650}.tile span{font-size:13px;color:var(--dim)}
.tile small{display:block;font-size:13px;color:var(--dim)}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:12px}.two+.two,.two+.card,.card+.card{margin-top:12px}.two>.card,.tiles>.card{margin-top:0}
.plot{position:relative;height:180px;margin:auto 8px 0 46px}.card h3+.plot{margin-top:auto}.legend+.plot{margin-top:10px}.plot svg{display:block;width:100%;height:100%;overflow:visible}
.y span{position:absolute;right:100%;transform:translateY(50%);padding-right:8px;font-size:12px;color:var(--dim);white-space:nowrap}
.x{position:relative;height:20px;margin:4px 8px 0 46px;font-size:12px;color:var(--dim)}
.x span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.grid{stroke:var(--line);stroke-width:1;fill:none}.grid,.line{vector-effect:non-scaling-stroke}
.line{fill:none;stroke:currentColor;stroke-width:1.75;stroke-linejoin:round}.line.rest{stroke-width:1}
.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}
.c7{color:var(--c7)}.c8{color:var(--c8)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--dim)}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px;background:currentColor}
.legend i.sign{background:none;font-style:normal;line-height:12px;text-align:center}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;
border-top:1px solid var(--line);overflow-wrap:anywhere}tr:first-child>th,tr:first-child>td{border-top:0}
thead th{font-weight:600;color:var(--dim);font-size:13px}thead+tbody tr:first-child>*{border-top:1px solid var(--line)}
th[scope=row]{font-weight:500}.actors th[scope=row],.tight{white-space:nowrap}.actors td.host{width:40%}.n{text-align:right;white-space:nowrap}td:last-child,th:last-child{padding-right:0}
.facts th{width:34%;color:var(--dim)}
.histogram td,.histogram th{border:0;padding:2px 10px 2px 0;vertical-align:middle;white-space:nowrap;font-size:13px}
.histogram th{width:1%;text-align:right;color:var(--dim)}.histogram .bar{width:99%}.histogram .n{width:1%}
.bar b,.stack b{display:block;height:16px;background:currentColor;border-radius:2px}.bar b{min-width:2px}
.stack{display:flex;height:20px;border-radius:4px;overflow:hidden;background:var(--track);margin:8px 0}.stack b{height:20px;border-radius:0}
.timeline .lane{display:flex;align-items:center;margin:3px 0}.timeline .name{flex:0 0 64px;font-size:13px;color:var(--dim)}
.track{position:relative;flex:1;height:20px;background:var(--track);border-radius:4px;min-width:0}
.track b{position:absolute;top:3px;bottom:3px;background:currentColor;border-radius:3px;min-width:2px;overflow:hidden;font-size:0}
.track b.load{background:repeating-linear-gradient(135deg,var(--rest) 0 3px,transparent 3px 6px);border:1px solid var(--rest)}
.track b.dim{color:var(--rest)}
.track i{position:absolute;top:0;width:18px;margin-left:-9px;line-height:20px;text-align:center;font-style:normal;font-size:14px;font-weight:700;
text-shadow:0 0 3px var(--bg),0 0 3px var(--bg),0 0 2px var(--bg);cursor:default}
.axis .x{flex:1;margin:2px 0 0}
.scroll{overflow-x:auto}pre{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;overflow:auto;max-height:480px;margin:8px 0 0}
details>summary{cursor:pointer;font-weight:600;font-size:14px}code{font:12.5px ui-monospace,SFMono-Regular,Menlo,monospace}
.message{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace;white-space:pre-wrap;margin:4px 0 0;color:var(--dim)}
label{font-size:14px}input{font:inherit;width:90px;padding:2px 6px;border:1px solid var(--line);border-radius:6px;background:var(--bg);
color:var(--text)}
@media (max-width:720px){main{padding:16px 12px 40px}h1{font-size:20px}.two{grid-template-columns:minmax(0,1fr)}.tiles{gap:8px;
grid-template-columns:repeat(2,minmax(0,1fr))}.card{padding:12px}.tile b{font-size:19px}.x .odd{display:none}.plot{height:150px}
.wide{display:none}th,td{padding-right:8px}.timeline .name{flex-basis:44px}.facts th{width:40%}}
@media print{.card{break-inside:avoid}}
"""

_PRICE = """
(function(){var price=document.getElementById("price"),out=document.getElementById("price-out");if(!price)return;
price.addEventListener("input",function(){var p=parseFloat(price.value);out.textContent=isFinite(p)?
(p*price.dataset.hours).toPrecision(3)+" in all, "+(p*price.dataset.million).toPrecision(3)+" a million output tokens":"";});})();
"""


def to_html(report: Mapping[str, Any]) -> bytes:
    """The content of `report.html`, from that of `report.json`."""
    now = report["this_start"]
    sections = [
        _header(report),
        f'<div class="tiles">{"".join(_tiles(report))}</div>',
        _throughput(now),
        _state(now),
        _lengths(report),
        _time_line(report),
        _actors(now),
        _errors(report),
        _cost(report),
        _settings(report),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Nano-vLLM job report</title><style>{_STYLE}</style></head><body><main>{''.join(sections)}</main>"
        f"<script>{_PRICE}</script></body></html>\n"
    )
    return page.encode(errors="replace")


def _header(report: Mapping[str, Any]) -> str:
    config, starts, status = report["config"], report["starts"], report["status"]
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(starts[0]["began"])) if starts else ""
    often = f", {len(starts)} starts" if len(starts) > 1 else ""
    return (
        f'<div class="head"><h1>Nano-vLLM job report</h1><span class="pill {_STATUS.get(status, "dim")}">{text(status)}</span>'
        f'</div><p class="sub">{text(config.get("model", ""))} → {text(config.get("output", ""))}<br>begun {began}{often}</p>'
    )


def _tiles(report: Mapping[str, Any]) -> Iterable[str]:
    now, cost, limit = report["this_start"], report["cost"], report["roofline"]

    def tile(name: str, value: str, more: str = "", style: str = "") -> str:
        return f'<div class="card tile"><span>{name}</span><b class="{style}">{value}</b><small>{more}</small></div>'

    done = report["rows"] / max(1, report["planned_rows"])
    yield tile("Rows", _short(report["rows"]), f"{done:.0%} of {report['planned_rows']:,}")
    errors = report["error_rows"]
    share = percent(errors / max(1, report["rows"]))
    yield tile("Rows with an error", f"{errors:,}", f"{text(share)} of the rows", "bad" if errors else "")
    yield tile("Output tokens", _short(report["generated_tokens"]), f"from {_short(report['input_tokens'])} of prompts")
    rate = now["generated_tokens"] / now["seconds"] if now["seconds"] else 0.0
    yield tile("Output tok/s", _short(rate), f"this start, over {duration(now['seconds'])}")
    if cost["engine_input_tokens"]:
        hits = cost["engine_cached_tokens"] / cost["engine_input_tokens"]
        yield tile("Prefix-hit rate", percent(min(1.0, hits)), f"{_short(cost['engine_cached_tokens'])} prompt tokens")
    if cost["hours"]:
        name = f"{cost['unit']} time" if cost["unit"] == "GPU" else "Engine time"
        yield tile(name, _hours(cost["hours"]), f"{_figure(cost['output_tokens_per_second'])} output tok/s each")
    if limit["known"] and limit["fraction_loaded"]:
        yield tile("Of the roofline", f"{limit['fraction_loaded']:.0%}", "while engines were loaded")


def _throughput(now: Mapping[str, Any]) -> str:
    samples, actors = now["samples"], now["actors"]
    right = _right(now)
    step = right / BINS

    def rates(name: str) -> list[tuple[float, float]]:
        return _rates([(sample["seconds"], sample[name]) for sample in samples], step)

    total = lines(
        [Series("output", rates("generated_tokens"), "c1"), Series("prompts", rates("input_tokens"), "c2")],
        right,
        title="Tokens a second of all actors over time",
    )
    drawn = [actor for actor in actors if actor["points"]][:SHOWN_ACTORS]
    rest = max(0, len(drawn) - COLOURS)
    curves = [
        Series(
            actor["name"] if place < COLOURS else f"{rest} others",
            _rates([(point[0], point[1]) for point in actor["points"]], step * 2),
            f"c{place + 1}" if place < COLOURS else "rest",
        )
        for place, actor in enumerate(drawn)
    ]
    each = lines(curves, right, title="Output tokens a second of each actor over time")
    which = f"the {len(drawn)} busiest of {len(actors):,}" if len(actors) > len(drawn) else f"{len(drawn)}"
    return (
        f'<h2>Throughput</h2><div class="two">{_card("Tokens a second, all actors", total)}'
        f"{_card(f'Output tokens a second by actor ({which})', each)}</div>"
    )


def _state(now: Mapping[str, Any]) -> str:
    samples, right = now["samples"], _right(now)
    kv = lines(
        [Series("KV cache", [(sample["seconds"], sample["kv_usage"]) for sample in samples], "c5")],
        right,
        top=1.0,
        label=lambda y: f"{y:.0%}",
        title="Part of the KV cache in use over time",
    )
    hits = [
        (sample["seconds"], min(1.0, sample["cached_tokens"] / sample["input_tokens"]))
        for sample in samples
        if sample["input_tokens"]
    ]
    prefix = lines(
        [Series("hits", hits, "c3")], right, top=1.0, label=lambda y: f"{y:.0%}", title="Prefix-hit rate over time"
    )
    queue = lines(
        [
            Series("running", [(sample["seconds"], sample["running"]) for sample in samples], "c1"),
            Series("waiting", [(sample["seconds"], sample["waiting"]) for sample in samples], "c2"),
        ],
        right,
        title="Requests running and waiting in the engines over time",
    )
    rows = lines(
        [Series("rows", [(sample["seconds"], sample["rows"]) for sample in samples], "c6")],
        right,
        title="Rows done over time",
    )
    return (
        f'<h2>Engines</h2><div class="two">{_card("KV cache in use, mean of the actors", kv)}'
        f"{_card('Prompt tokens found in the prefix cache, so far', prefix)}</div>"
        f'<div class="two">{_card("Requests in the engines", queue)}{_card("Rows done", rows)}</div>'
    )


def _lengths(report: Mapping[str, Any]) -> str:
    texts = "samples" if report["samples"] != report["rows"] else "rows"
    mean_in = report["input_tokens"] / max(1, report["rows"])
    mean_out = report["generated_tokens"] / max(1, report["samples"])
    return (
        '<h2>Lengths</h2><div class="two">'
        f"{_card(f'Prompt tokens by rows, {mean_in:,.0f} on average', histogram(report['input_lengths'], 'c2'))}"
        f"{_card(f'Output tokens by {texts}, {mean_out:,.0f} on average', histogram(report['generated_lengths'], 'c1'))}</div>"
    )


def _time_line(report: Mapping[str, Any]) -> str:
    starts = report["starts"]
    shown = starts[-SHOWN_STARTS:]
    if not shown:
        return ""
    gap = 0.01 * sum(start["seconds"] for start in shown) if len(shown) > 1 else 0.0
    offsets = list(accumulate((start["seconds"] + gap for start in shown), initial=0.0))
    right = max(offsets[-1] - gap, 1e-9)
    first = len(starts) - len(shown)
    job = [
        Bar(
            offset,
            offset + start["seconds"],
            _STATUS.get(start["status"], "dim"),
            f"start {first + place + 1}: {_ENDED.get(start['status'], start['status'])} after {duration(start['seconds'])}",
        )
        for place, (start, offset) in enumerate(zip(shown, offsets, strict=False))
    ]
    of_job: list[Mark] = []
    of_shards: list[Mark] = []
    of_actors: dict[str, list[Mark]] = {}
    drawn = [actor for actor in report["this_start"]["actors"] if actor["lives"]]
    eventful = {event["actor"] for event in shown[-1]["events"] if event["kind"] in SIGNS}
    drawn = sorted(drawn, key=lambda actor: actor["name"] not in eventful)[:SHOWN_ACTORS]
    names = {actor["name"] for actor in drawn}
    seen: Counter[str] = Counter()
    for place, (start, offset) in enumerate(zip(shown, offsets, strict=False)):
        for event in start["events"]:
            if event["kind"] not in SIGNS:
                continue
            seen[event["kind"]] += 1
            sign, style, _ = SIGNS[event["kind"]]
            mark = Mark(offset + event["seconds"], sign, style, f"{duration(event['seconds'])}: {event['text']}")
            if place == len(shown) - 1 and event["actor"] in names:
                of_actors.setdefault(event["actor"], []).append(mark)
            elif event["kind"] in ("retry", "apart"):
                of_shards.append(mark)
            else:
                of_job.append(mark)
    lanes = [Lane("starts" if len(starts) > 1 else "job", job, of_job)]
    if of_shards:
        lanes.append(Lane("shards", (), of_shards))
    offset = offsets[len(shown) - 1]
    for actor in sorted(drawn, key=lambda actor: (len(actor["name"]), actor["name"])):
        bars = []
        for life in actor["lives"]:
            where = f"{actor['name']}, {actor['host']}, pid {life['pid']}"
            bars.append(Bar(offset + life["began"], offset + life["ready"], "load", f"{where}: engine loads"))
            bars.append(Bar(offset + life["ready"], offset + life["heard"], "c1", f"{where}: engine ready"))
        lanes.append(Lane(actor["name"], bars, of_actors.get(actor["name"], ())))
    keys = [
        '<span><i class="c1"></i>engine ready</span><span><i class="rest"></i>engine loads (hatched)</span>'
    ] * bool(drawn)
    keys += [
        f'<span><i class="sign {style}">{sign}</i>{meaning} ({seen[kind]:,})</span>'
        for kind, (sign, style, meaning) in SIGNS.items()
        if seen[kind]
    ]
    hints = []
    if len(starts) > 1:
        hints.append("Pauses between starts are cut out.")
    if first:
        hints.append(f"The latest {len(shown)} of {len(starts)} starts.")
    if len(report["this_start"]["actors"]) > len(drawn):
        hints.append(
            f"{len(drawn)} of {len(report['this_start']['actors']):,} actors: those with events, and the busiest."
        )
    note = f'<p class="note">{" ".join(hints)}</p>' if hints else ""
    chart = f'<div class="legend">{"".join(keys)}</div>{note}{timeline(lanes, right)}'
    return f"<h2>Time line</h2>{_card('', chart)}{_events(report)}"


def _events(report: Mapping[str, Any]) -> str:
    events = report["events"]
    if not events:
        return ""
    several = len(report["starts"]) > 1
    half = SHOWN_EVENTS // 2
    shown = events if len(events) <= SHOWN_EVENTS else [*events[:half], *events[-half:]]
    rows = []
    number = None
    for place, event in enumerate(shown):
        if len(shown) < len(events) and place == half:
            left = len(events) - len(shown)
            rows.append(f'<tr><td class="dim" colspan="3">{left:,} more are in report.json</td></tr>')
        if several and event["start"] != number:
            number = event["start"]
            status = report["starts"][number]["status"]
            rows.append(f'<tr><th colspan="3">Start {number + 1}: {text(_ENDED.get(status, status))}</th></tr>')
        style = SIGNS.get(event["kind"], ("", "dim", ""))[1]
        rows.append(
            f'<tr><td class="tight">{axis_time(event["seconds"])}</td><td class="tight {style}">{text(event["kind"])}</td>'
            f"<td>{text(event['text'])}</td></tr>"
        )
    state = " open" if len(events) <= 12 else ""
    return (
        f'<details class="card"{state}><summary>Events ({len(events):,})</summary><table><thead><tr><th>After</th><th>What</th>'
        f"<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _actors(now: Mapping[str, Any]) -> str:
    actors = now["actors"]
    if not actors:
        return ""
    rows = []
    for actor in actors[:SHOWN_ACTORS]:
        loaded = max(actor["seconds"] - actor["loading_seconds"], 1e-9)
        hits = min(1.0, actor["cached_tokens"] / actor["input_tokens"]) if actor["input_tokens"] else 0.0
        device = f"{actor['gpus']:g}x {actor['gpu']}" if actor["gpus"] else "CPU"
        rows.append(
            f'<tr><th scope="row">{text(actor["name"])}</th><td class="host">{text(actor["host"] or actor["node"][:8])}</td>'
            f'<td class="wide">{text(device)}</td><td class="n">{_short(actor["generated_tokens"])}</td>'
            f'<td class="n">{_short(actor["generated_tokens"] / loaded)}</td><td class="n wide">{percent(hits)}</td>'
            f'<td class="n wide">{actor["loading_seconds"]:.1f} s</td><td class="n wide">{duration(actor["seconds"])}</td>'
            f'<td class="n">{actor["restarts"]:,}</td></tr>'
        )
    more = f'<p class="note">The {SHOWN_ACTORS} busiest of {len(actors):,}.</p>' if len(actors) > SHOWN_ACTORS else ""
    table = (
        '<table class="actors"><thead><tr><th>Actor</th><th>Host</th><th class="wide">Device</th><th class="n">Tokens out</th>'
        '<th class="n">tok/s</th><th class="n wide">Prefix hits</th><th class="n wide">Load</th><th class="n wide">Held for</th>'
        f'<th class="n">Restarts</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return f"<h2>Actors of this start</h2>{_card('', table + more)}"


def _errors(report: Mapping[str, Any]) -> str:
    parts = []
    if report["errors"]:
        samples: dict[str, list[Mapping[str, Any]]] = {}
        for sample in report["error_samples"]:
            samples.setdefault(sample["kind"], []).append(sample)
        rows = []
        for kind, count in list(report["errors"].items())[:SHOWN_ERRORS]:
            found = "".join(
                f'<div class="message">{text(sample["file"])} row {sample["row"]:,}: {text(sample["message"])}</div>'
                for sample in samples.get(kind, ())
            )
            rows.append(f'<tr><td>{text(kind[:400])}{found}</td><td class="n">{count:,}</td></tr>')
        more = len(report["errors"]) - len(rows)
        note = f'<p class="note">{more:,} more kinds are in report.json.</p>' if more else ""
        table = (
            '<table><thead><tr><th>Kind (numbers as N), and some of the rows</th><th class="n">Rows</th></tr></thead><tbody>'
            f"{''.join(rows)}</tbody></table>{note}"
        )
        parts.append(_card("Rows with an error", table))
    if report["failed_shards"]:
        shards = list(report["failed_shards"].items())
        note = f'<p class="note">{len(shards) - SHOWN_SHARDS:,} more.</p>' if len(shards) > SHOWN_SHARDS else ""
        parts.append(_card(f"Failed shards ({len(shards):,})", _facts(shards[:SHOWN_SHARDS]) + note))
    if not parts:
        parts.append(_card("", '<p class="none">No row and no shard failed.</p>'))
    return f"<h2>Errors</h2>{''.join(parts)}"


def _cost(report: Mapping[str, Any]) -> str:
    cost, limit = report["cost"], report["roofline"]
    unit = cost["unit"]
    unit, a_unit = (unit, "a GPU") if unit == "GPU" else ("Engine", "an engine")
    facts = [
        *([("Device", cost["gpu"])] if cost["gpu"] else []),
        (f"{unit} time, all starts", _hours(cost["hours"])),
        ("of them loading engines", _hours(cost["loading_hours"])),
        (f"Output tokens {a_unit} second", _figure(cost["output_tokens_per_second"])),
        (f"All tokens {a_unit} second", _figure(cost["tokens_per_second"])),
        (f"{unit} hours a million output tokens", _figure(cost["hours_per_million_output_tokens"])),
        (f"{unit} hours a million rows", _figure(cost["hours_per_million_rows"])),
    ]
    lost = cost["engine_generated_tokens"] - report["generated_tokens"]
    if lost > 0:
        facts.append(("Output tokens generated more than once", f"{lost:,}"))
    price = (
        f'<p><label>Price of {a_unit} hour <input id="price" type="number" min="0" step="any" inputmode="decimal" '
        f'data-hours="{cost["hours"]}" data-million="{cost["hours_per_million_output_tokens"] or 0}"></label> '
        '<output id="price-out" class="dim"></output></p>'
    )
    if not limit["known"]:
        reason = text(limit["reason"] or "nothing ran")
        reached = f'<p class="none">No roofline is known: {reason}.</p>'
    else:
        parts = limit["parts"]
        names = {"prefill": "prompts", "weights": "weights", "kv": "KV cache", "lm_head": "output head"}
        where = stack(
            [(names[key], parts[key], f"c{place + 1}") for place, key in enumerate(names)],
            lambda value: f"{_figure(value)} s",
        )
        ceilings = "measured" if limit["measured"] else "by data sheet"
        reached = _facts(
            [
                ("Reached while engines were loaded", f"{limit['fraction_loaded'] or 0:.1%}"),
                ("Reached of all GPU time", f"{limit['fraction'] or 0:.1%}"),
                ("Limit", f"{_figure(limit['limit_output_tokens_per_gpu_second'])} output tokens a GPU second"),
                ("Least GPU time", f"{_figure(limit['least_gpu_seconds'])} s"),
                (
                    f"{limit['device']}, {ceilings}",
                    f"{limit['bandwidth'] / 1e12:.3g} TB/s, {limit['flops'] / 1e12:,.0f} TFLOP/s",
                ),
                ("Sequences a step", f"{limit['batch']:,.0f}"),
            ]
        )
        reached += f'<p class="note">Where the least time goes:</p>{where}'
    return (
        f'<h2>Cost and limit</h2><div class="two">{_card("Cost", _facts(facts) + price)}'
        f"{_card('Achieved against the roofline', reached)}</div>"
    )


def _settings(report: Mapping[str, Any]) -> str:
    now = report["this_start"]
    facts = [
        ("Tokens in", f"{report['input_tokens']:,}"),
        ("Tokens out", f"{report['generated_tokens']:,}"),
        *([("Samples", f"{report['samples']:,}")] if report["samples"] != report["rows"] else []),
        *((f"Finished by {reason}", f"{count:,}") for reason, count in report["finish_reasons"].items()),
        ("Rows from earlier starts", f"{now['resumed_rows']:,} committed, {now['reused_rows']:,} from journals"),
        *([("Rows copied from equal ones", f"{now['copied_rows']:,}")] if now["copied_rows"] else []),
    ]
    config = text(json.dumps(report["config"], indent=1, ensure_ascii=False))
    return (
        f'<h2>Totals and settings</h2><div class="two">{_card("Totals", _facts(facts))}'
        f"{_card('Versions', _facts(report['versions'].items()))}</div>"
        f'<details class="card"><summary>Configuration</summary><pre>{config}</pre></details>'
    )


def _card(title: str, content: str) -> str:
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return f'<div class="card">{heading}{content}</div>'


def _facts(rows: Iterable[tuple[str, object]]) -> str:
    cells = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f'<table class="facts">{cells}</table>'


def _rates(points: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """Increase a second between points that are at least `step` seconds apart, each at the later point."""
    rates = []
    before = points[0] if points else (0.0, 0.0)
    for x, y in points[1:]:
        if x - before[0] >= max(step, 1e-9):
            rates.append((x, max(0.0, y - before[1]) / (x - before[0])))
            before = x, y
    return rates


def _right(now: Mapping[str, Any]) -> float:
    last = now["samples"][-1]["seconds"] if now["samples"] else 0.0
    return float(max(last, now["seconds"]))


def _short(value: float) -> str:
    """A number of at most five digits, and its unit."""
    for limit, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if value >= limit:
            return f"{value / size:,.0f}{unit}" if value >= 100 * size else f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _figure(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _hours(hours: float) -> str:
    return (
        f"{hours * 3600:.1f} s"
        if hours < 1 / 60
        else duration(hours * 3600)
        if hours < 1
        else f"{hours:.1f} h"
        if hours < 100
        else f"{hours:,.0f} h"
    )
