"""The benchmarks themselves: their arithmetic, workloads and tables, and that the scripts run on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "bench"
sys.path.append(str(BENCH))  # the scripts import each other by their bare names

common = importlib.import_module("common")
data_parallel = importlib.import_module("data_parallel")
peers = importlib.import_module("peers")
roofline = importlib.import_module("roofline")
run_all = importlib.import_module("run_all")
trace_summary = importlib.import_module("trace_summary")

TINY = ["--model", "qwen3-42m", "--num-seqs", "4", "--input-len", "8", "16", "--output-len", "4", "8", "--runs", "1"]


def script(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def limit(name: str, **options):
    spec = common.WORKLOADS[name]
    model = roofline.load_config(spec.model)
    work = spec.make(model.vocab_size)
    return roofline.roofline(model, work, **options), work


# Workloads


def test_seed_workload_is_the_one_of_nano_vllm():
    work = common.WORKLOADS["seed"].make(151936)
    assert (len(work.prompts), sum(map(len, work.prompts)), sum(work.max_tokens)) == (256, 142827, 133966)
    assert work.prefix_len == 0
    assert work.prompts == common.make_workload(256, (100, 1024), (100, 1024), 151936).prompts


def test_8b_workload_has_the_same_law_of_lengths():
    work = common.WORKLOADS["8b"].make(151936)
    assert (len(work.prompts), sum(map(len, work.prompts)), sum(work.max_tokens)) == (1024, 580663, 583802)


def test_labelling_rows_share_their_instruction_within_a_run_and_not_between_runs():
    work = common.WORKLOADS["labelling"].make(151936)
    assert len(work.prompts) == 4096
    assert {tuple(prompt[:1024]) for prompt in work.prompts} == {tuple(work.prompts[0][:1024])}
    assert {len(prompt) - 1024 for prompt in work.prompts} == set(range(64, 257))
    assert set(work.max_tokens) == set(range(1, 33))
    assert len({tuple(prompt[1024:]) for prompt in work.prompts}) == 4096
    for run in range(2):
        assert len({tuple(prompt[:1024]) for prompt in work.for_run(run)}) == 1
    first, second = work.for_run(0), work.for_run(1)
    assert all(a[0] != b[0] and a[1:] == b[1:] for a, b in zip(first, second, strict=True))


def test_another_process_makes_the_same_tokens_from_the_numbers():
    spec = common.WORKLOADS["labelling"]._replace(num_seqs=5)
    again = common.WorkloadSpec(**json.loads(json.dumps(spec._asdict())))
    assert again.make(32000).digest() == spec.make(32000).digest()
    assert again._replace(seed=1).make(32000).digest() != spec.make(32000).digest()


# Roofline


def test_roofline_of_the_seed_workload():
    result, work = limit("seed", max_num_seqs=256)
    assert result.seconds == pytest.approx(3.709, abs=5e-4)
    assert sum(work.max_tokens) / result.seconds == pytest.approx(36117, abs=1)
    assert result[:4] == pytest.approx((0.1736, 0.2254, 3.2254, 0.0849), abs=1e-4)  # prefill, weights, kv, lm_head
    assert result.steps == 1023
    assert "roofline_seconds_prefix_once" not in result.as_dict()
    assert result.as_dict(7.4184)["roofline_fraction"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [({"kv_bytes": 1}, 2.097), ({"kv_bytes": 1, "weight_bytes": 1, "linear_flops": 1400e12}, 1.920)],
)
def test_roofline_in_eight_bits(options, seconds):
    assert limit("seed", **options)[0].seconds == pytest.approx(seconds, abs=5e-4)


def test_roofline_of_the_8b_workload():
    assert limit("8b")[0].seconds == pytest.approx(40.191, abs=5e-4)


def test_roofline_of_experts():
    """A token reads and computes the experts it takes; many tokens read nearly all of them, and compute no more each."""
    model = roofline.load_config("qwen3-30b-a3b")
    dense = replace(model, layers=tuple(layer._replace(sparse=False) for layer in model.layers), moe=None)
    router = 48 * 128 * 2048
    lm_head = model.vocab_size * 2048
    one = common.Workload([[1]], [2])
    expert = 3 * 2048 * 768
    attention = 48 * (2048 * (4096 + 1024) + 4096 * 2048)
    alone = roofline.roofline(model, one, weight_bytes=1, bandwidth=1.0, flops=1e30)
    assert alone.lm_head == pytest.approx(2 * lm_head + 2 * model.vocab_size)  # it stays as it is
    assert alone.weights == pytest.approx(attention + router + 48 * 8 * expert, rel=1e-9)
    assert alone.prefill * 1e30 == pytest.approx(2 * (alone.weights + lm_head + 4096 * 48), rel=1e-9)
    many = roofline.roofline(
        model, common.Workload([[1]] * 1000, [2] * 1000), weight_bytes=1, bandwidth=1.0, flops=1e30
    )
    assert many.weights == pytest.approx(attention + router + 48 * 128 * expert, rel=1e-6)
    # Eight experts of 768 features are the dense layer's 6,144.
    assert roofline.roofline(dense, one, weight_bytes=1, bandwidth=1.0).weights == alone.weights - router


def test_two_devices_take_half_as_long_unless_they_copy_kv_heads():
    one, two, many = (limit("seed", tp=tp)[0] for tp in (1, 2, 16))
    assert two.seconds == pytest.approx(one.seconds / 2)
    assert many.kv == pytest.approx(one.kv / 8)


def test_a_cap_adds_steps_and_no_reads_of_the_cache():
    free, capped = limit("seed")[0], limit("seed", max_num_seqs=64)[0]
    assert capped.kv == pytest.approx(free.kv)
    assert capped.steps >= (133966 - 256) / 64
    assert capped.weights > free.weights


def test_a_shared_prefix_is_computed_once():
    shared, work = limit("labelling")
    model = roofline.load_config("qwen3-0.6b")
    apart = roofline.roofline(model, work._replace(prefix_len=0))
    assert shared.prefill < apart.prefill / 4
    assert shared.kv == pytest.approx(apart.kv)
    assert shared.kv_prefix_once < shared.kv / 4
    assert shared.seconds_prefix_once < shared.seconds < apart.seconds
    assert shared.as_dict(10.0)["roofline_fraction_prefix_once"] == pytest.approx(
        shared.seconds_prefix_once / 10, abs=1e-4
    )


def test_decode_steps_by_hand():
    # Two at once, longest outputs first: (3 + 3 tokens), then the prompt of 5 joins as the one of 2 ends.
    assert list(roofline.decode_steps([5, 2, 4, 9], [2, 3, 3, 1], 2)) == [(2, 8), (2, 10), (1, 6)]
    assert list(roofline.decode_steps([5, 2], [2, 3], None)) == [(2, 9), (1, 4)]


def test_roofline_script_prints_json():
    done = script("bench/roofline.py", "--workload", "labelling", "--num-seqs", "16", "--tp", "2")
    assert json.loads(done.stdout)["roofline"]["kv_prefix_once"] > 0, done.stderr


# Traces


def event(cat: str, name: str, ts: float, dur: float) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_trace_summary():
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "ProfilerStep#7", 100, 50),
        event("user_annotation", "ProfilerStep#8", 150, 50),
        event("gpu_user_annotation", "ProfilerStep#8", 0, 500),
        event("cuda_runtime", "cudaGraphLaunch", 100, 4),
        event("cuda_runtime", "cudaLaunchKernel", 110, 6),
        event("cpu_op", "aten::mm", 100, 90),
        event("kernel", "_decode_kernel", 90, 30),  # 20 inside the window
        event("kernel", "nvjet_tst_64x8", 110, 30),  # overlaps by 10
        event("kernel", "flash::FlashAttnFwdSm90<cutlass::gemm>", 150, 10),
        event("kernel", "rms_norm_kernel", 160, 10),
        event("gpu_memcpy", "Memcpy DtoH", 180, 5),
        event("kernel", "_sample_kernel", 195, 50),  # 5 inside the window
        event("kernel", "elementwise", 300, 10),  # outside
    ]
    summary = trace_summary.summarize(events, top=2)
    assert summary["wall_s"] == pytest.approx(100e-6)
    assert summary["steps"] == 2
    assert summary["gpu_busy_fraction"] == pytest.approx(0.7)  # 100-140, 150-170, 180-185, 195-200
    assert summary["seconds_by_family"] == {
        "attention": 30e-6,
        "gemm": 30e-6,
        "norm/rope/act": 10e-6,
        "memcpy": 5e-6,
        "sampling": 5e-6,
    }
    assert summary["gaps"] == {"count": 3, "seconds": 30e-6, "median_us": 10, "longest_us": 10}
    assert summary["launches"] == {"count": 2, "cpu_seconds": 10e-6}
    assert summary["top_kernels"] == [
        {"name": "nvjet_tst_64x8", "family": "gemm", "count": 1, "seconds": 30e-6},
        {"name": "_decode_kernel", "family": "attention", "count": 1, "seconds": 20e-6},
    ]


def test_trace_without_gpu_work_or_marks():
    assert trace_summary.summarize([])["gpu_busy_fraction"] == 0
    alone = trace_summary.summarize([event("kernel", "mystery", 5, 10), event("kernel", "mystery", 25, 10)])
    assert alone["gpu_busy_fraction"] == pytest.approx(20 / 30, abs=1e-4)
    assert alone["seconds_by_family"] == {"other": 20e-6}


# Tables and plans


def test_table_is_made_from_the_files_alone(tmp_path):
    where = {"machine": {"gpu": "H200"}, "versions": {"torch": "2.11"}, "commit": "abc", "date": "2026-01-01"}
    side = {"output_tokens_per_s": 100.0, "rows_per_s": 2.0, "version": "0.24.0", "roofline_fraction": 0.83}
    results = {
        "throughput": {"benchmark": "throughput", "model": "m", "workload": "seed", "num_seqs": 256, **side},
        "peers": {"benchmark": "peers", "model": "m", "peer_name": "vllm", "ratio": 1.5, "ours": side, "peer": side},
        "limit": {"benchmark": "roofline", "bandwidth_tb_s": 4.3, "tflops": 790, "output_tokens_per_s": 36117},
        "kernels": {"benchmark": "kernels", "decode": [{"batch": 8, "ms": 1.5}, {"batch": 16, "ms": 2, "gb": 3}]},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result | where))
    table = run_all.make_table(tmp_path)
    assert "| throughput | m | seed 256 | 100.0 | 2.0 | 83.0% |  | H200 | 2.11 | abc 2026-01-01 |" in table
    assert "| 1.5x vllm 0.24.0 (100.0) | H200 |" in table
    assert "| limit |  |  | 36117 |  | limit |  | 4.3 TB/s, 790 TFLOP/s |" in table
    assert "| batch | ms | gb |\n| --- | --- | --- |\n| 8 | 1.5 |  |\n| 16 | 2 | 3 |\n" in table


def test_table_of_the_committed_results():
    assert run_all.make_table(common.RESULTS).startswith("# Results")


@pytest.mark.parametrize("gpu", [True, False])
def test_plan_names_scripts_that_exist_and_each_result_once(gpu):
    steps = run_all.plan(gpu, ["--peer-path", "site"])
    assert all((BENCH / step.script).is_file() for step in steps)
    assert len({step.name for step in steps}) == len(steps)
    assert all(("qwen3-42m" in step.arguments) != gpu for step in steps if step.script in ("throughput.py", "peers.py"))


# Data parallel


def test_ratios_to_one_gpu_and_to_bare_engines():
    def run(steady_s, whole_s):
        return data_parallel.best(
            [
                {"steady_s": steady_s + slower, "whole_s": whole_s, "output_tokens": 1_000_000, "rows": 10}
                for slower in (1, 0)
            ]
        )

    one = data_parallel.row_of(1, run(100, 120), run(96, 110), [])
    two = data_parallel.row_of(2, run(51, 70), run(48, 62), [one])
    assert (one["job_scaling"], one["of_bare"]) == (1.0, 0.96)
    assert (two["job_scaling"], two["bare_scaling"], two["job_whole_scaling"]) == (1.961, 2.0, 1.714)
    assert two["of_bare"] == pytest.approx(48 / 51, abs=1e-3)
    assert "1.961x one (target 1.95x)" in data_parallel.line_of(two)
    assert data_parallel.row_of(2, run(51, 70), run(48, 62), [])["job_scaling"] is None


def test_each_bare_engine_sees_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [data_parallel.visible(1, number)["CUDA_VISIBLE_DEVICES"] for number in range(2)] == ["0", "1"]
    assert data_parallel.visible(2)["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [data_parallel.visible(1, number)["CUDA_VISIBLE_DEVICES"] for number in range(2)] == ["4", "7"]


# Scripts


@pytest.mark.long  # the pipeline around an engine: every test of a job
def test_data_parallel_runs_on_cpus():
    name = f"test_data_parallel_{os.getpid()}"
    saved = common.RESULTS / f"{name}.json"
    size = ["--model", "qwen3-42m", "--num-seqs", "32", "--input-len", "4", "8", "--output-len", "4", "8"]
    more = ["--device", "cpu", "--gpus", "1", "2", "--set", "run.shard_rows=8", "--set", "engine.num_kvcache_blocks=64"]
    try:
        done = script("bench/data_parallel.py", *size, *more, "--save", name)
        assert done.returncode == 0, done.stderr
        result = json.loads(saved.read_text())
    finally:
        saved.unlink(missing_ok=True)
    assert [row["gpus"] for row in result["runs"]] == [1, 2]
    for count in (1, 2):
        for way in ("job", "bare"):
            run = result[f"on_{count}"][way]
            assert (run["rows"], run["output_tokens"]) == (32, result["output_tokens"])
            assert sum(run["engine_tokens"]) == result["output_tokens"]
            assert len(run["engine_tokens"]) == count
            assert all(run["engine_tokens"])  # the engine that is ready first leaves the other its share


def test_throughput_runs(tmp_path):
    done = script("bench/throughput.py", *TINY, "--option", "max_num_seqs=2", "--profile", tmp_path / "profile.json")
    assert done.returncode == 0, done.stderr
    assert "output tok/s" in done.stdout
    assert json.loads((tmp_path / "profile.json").read_text())["steps"] > 0


@pytest.mark.long  # what adapters are, `test_lora.py` tests
def test_lora_runs(tmp_path):
    saved = tmp_path / "lora"
    done = script("bench/lora.py", *TINY, "--adapters", "3", "--rank", "4", "8", "--save", saved)
    assert done.returncode == 0, done.stderr
    result = json.loads(saved.with_suffix(".json").read_text())
    assert result["share"] == pytest.approx(result["output_tokens_per_s"] / result["base_tokens_per_s"], abs=1e-3)
    assert [len(times) for times in result["seconds"].values()] == [1, 1, 1]


FAKE_VLLM = """
import os
from types import SimpleNamespace as SamplingParams

__version__ = os.environ["PEER_VERSION"]

class LLM:
    def __init__(self, **options):
        assert os.path.isfile(options["model"] + "/config.json")
        assert options["load_format"] == "dummy" and options["skip_tokenizer_init"]
        assert options["attention_config"] == {"backend": "TRITON_ATTN"} and options["block_size"] == 32
        assert options["enable_prefix_caching"] is False

    def generate(self, requests, params, use_tqdm):
        assert all(p.ignore_eos and not p.detokenize for p in params)
        assert all(len(request["prompt_token_ids"]) for request in requests)
        return [SamplingParams(outputs=[SamplingParams(token_ids=[0] * p.max_tokens)]) for p in params]
"""


def test_peers_take_turns(tmp_path):
    """The peer is a module found through --peer-path alone, whose environment and options are its own."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    peer = ["--peer-path", tmp_path, "--env", "PEER_VERSION=9.9", "--backend", "TRITON_ATTN"]
    peer += ["--peer-option", "block_size=32"]
    name = f"test_peers_{os.getpid()}"
    saved = common.RESULTS / f"{name}.json"
    try:
        done = script("bench/peers.py", *peer, *TINY, "--rounds", "1", "--save", name)
        assert done.returncode == 0, done.stderr
        result = json.loads(saved.read_text())
    finally:
        saved.unlink(missing_ok=True)
    assert "round 1: ours" in done.stdout
    assert result["peer"]["version"] == "9.9"
    assert result["ours"]["version"] != "9.9"
    assert len(result["ratios"]) == 1
    assert result["ours"]["output_tokens_per_s"] > 0


def test_a_peer_that_does_not_import_is_one_line_and_status_2():
    done = script("bench/peers.py", "--module", "no_such_engine", *TINY)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no_such_engine cannot be imported" in done.stderr


def test_a_late_process_is_ended_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    grandchild = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert common.run_process([sys.executable, "-c", child], timeout=2) == common.TIMED_OUT
    deadline = time.monotonic() + 10
    pid = int(pid_file.read_text())
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
