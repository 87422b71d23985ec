"""What a report is made of: events and actors of any number, errors in full, cost, and the limit of the hardware."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.roofline import H200, Costs, Work, find_device, least_seconds
from pipelines.charts import duration, number
from pipelines.counts import KINDS, MESSAGE_CHARS, SAMPLES_EACH, Counts, count_rows
from pipelines.history import CURVES, MAX_ACTORS, MAX_EVENTS, MAX_STARTS, OTHERS, POINTS, Usage
from pipelines.plan import Shard
from pipelines.report import cost, roofline
from pipelines.results import RowResult, Sample, failed_row
from pipelines.storage import resolve
from tests.models import make_model
from tests.reports import history_of, job, worker
from tests.unit.test_pipeline_columns import columns

SHARD = Shard(3, "a.parquet", 1, 500, 100, 0, 0)


def kinds(history: Any) -> list[tuple[str, str]]:
    return [(event.kind, event.actor) for event in history.starts()[-1].events]


# History


def test_actors_die_and_come_back(tmp_path: Path) -> None:
    history, clock = history_of(resolve(str(tmp_path / "history")), "one")
    history.begin()
    for second in range(0, 100, 2):
        clock.now = float(second)
        states = [(max(0.5, second - 30.0), worker(0, min(second, 30)))]
        if second >= 40:
            states.append((0.5, worker(0, second - 36, life=1)))
        states.append((0.5, worker(1, second)))
        history.look(states)
    history.end("finished", "all rows are done")
    assert kinds(history) == [("begin", ""), ("actor", "a1"), ("actor", "a2"), ("restart", "a1"), ("end", "")]
    restart = history.starts()[-1].events[3]
    assert restart.seconds == pytest.approx(35.5, abs=0.1)  # when its process began, not when it was heard of
    assert "pid 2000: a new process for pid 1000" in restart.text
    first, second = history.actors()
    assert (first["name"], first["restarts"], second["name"], second["restarts"]) == ("a2", 0, "a1", 1)
    assert [life["pid"] for life in second["lives"]] == [1000, 2000]
    assert second["seconds"] == 30 + (98 - 36)
    usage = history.starts()[-1].usage
    assert (usage.actors, usage.processes) == (2, 3)
    assert usage.gpu_seconds == usage.actor_seconds == 98 + 30 + 62


def test_who_is_not_heard_of_again(tmp_path: Path) -> None:
    history, clock = history_of(resolve(str(tmp_path / "history")), "one")
    for second in range(0, 60, 2):
        clock.now = float(second)
        history.look([(max(0.5, second - 20.0), worker(0, min(second, 20)))])
    assert kinds(history) == [("actor", "a1"), ("gone", "a1")]
    assert history.starts()[-1].events[1].seconds == pytest.approx(20, abs=1)


def test_what_a_shard_brings_is_newer_than_the_last_report(tmp_path: Path) -> None:
    history, clock = history_of(resolve(str(tmp_path / "history")), "one")
    state = worker(0, 20)
    process = f"{state.host}:{state.pid}"
    newest = {"up_s": 20.7, "generated_tokens": 10**9, "input_tokens": 7, "cached_tokens": 3}
    history.did(process, newest)  # before anyone has heard of the actor
    clock.now = 21.0
    history.look([(0.5, state)])
    assert history.actors()[0]["generated_tokens"] == 10**9
    history.did(process, {**newest, "up_s": 20.8, "generated_tokens": 10**9 + 1})
    history.look([(1.0, state)])  # the board knows no better yet
    assert history.actors()[0]["generated_tokens"] == 10**9 + 1
    history.look([(0.1, worker(0, 22))])
    assert history.actors()[0]["generated_tokens"] == worker(0, 22).generated_tokens


def test_all_of_it_is_bounded(tmp_path: Path) -> None:
    history, clock = history_of(resolve(str(tmp_path / "history")), "one")
    count = MAX_ACTORS + 200
    for second in range(0, 1200, 40):
        clock.now = float(second)
        history.look([(0.5, worker(number, second)) for number in range(count)])
    for second in range(1200, 20_000, 7):
        clock.now = float(second)
        history.look([(0.5, worker(0, second))])
    for shard in range(3 * MAX_EVENTS):
        history.note("retry", f"shard {shard}, " + "x" * 10_000)
    actors, start = history.actors(), history.starts()[-1]
    assert len(actors) == MAX_ACTORS + 1
    assert sum(actor["name"] == OTHERS for actor in actors) == 1
    assert start.usage.actors == MAX_ACTORS + 1
    expected = sum(worker(number, 1160).generated_tokens for number in range(1, count))
    assert start.usage.generated_tokens == expected + worker(0, second).generated_tokens
    assert len(start.events) == MAX_EVENTS
    assert start.events[0].kind == "actor"
    assert f"shard {3 * MAX_EVENTS - 1}," in start.events[-1].text
    assert max(len(actor["points"]) for actor in actors) <= POINTS + 1
    assert sum(bool(actor["points"]) for actor in actors) == CURVES
    assert len(json.dumps(actors)) < 1_000_000


def test_starts_are_told_to_the_next_ones(tmp_path: Path) -> None:
    place = resolve(str(tmp_path / "history"))
    for start in range(MAX_STARTS + 10):
        history, clock = history_of(place, f"start {start}")
        history.begin()
        clock.now = 20.0
        history.look([(0.0, worker(0, 20))])
        history.write()
        history.note("stopping", "told to stop")
        if start % 2:
            history.end("stopped", "by SIGTERM")
    history, _ = history_of(place, "last")
    starts = history.starts()
    assert len(starts) == MAX_STARTS + 1
    assert [start.status for start in starts[-3:]] == ["running", "stopped", "running"]
    assert [event.kind for event in starts[-2].events] == ["begin", "actor", "stopping", "stopped"]
    assert sum(start.usage.gpu_seconds for start in starts) == 20.0 * (
        MAX_STARTS + 10
    )  # of those that are left out too


def test_a_store_that_refuses_costs_only_the_record(tmp_path: Path) -> None:
    blocked = tmp_path / "history"
    blocked.write_text("a file where the directory should be")
    history, _ = history_of(resolve(str(blocked)), "one")
    history.begin()
    history.end("failed", "the disk is full")
    blocked.unlink()
    history.write()
    again, _ = history_of(resolve(str(blocked)), "two")
    assert [event.kind for event in again.starts()[0].events] == ["begin", "failed"]


# Errors


def test_errors_are_kept_with_their_place(tmp_path: Path) -> None:
    wide = columns()
    rows = [RowResult((Sample("t", "stop", 2),), 3, 0, None)] * 100
    for row in (5, 6, 7, 8):
        rows[row] = failed_row(f"too long: {row} tokens")
    rows[50] = failed_row("x" * 5000)
    counts = count_rows(wide.table(rows), wide, SHARD.place)
    assert [(sample.row, sample.message) for sample in counts.error_samples[:SAMPLES_EACH]] == [
        (505, "too long: 5 tokens"),
        (506, "too long: 6 tokens"),
        (507, "too long: 7 tokens"),
    ]
    (long,) = counts.error_samples[SAMPLES_EACH:]
    assert (long.file, long.row, len(long.message)) == ("a.parquet", 550, MESSAGE_CHARS)
    again = Counts.from_dict(json.loads(json.dumps(counts.as_dict())))
    assert again.error_samples == counts.error_samples
    again.add(counts)
    assert len(again.error_samples) == SAMPLES_EACH + 2  # a kind that has enough gets no more
    assert count_rows(wide.table(rows), wide).error_samples == []
    many = [failed_row("kind " + chr(ord("a") + number % 26) + "b" * (number // 26)) for number in range(100)]
    assert len({sample.kind for sample in count_rows(wide.table(many), wide, SHARD.place).error_samples}) == KINDS


@pytest.mark.parametrize("form", ["list", "rows"])
def test_attention_is_summed_exactly(form: str) -> None:
    rng = random.Random(0)
    wide = columns({"n": 2}, samples=form)
    lengths = [(rng.randint(0, 50), [rng.randint(0, 30) for _ in range(2)]) for _ in range(40)]
    rows = [RowResult(tuple(Sample("t", "stop", out) for out in outs), prompt, 0, None) for prompt, outs in lengths]
    counts = count_rows(wide.table(rows), wide)
    assert counts.prompt_pairs == sum(prompt**2 for prompt, _ in lengths)
    steps = [prompt + step for prompt, outs in lengths for out in outs for step in range(1, out)]
    assert counts.decode_context == sum(steps)
    assert counts.decode_tokens == len(steps)


# Cost and limit


def test_the_sums_cost_what_the_steps_cost(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(make_model(tmp_path / "model"), ARCHITECTURES)
    costs = Costs.of(model, tp=2)
    prompt, out, batch = 300, 50, 64
    parts = least_seconds(
        costs,
        Work(
            rows=batch,
            prefill_tokens=batch * prompt,
            prefill_pairs=batch * prompt**2,
            decode_tokens=batch * (out - 1),
            decode_context=batch * sum(prompt + step for step in range(1, out)),
        ),
        batch,
    )
    contexts = [batch * (prompt + step) for step in range(1, out)]
    assert parts.prefill == pytest.approx(batch * costs.prefill(prompt, prompt**2, 1))
    assert parts.kv == pytest.approx(sum(costs.kv(batch, context) for context in contexts))
    assert parts.weights == pytest.approx(len(contexts) * costs.weights(batch))
    assert parts.lm_head == pytest.approx(len(contexts) * costs.logits(batch))
    assert parts.seconds == pytest.approx(sum(parts))


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3", "qwen3_moe", "mixtral", "gemma2"])
def test_costs_count_every_weight(family: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / family, family)
    costs = Costs.of(ModelConfig.from_dir(path, ARCHITECTURES))
    sizes = {name: tensor.numel() for name, tensor in load_file(path / "model.safetensors").items() if tensor.dim() > 1}
    counted = {name: size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name}
    assert costs.parameters + costs.expert_parameters == sum(counted.values())
    experts = sum(size for name, size in counted.items() if ".experts." in name)
    assert costs.expert_parameters == experts
    assert (experts > 0) is (family in ("qwen3_moe", "mixtral"))
    assert costs.lm_head == sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"])


def test_experts_and_windows_cost_less(tmp_path: Path) -> None:
    sparse = Costs.of(ModelConfig.from_dir(make_model(tmp_path / "sparse", "qwen3_moe"), ARCHITECTURES))
    all_experts = (sparse.parameters + sparse.expert_parameters) * sparse.weight_bytes / sparse.bandwidth
    few = sparse.parameters + sparse.expert_parameters * sparse.expert_part
    assert sparse.weights(1) == pytest.approx(few * sparse.weight_bytes / sparse.bandwidth)
    assert sparse.weights(1) < sparse.weights(4) < all_experts
    assert sparse.weights(300) == pytest.approx(all_experts)
    plain = Costs.of(ModelConfig.from_dir(make_model(tmp_path / "plain", "gemma2"), ARCHITECTURES))
    window = max(window for window, _ in plain.windows)
    assert window > 0
    full = replace(plain, windows=((0, sum(layers for _, layers in plain.windows)),))
    short, long = window // 2, 100 * window
    assert plain.kv(8, 8 * short) == full.kv(8, 8 * short)
    half = (full.kv(8, 8 * long) + full.kv(8, 8 * window)) / 2  # one layer in two has the window
    assert plain.kv(8, 8 * long) == pytest.approx(half)
    assert plain.prefill(long, long**2, 1) < full.prefill(long, long**2, 1)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("", None),
    ],
)
def test_devices_by_their_drivers_names(name: str, known: str | None) -> None:
    found = find_device(name)
    assert (found and found.name) == known


def test_cost_by_hand() -> None:
    counts = Counts(rows=1000, samples=1000, input_tokens=3_000_000, generated_tokens=1_000_000)
    usage = Usage(
        actors=2, processes=2, actor_seconds=1800, gpu_seconds=7200, loading_seconds=90, gpu_loading_seconds=360
    )
    found = cost(usage, counts, "NVIDIA H200")
    assert (found["unit"], found["hours"], found["loading_hours"], found["engine_hours"]) == ("GPU", 2.0, 0.1, 0.5)
    assert found["output_tokens_per_second"] == pytest.approx(1_000_000 / 7200, rel=1e-4)
    assert found["tokens_per_second"] == pytest.approx(4_000_000 / 7200, rel=1e-4)
    assert found["hours_per_million_output_tokens"] == 2.0
    assert found["hours_per_million_rows"] == 2000.0
    on_cpus = cost(usage._replace(gpu_seconds=0.0), counts, "")
    assert (on_cpus["unit"], on_cpus["hours"]) == ("engine", 0.5)
    assert cost(Usage(), Counts(), "")["output_tokens_per_second"] is None


def test_an_engine_at_its_limit_reaches_all_of_it(tmp_path: Path) -> None:
    """The least time of all rows, held by two actors, is a fraction of 1; twice that of a half; copies are no work."""
    model = make_model(tmp_path / "model")
    costs = Costs.of(ModelConfig.from_dir(model, ARCHITECTURES))
    rows, prompt, out = 512, 300, 50
    lengths = [0] * 24
    lengths[6] = rows
    counts = Counts(
        rows=rows,
        samples=rows,
        input_tokens=rows * prompt,
        generated_tokens=rows * out,
        generated_lengths=lengths,
        prompt_pairs=rows * prompt**2,
        decode_context=rows * sum(prompt + step for step in range(1, out)),
    )
    engine = {"max_num_seqs": 64, "tensor_parallel_size": 1, "dtype": "auto"}
    config = {"model": str(model), "engine": engine}
    work = Work(rows, rows * prompt, counts.prompt_pairs, rows * (out - 1), counts.decode_context)
    least = least_seconds(costs, work, 64).seconds
    usage = Usage(
        actors=2,
        gpu_seconds=2 * least,
        gpu_loading_seconds=least,
        input_tokens=rows * prompt,
        generated_tokens=rows * out,
    )
    found = roofline(usage, counts, "NVIDIA H200", config)
    assert (found["known"], found["device"], found["bandwidth"], found["batch"]) == (True, "H200", H200.bandwidth, 64)
    assert found["fraction"] == pytest.approx(0.5, rel=1e-3)
    assert found["fraction_loaded"] == pytest.approx(1.0, rel=1e-3)
    copied = roofline(usage._replace(generated_tokens=rows * out // 2), counts, "NVIDIA H200", config)
    assert copied["fraction"] == pytest.approx(0.25, rel=1e-3)
    wasted = roofline(usage._replace(generated_tokens=rows * out * 2), counts, "NVIDIA H200", config)
    assert wasted["fraction"] == pytest.approx(0.5, rel=1e-3)
    cached = roofline(usage._replace(cached_tokens=rows * prompt // 2), counts, "NVIDIA H200", config)
    assert cached["parts"]["prefill"] <= found["parts"]["prefill"]
    assert cached["fraction"] < found["fraction"]
    assert "'NVIDIA T400' are not known" in roofline(usage, counts, "NVIDIA T400", config)["reason"]
    gone = {**config, "model": str(tmp_path / "gone")}
    assert "does not exist" in roofline(usage, counts, "NVIDIA H200", gone)["reason"]
    assert "CPUs" in roofline(Usage(actor_seconds=1.0), counts, "", config)["reason"]


def test_the_whole_report_of_many_actors(tmp_path: Path) -> None:
    report = job(tmp_path, make_model(tmp_path / "model"))
    assert len(report["starts"]) == 3
    assert report["events"] == [
        {"start": number, **event} for number, start in enumerate(report["starts"]) for event in start["events"]
    ]
    assert report["cost"]["gpu_hours"] == pytest.approx(
        sum(start["usage"]["gpu_seconds"] for start in report["starts"]) / 3600, abs=1e-5
    )
    assert report["roofline"]["known"]
    assert len(report["this_start"]["actors"]) == 24


def test_numbers_on_axes() -> None:
    assert [number(value) for value in (0, 0.25, 7, 950, 1200, 12_345, 3.4e6, 2e9)] == [
        "0",
        "0.25",
        "7",
        "950",
        "1,200",
        "12.3k",
        "3.4M",
        "2G",
    ]
    assert [duration(value) for value in (0, 59, 90, 120, 7260, 90_000)] == ["0s", "59s", "1m30", "2m", "2h1m", "1d1h"]
