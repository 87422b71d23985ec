"""Metrics as far as they need no Ray: their table, the files in `cluster/` that show them, and what an engine counts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from nanovllm import LLM, SamplingParams
from nanovllm.engine.stats import STEP_BOUNDS_S, StepTimes
from pipelines.metrics import ENGINE, MAX_KIND_CHARS, MAX_KINDS, METRICS, OTHER, Recorder
from tests.prometheus import dashboard_queries

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"

# The fields of the Prometheus operator's PodMonitor (v1) that a file may use here; others are refused, as the API server does.
TEXT: dict[str, Any] = {"type": "string"}
RELABELING = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "sourceLabels": {"type": "array", "items": TEXT},
        "targetLabel": TEXT,
        "separator": TEXT,
        "regex": TEXT,
        "replacement": TEXT,
        "action": {"enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep"]},
    },
}
REQUIREMENT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["key", "operator"],
    "properties": {
        "key": TEXT,
        "operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
        "values": {"type": "array", "items": TEXT},
    },
}
ENDPOINT = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "port": TEXT,
        "path": TEXT,
        "interval": {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
        "scrapeTimeout": {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
        "relabelings": {"type": "array", "items": RELABELING},
        "metricRelabelings": {"type": "array", "items": RELABELING},
    },
}
POD_MONITOR = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "PodMonitor"},
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"name": TEXT, "namespace": TEXT, "labels": {"type": "object", "additionalProperties": TEXT}},
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["selector", "podMetricsEndpoints"],
            "properties": {
                "jobLabel": TEXT,
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "matchLabels": {"type": "object", "additionalProperties": TEXT},
                        "matchExpressions": {"type": "array", "items": REQUIREMENT},
                    },
                },
                "namespaceSelector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"any": {"type": "boolean"}, "matchNames": {"type": "array", "items": TEXT}},
                },
                "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": ENDPOINT},
            },
        },
    },
}


def test_the_table_in_the_readme_is_the_list() -> None:
    text = (REPOSITORY / "pipelines" / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `ray_nanovllm_")]
    assert rows == [
        f"| `{m.series}` | {'engine' if m in ENGINE else 'driver'} | {m.kind} | {m.unit} | {m.about} |" for m in METRICS
    ]


def test_the_dashboard_can_be_imported_and_knows_every_metric() -> None:
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    assert "id" not in dashboard  # it would be that of another Grafana's database
    assert dashboard["uid"] == "nano-vllm-jobs"
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids, places = set(), set()
    for panel in dashboard["panels"]:
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}  # nobody's own
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        ids.add(panel["id"])
        places |= {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
    assert len(ids) == len(dashboard["panels"])
    assert len(places) == sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in dashboard["panels"])
    shown = set(
        re.findall(r"ray_nanovllm_\w+", " ".join(query for some in dashboard_queries().values() for query in some))
    )
    shown |= set(re.findall(r"ray_nanovllm_\w+", variables["output"]["definition"]))
    ends = {"counter": "", "gauge": "", "histogram": "_bucket"}
    known = {metric.series + ends[metric.kind] for metric in METRICS} | {"ray_nanovllm_step_seconds_count"}
    assert shown <= known
    # What the report has too need not be here.
    assert {name for name in known - shown if "_committed_" not in name} == set()


def test_the_pod_monitor_has_fields_that_exist() -> None:
    (document,) = yaml.safe_load_all((CLUSTER / "kuberay" / "podmonitor.yaml").read_text())
    validator = jsonschema.Draft7Validator(POD_MONITOR)
    assert list(validator.iter_errors(document)) == []
    document["spec"]["podMetricsEndpoints"][0]["targetport"] = 8080
    assert list(validator.iter_errors(document))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)")
def test_prometheus_takes_its_file() -> None:
    check = ["promtool", "check", "config", str(CLUSTER / "prometheus.yaml")]
    done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_named_in_the_scrape_files_exist() -> None:
    for path in (CLUSTER / "prometheus.yaml", CLUSTER / "kuberay" / "podmonitor.yaml"):
        for name in re.findall(r"\bcluster/[\w./-]+\w", path.read_text()):
            assert (REPOSITORY / name).exists(), name


def test_errors_of_too_many_kinds_are_one() -> None:
    recorder = Recorder([], "out?secret=1")
    kinds = [f"{'x' * 200}"] + [f"kind {chr(97 + number)}" for number in range(2 * MAX_KINDS)]
    labels = [recorder.label(kind) for kind in kinds]
    assert len(set(labels)) == MAX_KINDS + 1
    assert labels[0] == "x" * MAX_KIND_CHARS
    assert labels[-1] == OTHER
    assert [recorder.label(kind) for kind in kinds] == labels  # a kind keeps its name


def test_steps_fall_into_their_buckets() -> None:
    times = StepTimes()
    for seconds in (0.0001, 0.001, 0.0011, 0.3, 10.0, 99.0):
        times.add(seconds)
    counted = dict(zip((*STEP_BOUNDS_S, float("inf")), times.counts, strict=True))
    assert {bound: count for bound, count in counted.items() if count} == {
        0.001: 2,  # `le`: up to and with it
        0.002: 1,
        0.5: 1,
        10.0: 1,
        float("inf"): 1,
    }
    assert times.seconds == pytest.approx(109.3022)


def test_an_engine_times_every_step(model_dir: Path) -> None:
    llm = LLM(str(model_dir), device="cpu", kvcache_block_size=16, num_kvcache_blocks=32)
    llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    stats = llm.stats()
    assert sum(stats.step_times) == stats.steps >= 9
    assert stats.step_s > 0
    llm.exit()
