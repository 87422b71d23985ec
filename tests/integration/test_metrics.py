"""What a real Prometheus has of a job on a cluster: the totals of the report, and something for every panel of the dashboard."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from cluster.local_nodes import LocalNodes
from pipelines.metrics import METRICS
from tests import prometheus as real
from tests.faults import actors
from tests.integration.jobs import SLOW, end, journalled_rows, parts, report, start, wait_for
from tests.prometheus import Prometheus, prometheus

pytestmark = [
    pytest.mark.skipif(not real.installed(), reason="needs Prometheus (Debian's package prometheus)"),
    pytest.mark.timeout(600),
]

# Panels of what need not happen, or not while Prometheus looks.
MAY_BE_EMPTY = {"Time left", "Preemptions a second"}
SHARED = "prompt.template=these are the words that every row of this job begins with, so that engines find them again {{ prompt }}"


SELDOM = (
    "nanovllm_restarts",
    "nanovllm_preemptions",
    "nanovllm_error_rows",
)  # the last: told by the engine that has the row


class Watched(NamedTuple):
    """A cluster with a Prometheus, and a job that has ended there."""

    nodes: LocalNodes
    prometheus: Prometheus
    output: Path
    began: float
    said: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def watched(workplace: Path, dataset: Path, chat_model_dir: Path) -> Iterator[Watched]:
    output, began = workplace / "watched", time.time()
    arguments = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW, SHARED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "8000")  # an agent forgets a gauge after twice that
        with LocalNodes(dashboard=True) as nodes:
            nodes.add_node(num_cpus=2)
            with prometheus(nodes.prometheus_targets, workplace / "prometheus") as server:
                job = start([*arguments, "--quiet", "run.replicas=2"], workplace, env=nodes.environment())
                try:
                    hold(job, output, server)
                finally:
                    done = end(job)
                assert done.returncode == 0
                yield Watched(nodes, server, output, began, done.stdout, report(output))


def hold(job: subprocess.Popen[str], output: Path, server: Prometheus) -> None:
    """Suspend the driver half-way until Prometheus has something of an engine: at a job's end Ray may kill engines before they tell."""
    wait_for(lambda: journalled_rows(output) or parts(output), job, 300)
    driver = psutil.Process(job.pid)
    driver.suspend()
    try:
        server.wait_for(lambda: server.total("ray_nanovllm_finished_rows_total"))
    finally:
        driver.resume()


def test_totals_are_those_of_the_report(watched: Watched) -> None:
    found, server = watched.report, watched.prometheus
    only = f'output="{watched.output}"'
    # What the driver tells last comes with the end of its Ray, and from there with the next scrape.
    server.wait_for(lambda: server.total("ray_nanovllm_committed_rows_total", only) >= found["rows"])
    assert server.total("ray_nanovllm_committed_rows_total", only) == found["rows"] == 240
    assert server.total("ray_nanovllm_committed_prompt_tokens_total", only) == found["input_tokens"]
    assert server.total("ray_nanovllm_committed_generated_tokens_total", only) == found["generated_tokens"]
    kinds = server.query(f"sum by (kind) (max_over_time(ray_nanovllm_committed_error_rows_total{{{only}}}[1h]))")
    assert {each["metric"]["kind"]: int(each["value"][1]) for each in kinds} == found["errors"]
    assert sum(found["errors"].values()) == 1
    assert server.total("ray_nanovllm_restarts_total", only) == 0
    done = server.value(f"max(max_over_time(ray_nanovllm_done_rows{{{only}}}[1h]))")
    assert done == server.value(f"max(max_over_time(ray_nanovllm_planned_rows{{{only}}}[1h]))") == 240


def test_every_engine_tells_of_itself(watched: Watched) -> None:
    found, server = watched.report, watched.prometheus
    only = f'output="{watched.output}"'
    # Ray may kill engines at a job's end before they have told the last: then it stays at less.
    deadline = time.monotonic() + 15
    while (rows := server.total("ray_nanovllm_finished_rows_total", only)) < found["rows"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    print(f"engines told of {rows:.0f} of {found['rows']} rows")
    assert 0 < rows <= found["rows"]
    assert server.total("ray_nanovllm_error_rows_total", only) <= found["error_rows"]
    assert rows <= server.total("ray_nanovllm_prompt_tokens_total", only) <= found["input_tokens"]
    assert rows <= server.total("ray_nanovllm_generated_tokens_total", only) <= found["generated_tokens"]
    assert 0 < server.total("ray_nanovllm_cached_tokens_total", only) < found["input_tokens"]
    steps = server.total("ray_nanovllm_step_seconds_count", only)
    assert rows * 24 / 8 < steps <= 24 * 240  # 24 tokens a row, four rows at a time in each of two engines
    assert 0 < server.total("ray_nanovllm_busy_seconds_total", only) < 2 * found["this_start"]["seconds"]
    most = server.value(f"max(max_over_time(ray_nanovllm_kv_usage{{{only}}}[1h]))")
    assert most is not None
    assert 0 <= most <= 1
    engines = server.query(f"max_over_time(ray_nanovllm_generated_tokens_total{{{only}}}[1h])")
    assert len({each["metric"]["WorkerId"] for each in engines}) == len(engines) <= 2


def test_every_panel_of_the_dashboard_has_its_data(watched: Watched) -> None:
    server = watched.prometheus
    server.wait_for(lambda: server.total("ray_nanovllm_committed_rows_total") >= watched.report["rows"])
    for title, expressions in real.dashboard_queries().items():
        for expression in expressions:
            # It raises where an expression is not valid. A rate has its first value with the second scrape.
            ask = partial(server.query_since, watched.began, expression)
            assert ask() or title in MAY_BE_EMPTY or server.wait_for(ask), expression
    wanted = set()
    for metric in METRICS:
        if metric.name not in SELDOM:
            ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
            wanted |= {metric.series + end for end in ends}
    every = 'last_over_time({__name__=~"ray_nanovllm_.*"}[1h])'
    server.wait_for(lambda: wanted <= {each["metric"]["__name__"] for each in server.query(every)})
    with pytest.raises(ValueError, match="parse error"):
        server.query("sum(ray_nanovllm_committed_rows_total")


def test_quiet_says_the_last_line_and_nothing_else(watched: Watched) -> None:
    (line,) = watched.said.splitlines()
    assert line.startswith("finished: 240 rows (1 with an error), ")


def test_what_is_scraped_is_what_ray_says(watched: Watched) -> None:
    def told() -> set[str]:
        (group,) = json.loads(watched.nodes.prometheus_targets.read_text())
        return set(group["targets"])

    server = watched.prometheus
    server.wait_for(lambda: {each["metric"]["instance"] for each in server.query("up")} == told())
    assert len(told()) >= 3  # the head, a node, the dashboard itself


@pytest.mark.long
def test_a_killed_engine_is_counted(
    watched: Watched, undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path
) -> None:
    """Short: `test_totals_are_those_of_the_report`."""
    output = workplace / "watched-kill"
    arguments = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW]
    job = start([*arguments, "run.replicas=1"], workplace, env=watched.nodes.environment())
    try:
        wait_for(lambda: len(parts(output)) >= 1 and actors(watched.nodes), job, 300)
        actors(watched.nodes)[0].kill()
    finally:
        done = end(job)
    assert done.returncode == 0
    assert parts(output) == parts(undisturbed)
    found, server = report(output), watched.prometheus
    only = f'output="{output}"'
    server.wait_for(lambda: server.total("ray_nanovllm_committed_rows_total", only) >= found["rows"])
    assert server.total("ray_nanovllm_committed_rows_total", only) == found["rows"] == 240
    assert server.total("ray_nanovllm_committed_generated_tokens_total", only) == found["generated_tokens"]
    assert server.total("ray_nanovllm_restarts_total", only) == 1
