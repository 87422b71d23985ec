"""Benchmarks of scaling: their arithmetic, what a user sees of them, and that all parts run on CPUs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "bench"))  # the scripts import each other by their bare names

common = importlib.import_module("common")
scaling = importlib.import_module("scaling")
tail = importlib.import_module("tail")
tensor_parallel = importlib.import_module("tensor_parallel")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "bench" / "scaling.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def names(host, *arguments, done=None):
    empty = {part: [] for part in scaling.PARTS} | (done or {})
    plan = scaling.pieces(scaling.parse_args(arguments), scaling.Host("cuda", host), empty)
    return [f"{piece.part} {piece.name}" for piece in plan]


@pytest.fixture(scope="module")
def measured():
    """Rows as the three parts make them, with one GPU, two and four."""
    result = {"device": "cuda", "quick": False, "counts": (1, 2, 4), "missing": {"tp qwen3-8b tp8": "it took too long"}}
    result["dp"] = [
        {"piece": f"a x{n}", "load": "a", "gpus": n, "grid": f"{n}x1", "job_tok_s": rate, "job_whole_tok_s": rate / 2}
        for n, rate in ((1, 1000.0), (4, 3600.0), (2, 1980.0))
    ]
    sums = {2: {"ranks": 2, "tokens": 64, "norm": 2.0, "nccl": 11.0, "fused": 5.0}, 4: {"ranks": 4, "tokens": 64}}
    sums[4] |= {"norm": 2.0, "nccl": 14.0}
    result["tp"] = []
    for size, ms in ((2, 10.0), (4, 6.0)):
        decode = {f"tp{size}": {"step_ms": {"64": ms}}, f"tp{size}_nccl": {"step_ms": {"64": ms + 2}}}
        one = {"decode": decode, "sum": {"us_per_call": [sums[size]]}}
        result["tp"] += scaling.rows_of_tp("llama-70b", size, [64], one)
    skipped = {"decode": {"skipped": {"tp1": "141 GB of weights"}}, "sum": {"us_per_call": []}}
    result["tp"] += scaling.rows_of_tp("llama-70b", 1, [64], skipped)
    result["grid"] = [
        {"grid": grid, "gpus": 4, "job_tok_s": rate} for grid, rate in (("4x1", 100.0), ("2x2", 90.0), ("1x4", 60.0))
    ]
    scaling.with_efficiency(result)
    return result


def test_efficiency_is_of_one_gpu_or_of_the_fewest_that_hold_the_model(measured):
    assert [row["efficiency"] for row in measured["dp"]] == [1.0, 0.9, 0.99]
    two, four, one = measured["tp"]
    assert (two["efficiency"], four["speedup"], four["of_gpus"]) == (1.0, 1.667, 2)
    assert four["efficiency"] == pytest.approx(10 / 6 / 2, abs=1e-4)
    assert (one["skipped"], "efficiency" in one) == ("141 GB of weights", False)
    assert [row["of_best"] for row in measured["grid"]] == [1.0, 0.9, 0.6]


def test_sums_of_a_step_are_two_a_layer_and_the_embeddings(measured):
    two, four, _ = measured["tp"]
    assert (two["sums"], two["sum_way"], four["sum_way"]) == (161, "fused", "nccl")
    assert two["sums_part"] == pytest.approx((160 * 5 + 9) / 10_000, abs=1e-4)
    assert two["added_part"] == pytest.approx((160 * 3 + 9) / 10_000, abs=1e-4)
    assert four["sums_part"] == pytest.approx((160 * 14 + 12) / 6_000, abs=1e-4)
    # 1,024 tokens of 8 ranks are more than the engine sums in one kernel.
    large = {"ranks": 8, "tokens": 1024, "norm": 2.0, "nccl": 50.0, "fused": 90.0}
    assert scaling.sums_of_step(common.SHAPES["llama-70b"], large, 20.0)["sum_way"] == "nccl"


def test_table_and_plot_say_what_was_found(measured):
    table = scaling.tables(measured)
    assert "- below 97%: dp a x4, 90.0%" in table
    assert "a x2" not in table.split("- below")[1]
    assert "- missing: tp qwen3-8b tp8 (it took too long)" in table
    lines = scaling.curves(measured)
    assert lines == {"dp a": [(1, 1.0), (2, 0.99), (4, 0.9)], "tp llama-70b, 64 rows": [(2, 1.0), (4, 0.8333)]}
    image = ElementTree.fromstring(scaling.plot(lines, "Efficiency & <more>"))
    texts = [element.text for element in image.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Efficiency & <more>", "100%", "4", "dp a: 1: 100.0%, 2: 99.0%, 4: 90.0%"} <= set(texts)
    assert len(list(image.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    assert ElementTree.fromstring(scaling.plot({}, "nothing yet")) is not None


def test_pieces_of_a_host():
    plan = names((1, 2, 4))
    assert {"dp labelling qwen3-8b x4", "tp llama-70b tp4", "grid seed qwen3-8b 2x2"} < set(plan)
    assert len(plan) == len(set(plan)) == 4 * 3 + 2 * 3 + 2 + 3
    assert names((1, 2, 3), "--parts", "tp") == [f"tp {m} tp{n}" for m in ("qwen3-8b", "llama-70b") for n in (1, 2)]
    assert names((1, 2, 4), "--quick", "--parts", "grid") == [f"grid seed qwen3-8b {g}" for g in ("4x1", "2x2", "1x4")]
    done = {"tp": [{"piece": "qwen3-8b tp2"}]}
    assert names((2,), "--parts", "tp", done=done) == ["tp llama-70b tp2"]


def test_a_group_that_the_weights_do_not_fit_is_said():
    assert tensor_parallel.lacks_room("llama-70b", 1, 150e9).startswith("141 GB of weights a device")
    assert tensor_parallel.lacks_room("llama-70b", 2, 150e9) is None


def test_two_ranks_are_measured_then_the_rest_fails(tmp_path):
    """Decode steps and sums on CPUs; a second start keeps them, names what takes too long, and goes on after it."""
    saved = tmp_path / "scaling"
    options = ("--quick", "--gpus", 1, 2, "--save", saved)
    done = run(*options, "--only", "tp2")
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads(saved.with_suffix(".json").read_text())
    (ranks,) = first["tp"]
    assert (ranks["gpus"], ranks["batch"], ranks["sums"], ranks["sum_way"]) == (2, 2, 17, "gloo")
    assert ranks["sum_us"] > 0
    done = run(*options, "--resume", "--timeout", 0.01)
    assert done.returncode == 1, done.stderr
    second = json.loads(saved.with_suffix(".json").read_text())
    assert [second[part] for part in scaling.PARTS] == [first[part] for part in scaling.PARTS]
    jobs = {"dp seed qwen3-42m x1": 1, "dp seed qwen3-42m x2": 2}
    jobs |= {f"grid seed qwen3-42m {grid}": 2 for grid in ("2x1", "1x2")}
    late = {name: f"the job over {count} ended with a time-out" for name, count in jobs.items()}
    assert second["missing"] == {"tp qwen3-42m tp1": "it took too long"} | late
    assert "- missing: tp qwen3-42m tp1 (it took too long)" in saved.with_suffix(".md").read_text()
    assert ElementTree.parse(saved.with_suffix(".svg")).getroot().tag.endswith("svg")


@pytest.mark.long  # jobs of two engines: the test above has the ranks and every way out, those of jobs have a job
def test_all_parts_run_on_cpus(tmp_path):
    saved = tmp_path / "scaling"
    done = run("--gpus", 1, 2, "--save", saved)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(saved.with_suffix(".json").read_text())
    assert sorted((row["load"].split()[0], row["gpus"]) for row in result["dp"]) == [
        (load, count) for load in ("labelling", "seed") for count in (1, 2)
    ]
    assert all(row["bare_tok_s"] > 0 and row["efficiency"] > 0 for row in result["dp"])
    assert [row["gpus"] for row in result["tp"]] == [1, 2]
    assert [row["grid"] for row in result["grid"]] == ["2x1", "1x2"]
    assert all(row["rows"] == 32 for row in result["grid"])
    with_two = next(row for row in result["dp"] if (row["load"], row["gpus"]) == ("seed qwen3-42m", 2))
    assert result["grid"][0]["job_tok_s"] == with_two["job_tok_s"]  # not measured twice
    assert not result["missing"]


# The tail


@pytest.mark.parametrize("engines", [1, 2, 8])
def test_the_tail_in_events_is_that_of_the_pipeline(engines):
    """Against the figures that `pipeline.py` measured with a Ray and engines that wait."""
    case = tail.CASES["short"]
    shards = tail.shards_of(case, engines)
    jobs = json.loads((common.RESULTS / "pipeline_cpu.json").read_text())["full"]
    job = next(row for row in jobs if row["actors"] == engines)
    assert (len(shards), sum(shards)) == (job["shards"], job["rows"])
    assert tail.simulate(shards, engines, case, 0.0)["of_ideal"] == pytest.approx(job["of_ideal"], abs=0.04)


def test_slower_engines_get_less_and_the_tail_grows_little():
    case = tail.CASES["short"]
    shards = tail.shards_of(case, 8)
    alike, apart = (tail.simulate(shards, 8, case, spread) for spread in (0.0, 0.1))
    assert alike["ideal_steps"] == pytest.approx(apart["ideal_steps"], rel=0.03)  # lengths are drawn in another order
    assert apart["of_ideal"] < alike["of_ideal"] + 0.1  # a fixed share each would add 0.11
