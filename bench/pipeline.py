"""What the pipeline costs around an engine: how full it keeps it, and what a shard costs the driver.

`full`: a simulated engine of fixed step time and heavy-tailed output lengths, a whole job of many shards an actor; slot use and
makespan beside the same engines given all their rows at once. `demo`: the same with the real engine and the demo model on CPUs.
`rows`: the labelling workload on real engines whose device is simulated: a step takes as long as its tokens do. What a row costs each
thread of the actor, and the steps made, beside `LLM.generate`.
`driver`: engines that answer at once, so that the control plane is all there is. `start`: the same with plans of many shards, only the
first of which are run.
Every case is a process of its own, with a Ray of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import unittest.mock
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, SHAPES, WORKLOADS, Workload, end_on_sigterm, run_process, save, write_shape
from data_parallel import write_rows

from nanovllm import SamplingParams
from nanovllm.engine.stats import EngineStats
from nanovllm.outputs import RequestOutput
from pipelines.stop import Stopped

DEMO = ROOT / "pipelines" / "demo"
DRIVER_ROWS = 1000  # of a shard where the driver's cost is measured
BARRIER_S = 300.0
STEP_S = 0.002  # of a simulated device, beside what its tokens take
LAUNCHES = 300  # of a step's kernels


def row_steps(prompt: str) -> int:
    """Output tokens of a row: nine in ten have 10 to 50, one in ten 150 to 350."""
    rng = random.Random(prompt)
    return rng.randint(150, 350) if rng.random() < 0.1 else rng.randint(10, 50)


def instant(prompt: str) -> int:
    """A row that is done at once."""
    return 0


class SimulatedEngine:
    """Slots that a row holds for some steps of equal length, in a thread of its own; first come, first served.

    Whenever it runs empty it leaves `<pid>.json` in `records`: when the first row came and the last one went (seconds of the
    machine's clock), and the steps that its slots were busy for.
    """

    max_prompt_len = 1 << 20

    def __init__(
        self,
        model: str,
        *,
        records: Path,
        engines: int,
        step_s: float,
        steps_of: Callable[[str], int],
        max_num_seqs: int,
        **options: Any,
    ) -> None:
        self._record = records / f"{os.getpid()}.json"
        self._slots = max_num_seqs
        self._step_s = step_s
        self._steps_of = steps_of
        self._waiting: deque[tuple[int, Future[RequestOutput]]] = deque()
        self._running: list[tuple[int, int, Future[RequestOutput]]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._first = 0.0
        self._steps = self._busy_steps = self._rows = 0
        # All engines begin together, as those of a job on equal machines do.
        (records / f"{os.getpid()}.ready").touch()
        deadline = time.monotonic() + BARRIER_S
        while len(list(records.glob("*.ready"))) < engines and time.monotonic() < deadline:
            time.sleep(0.05)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    tokenizer = None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        return [self.encode(text) for text in texts]

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        """Start one row."""
        assert isinstance(prompt, str)
        future: Future[RequestOutput] = Future()
        steps = self._steps_of(prompt)
        with self._wake:
            self._first = self._first or time.monotonic()
            if steps == 0:
                self._rows += 1
                future.set_result(_output(0))
                return future
            self._waiting.append((steps, future))
            self._wake.notify()
        return future

    def stats(self) -> EngineStats:
        """Counters and state."""
        return EngineStats(len(self._running), len(self._waiting), self._steps, 0, self._busy_steps, 0, 0, 0.0)

    def shutdown(self) -> None:
        """End the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        next_step = 0.0
        while True:
            with self._wake:
                while not self._waiting and not self._running and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                while self._waiting and len(self._running) < self._slots:
                    steps, future = self._waiting.popleft()
                    self._running.append((self._steps + steps, steps, future))
            now = time.monotonic()
            next_step = max(now, next_step + self._step_s) if next_step > now - self._step_s else now + self._step_s
            time.sleep(max(0.0, next_step - now))
            self._steps += 1
            self._busy_steps += len(self._running)
            finished = [row for row in self._running if row[0] <= self._steps]
            self._running = [row for row in self._running if row[0] > self._steps]
            self._rows += len(finished)
            if finished and not self._running and not self._waiting:
                self._save()
            for _, steps, future in finished:
                future.set_result(_output(steps))

    def _save(self) -> None:
        record = {
            "first": self._first,
            "last": time.monotonic(),
            "rows": self._rows,
            "steps": self._steps,
            "busy_steps": self._busy_steps,
        }
        scratch = self._record.with_suffix(".new")
        scratch.write_text(json.dumps(record))
        scratch.replace(self._record)


def _output(steps: int) -> RequestOutput:
    return RequestOutput(
        text="",
        token_ids=[],
        finish_reason="length",
        num_input_tokens=0,
        num_generated_tokens=steps,
        num_cached_tokens=0,
        logprobs=None,
        error=None,
    )


# The cases: each runs in a process of its own and leaves its result as JSON


def write_prompts(directory: Path, rows: int) -> Path:
    """A Parquet file of short prompts, all different."""
    directory.mkdir(parents=True)
    pq.write_table(pa.table({"prompt": [f"row {row}" for row in range(rows)]}), directory / "prompts.parquet")
    return directory


def run_pipeline(directory: Path, settings: dict[str, Any], engine: Callable[..., Any] | None) -> int:
    """A job from its check to its end; the number of its shards."""
    from pipelines.commit import OutputDirectory
    from pipelines.generate import check, run_job
    from pipelines.job import build

    config = build({"model": "none", "output": str(directory / "out"), **settings})
    output = OutputDirectory(config.output)
    job = check(config, output)
    run_job(job, output, engine)
    return len(job.shards)


def case_full(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A job of simulated engines."""
    records = directory / "records"
    records.mkdir()
    options = {"records": records, "engines": case["actors"], "step_s": case["step_s"], "steps_of": row_steps}
    rows = case["actors"] * case["shards"] * case["shard_rows"]
    settings = {
        "input": str(write_prompts(directory / "in", rows)),
        "engine": {"device": "cpu", "max_num_seqs": case["slots"]},
        "run": {"replicas": case["actors"], "shard_rows": case["shard_rows"]},
    }
    shards = run_pipeline(directory, settings, functools.partial(SimulatedEngine, **options))
    return {"rows": rows, "shards_planned": shards, **summary(records, case)}


def case_bare(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The same rows, dealt out to as many engines, each with all of its own from the start."""
    import multiprocessing

    records = directory / "records"
    records.mkdir()
    rows = case["actors"] * case["shards"] * case["shard_rows"]
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=run_bare, args=(case, records, range(number, rows, case["actors"])))
        for number in range(case["actors"])
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return {"rows": rows, **summary(records, case)}


def run_bare(case: dict[str, Any], records: Path, rows: range) -> None:
    """One engine, all rows at once."""
    engine = SimulatedEngine(
        "",
        records=records,
        engines=case["actors"],
        step_s=case["step_s"],
        steps_of=row_steps,
        max_num_seqs=case["slots"],
    )
    futures = [engine.submit(f"row {row}", SamplingParams()) for row in rows]
    for future in futures:
        future.result()
    engine.shutdown()


def summary(records: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Slot use and makespan of the engines that left `records`."""
    engines = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    busy_s = [engine["busy_steps"] * case["step_s"] / case["slots"] for engine in engines]
    spans = [engine["last"] - engine["first"] for engine in engines]
    makespan = max(engine["last"] for engine in engines) - min(engine["first"] for engine in engines)
    return {
        "engines": len(engines),
        "rows_done": sum(engine["rows"] for engine in engines),
        "slot_use": round(sum(busy_s) / sum(spans), 4),
        "slot_use_to_the_end": round(sum(busy_s) / len(engines) / makespan, 4),
        "makespan_s": round(makespan, 2),
        "ideal_s": round(sum(busy_s) / len(engines), 2),
    }


def _threads_cpu_s() -> dict[str, float]:
    """CPU seconds of this process by thread; those that Python did not start (OpenMP's, Ray's) together."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    seconds: dict[str, float] = {}
    for thread in psutil.Process().threads():
        name = names.get(thread.id, "native").split("_")[0]
        seconds[name] = round(seconds.get(name, 0.0) + thread.user_time + thread.system_time, 2)
    return {name: used for name, used in seconds.items() if used >= 0.1}


class WatchedEngine:
    """`AsyncLLM`, watched: when the first row came and the last one went, tokens and steps."""

    def __init__(self, model: str, *, records: Path, **options: Any) -> None:
        from nanovllm import AsyncLLM

        self._engine = AsyncLLM(model, **options)
        self._record = records / f"{os.getpid()}.json"
        self._lock = threading.Lock()
        self._first = 0.0
        self._left = 0
        self._rows = 0
        self._before = _threads_cpu_s()  # imports

    max_prompt_len = property(lambda self: self._engine.max_prompt_len)
    tokenizer = property(lambda self: self._engine.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._engine.encode(text)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        return self._engine.encode_batch(texts, add_special_tokens)

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        """Start one row."""
        with self._lock:
            self._first = self._first or time.monotonic()
            self._left += 1
        future = self._engine.submit(prompt, params)
        future.add_done_callback(lambda _: self._done())
        return future

    def _done(self) -> None:
        with self._lock:
            self._left -= 1
            self._rows += 1
            if self._left == 0:
                stats = self._engine.stats()
                record = {"first": self._first, "last": time.monotonic(), "rows": self._rows, **stats._asdict()}
                used = _threads_cpu_s()
                record["threads_cpu_s"] = {name: s - self._before.get(name, 0.0) for name, s in used.items()}
                scratch = self._record.with_suffix(".new")
                scratch.write_text(json.dumps(record))
                scratch.replace(self._record)

    def stats(self) -> EngineStats:
        """Counters and state."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """End the thread."""
        self._engine.shutdown()


def demo_settings(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "engine": {"device": "cpu", "max_model_len": 256, "kvcache_block_size": 16, "max_num_seqs": case["slots"]},
        "sampling": {"temperature": 0.0, "max_tokens": 32},
    }


def demo_prompts(rows: int) -> list[str]:
    prompts = pq.read_table(DEMO / "prompts.parquet")["prompt"].to_pylist()
    return [prompts[row % len(prompts)] for row in range(rows)]


def case_demo(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A job of the demo model."""
    records, source = directory / "records", directory / "in"
    records.mkdir()
    source.mkdir()
    rows = case["actors"] * case["shards"] * case["shard_rows"]
    pq.write_table(pa.table({"prompt": demo_prompts(rows)}), source / "prompts.parquet")
    settings = {
        "model": str(DEMO / "model"),
        "input": str(source),
        **demo_settings(case),
        "run": {"replicas": case["actors"], "shard_rows": case["shard_rows"]},
    }
    shards = run_pipeline(directory, settings, functools.partial(WatchedEngine, records=records))
    return {"rows": rows, "shards_planned": shards, **demo_summary(records, case)}


def case_demo_bare(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`LLM.generate` on all rows at once."""
    import torch

    from nanovllm import LLM

    torch.set_num_threads(case.get("threads", os.cpu_count() or 1))
    rows = case["actors"] * case["shards"] * case["shard_rows"]
    settings = demo_settings(case)
    llm = LLM(str(DEMO / "model"), **settings["engine"])
    params = SamplingParams(**settings["sampling"])
    prompts = demo_prompts(rows)
    start = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - start
    stats = llm.stats()
    tokens = sum(output["num_generated_tokens"] for output in outputs)
    assert tokens == stats.generated_tokens
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "steps": stats.steps,
        "tokens_per_step": round(tokens / stats.steps, 2),
        "threads_cpu_s": _threads_cpu_s(),
    }


def demo_summary(records: Path, case: dict[str, Any]) -> dict[str, Any]:
    engines = [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]
    seconds = max(engine["last"] for engine in engines) - min(engine["first"] for engine in engines)
    rows, steps = sum(engine["rows"] for engine in engines), sum(engine["steps"] for engine in engines)
    tokens = sum(engine["generated_tokens"] for engine in engines)
    return {
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "steps": steps,
        "tokens_per_step": round(tokens / steps, 2),
        "threads_cpu_s": engines[0]["threads_cpu_s"],
    }


class PacedExecutor:
    """A device that is simulated: a step takes `STEP_S`, and `token_s` for each token of its chunks; all tokens are the same.

    A launch gives Python's lock away as often as that of a step's kernels does.
    """

    num_kvcache_blocks = 16384
    sharing = None
    summary = "simulated device"
    chunk_cost = 0.0

    def __init__(self, token_s: float) -> None:
        import torch

        self._token_s = token_s
        self._in_flight: deque[tuple[float, int]] = deque()
        self._free_at = 0.0
        self._counter = torch.zeros(1)

    def launch(self, step: Any) -> None:
        """See `Executor.launch`."""
        for _ in range(LAUNCHES):
            self._counter.add_(1)
        self._free_at = max(self._free_at, time.perf_counter()) + STEP_S + self._token_s * len(step.token_ids)
        self._in_flight.append((self._free_at, len(step.sample_rows)))

    def collect(self) -> Any:
        """See `Executor.collect`."""
        from nanovllm.engine.step_result import StepResult

        done_at, tokens = self._in_flight.popleft()
        while (left := done_at - time.perf_counter()) > 0:
            time.sleep(left)
        return StepResult([5] * tokens)

    def discard(self) -> None:
        """See `Executor.discard`."""
        self._in_flight.clear()

    def shutdown(self) -> None:
        """See `Executor.shutdown`."""


def on_paced_device(token_s: float) -> contextlib.AbstractContextManager[Any]:
    """Engines that are made within this run on a `PacedExecutor`."""
    return unittest.mock.patch("nanovllm.engine.llm_engine.create_executor", return_value=PacedExecutor(token_s))


class PacedEngine(WatchedEngine):
    """`AsyncLLM` on a simulated device, watched."""

    def __init__(self, model: str, *, records: Path, token_s: float, **options: Any) -> None:
        with on_paced_device(token_s):
            super().__init__(model, records=records, **options)


def labelling(case: dict[str, Any], directory: Path) -> tuple[Workload, str, dict[str, Any]]:
    """The rows, the model's directory, and options of the engine."""
    spec = WORKLOADS["labelling"]._replace(num_seqs=case["rows"])
    options = {"load_format": "dummy", "device": "cpu", "max_num_seqs": spec.max_num_seqs}
    return spec.make(SHAPES[spec.model]["vocab_size"]), str(write_shape(spec.model, directory / "model")), options


def case_rows(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A job of the labelling workload."""
    work, model, options = labelling(case, directory)
    records, source = directory / "records", directory / "in"
    records.mkdir()
    write_rows(work, source / "rows.parquet")
    settings = {
        "model": model,
        "input": str(source),
        "engine": options,
        "sampling": {"temperature": 0.6, "ignore_eos": True},
        "sampling_columns": {"max_tokens": "max_tokens"},
    }
    run_pipeline(directory, settings, functools.partial(PacedEngine, records=records, token_s=case["token_s"]))
    (record,) = (json.loads(path.read_text()) for path in records.glob("*.json"))
    return rows_summary(record["last"] - record["first"], record["steps"], record["threads_cpu_s"], case["rows"])


def case_rows_bare(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`LLM.generate` on all rows at once."""
    from nanovllm import LLM

    work, model, options = labelling(case, directory)
    with on_paced_device(case["token_s"]):
        llm = LLM(model, **options)
    params = [SamplingParams(temperature=0.6, max_tokens=length, ignore_eos=True) for length in work.max_tokens]
    before, start = _threads_cpu_s(), time.monotonic()
    llm.generate(work.prompts, params, use_tqdm=False)
    seconds = time.monotonic() - start
    cpu_s = {name: used - before.get(name, 0.0) for name, used in _threads_cpu_s().items()}
    return rows_summary(seconds, llm.steps, cpu_s, case["rows"])


def rows_summary(seconds: float, steps: int, cpu_s: dict[str, float], rows: int) -> dict[str, Any]:
    """Rows a second, steps, and what a row cost each thread that had something to do."""
    cpu_us = {name: round(used / rows * 1e6) for name, used in cpu_s.items()}
    return {"seconds": round(seconds, 2), "rows_per_s": round(rows / seconds), "steps": steps, "cpu_us_a_row": cpu_us}


def case_driver(case: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A job whose engines answer at once; stopped where it has committed `stop_at` shards."""
    records = directory / "records"
    records.mkdir()
    options = {"records": records, "engines": case["actors"], "step_s": 1.0, "steps_of": instant}
    settings = {
        "input": str(write_prompts(directory / "in", case["shards"] * case["shard_rows"])),
        "engine": {"device": "cpu", "max_num_seqs": min(256, case["shard_rows"])},
        "run": {"replicas": case["actors"], "shard_rows": case["shard_rows"]},
    }
    if "stop_at" in case:
        threading.Thread(target=_stop_at, args=(directory / "out", case["stop_at"]), daemon=True).start()
    with contextlib.suppress(Stopped):
        run_pipeline(directory, settings, functools.partial(SimulatedEngine, **options))
    return {}


def _stop_at(output: Path, shards: int) -> None:
    """Thread: stop the job as a user does."""
    while sum(1 for _ in output.glob("part-*")) < shards:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


CASES: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "full": case_full,
    "bare": case_bare,
    "demo": case_demo,
    "demo_bare": case_demo_bare,
    "rows": case_rows,
    "rows_bare": case_rows_bare,
    "driver": case_driver,
}


# The parent: starts cases, and watches those whose driver is measured


def run_case(kind: str, case: dict[str, Any], watch: bool = False) -> dict[str, Any]:
    """One case; what it says about itself and, where watched, what its driver cost."""
    with tempfile.TemporaryDirectory(prefix="pipeline-") as name:
        directory = Path(name)
        (directory / "case.json").write_text(json.dumps(case))
        command = [sys.executable, str(Path(__file__).resolve()), "--case", kind, name]
        environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "HOME": name}
        samples: list[dict[str, float]] = []
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(directory, samples, ended))
        if watch:
            watcher.start()
        try:
            status = run_process(command, timeout=case.get("timeout_s", 280), environment=environment)
        finally:
            ended.set()
        if watch:
            watcher.join()
        if status:
            raise SystemExit(f"{kind} {case} ended with status {status}")
        result = json.loads((directory / "result.json").read_text())
    row = {"case": kind, **case, **result}
    if watch:
        row |= driver_cost(samples)
    print(json.dumps(row), flush=True)
    return row


def _watch(directory: Path, samples: list[dict[str, float]], ended: threading.Event) -> None:
    """Thread: CPU seconds and memory of the driver and of Ray's daemons below it, and how many shards are committed."""
    output = directory / "out"
    driver: psutil.Process | None = None
    while not ended.wait(0.25):
        try:
            if driver is None:
                pid = directory / "pid"
                driver = psutil.Process(int(pid.read_text())) if pid.exists() else None
                continue
            parts = sum(entry.name.startswith("part-") for entry in os.scandir(output)) if output.exists() else 0
            below = driver.children(recursive=True)
            actors = [process for process in below if "ShardWorker" in " ".join(process.cmdline())]
            daemons = [process for process in below if process.name() in ("raylet", "gcs_server")]
            times = driver.cpu_times()
            samples.append(
                {
                    "time": time.monotonic(),
                    "parts": parts,
                    "cpu_s": times.user + times.system,
                    "rss": driver.memory_info().rss,
                    "daemons_cpu_s": sum(sum(process.cpu_times()[:2]) for process in daemons),
                    "actor_uss": statistics.median(p.memory_full_info().uss for p in actors[:4]) if actors else 0,
                }
            )
        except (psutil.Error, OSError):
            continue


def driver_cost(samples: list[dict[str, float]]) -> dict[str, Any]:
    """What a shard cost between the first tenth of the job and the last."""
    most = max(sample["parts"] for sample in samples)
    steady = [sample for sample in samples if 0.1 * most <= sample["parts"] <= 0.9 * most]
    first, last = steady[0], steady[-1]
    shards, seconds = max(1, last["parts"] - first["parts"]), last["time"] - first["time"]
    started = next(sample for sample in samples if sample["parts"])
    return {
        "shards_per_s": round(shards / max(seconds, 1e-9), 1),
        "driver_cpu_ms_a_shard": round((last["cpu_s"] - first["cpu_s"]) / shards * 1e3, 2),
        "driver_cpu_share": round((last["cpu_s"] - first["cpu_s"]) / max(seconds, 1e-9), 3),
        "daemons_cpu_ms_a_shard": round((last["daemons_cpu_s"] - first["daemons_cpu_s"]) / shards * 1e3, 2),
        "driver_rss_kb_a_shard": round((last["rss"] - first["rss"]) / shards / 1e3, 2),
        "driver_rss_mb_at_most": round(max(sample["rss"] for sample in samples) / 1e6),
        "driver_rss_mb_at_first_shard": round(started["rss"] / 1e6),
        "first_shard_s": round(started["time"] - samples[0]["time"], 1),
        "actor_uss_mb": round(max(sample["actor_uss"] for sample in samples) / 1e6),
    }


def _run_here(kind: str, directory: Path) -> None:
    (directory / "pid").write_text(str(os.getpid()))
    result = CASES[kind](json.loads((directory / "case.json").read_text()), directory)
    (directory / "result.json").write_text(json.dumps(result))


FULL = {"shards": 20, "shard_rows": 64, "slots": 32, "step_s": 0.01}


def full(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Slot use of a job beside the bare engines'."""
    for actors in args.actors or (1, 2, 8):
        case = {**FULL, "actors": actors}
        bare, job = run_case("bare", case), run_case("full", case)
        row = {
            "actors": actors,
            "rows": job["rows"],
            "shards": job["shards_planned"],
            "slot_use": job["slot_use"],
            "bare_slot_use": bare["slot_use"],
            "of_bare": round(job["slot_use"] / bare["slot_use"], 4),
            "makespan_s": job["makespan_s"],
            "of_ideal": round(job["makespan_s"] / job["ideal_s"], 3),
            "of_bare_makespan": round(job["makespan_s"] / bare["makespan_s"], 3),
            "bare_of_ideal": round(bare["makespan_s"] / bare["ideal_s"], 3),
        }
        print(json.dumps(row), flush=True)
        yield row


def demo(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The real engine on CPUs."""
    for actors in args.actors or (1,):
        case = {"actors": actors, "shards": 20, "shard_rows": 400, "slots": 64}
        bare, job = run_case("demo_bare", case), run_case("demo", case)
        row = {
            **job,
            "bare_rows_per_s": bare["rows_per_s"],
            "of_bare": round(job["rows_per_s"] / bare["rows_per_s"], 3),
        }
        row["bare_tokens_per_step"] = bare["tokens_per_step"]
        print(json.dumps(row), flush=True)
        yield row


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a row costs around the engine."""
    case = {"rows": args.rows, "token_s": args.token_us / 1e6, "timeout_s": 560}
    bare, job = run_case("rows_bare", case), run_case("rows", case)
    row = {**job, "of_bare": round(job["rows_per_s"] / bare["rows_per_s"], 3)}
    row |= {f"bare_{name}": bare[name] for name in ("rows_per_s", "steps", "cpu_us_a_row")}
    print(json.dumps(row), flush=True)
    yield row


def driver(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The control plane alone."""
    for actors in args.actors or (1, 16):
        yield run_case(
            "driver", {"actors": actors, "shards": args.shards, "shard_rows": args.shard_rows, "timeout_s": 560}, True
        )


def start(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """From the start of the driver to the first shard of a large plan, and the driver's memory then."""
    for shards in (1000, 10_000, 40_000):
        row = run_case("driver", {"actors": 1, "shards": shards, "shard_rows": 1, "stop_at": 200}, True)
        yield {key: row[key] for key in ("shards", "first_shard_s", "driver_rss_mb_at_first_shard")}


SECTIONS = {"full": full, "demo": demo, "rows": rows, "driver": driver, "start": start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--actors", type=int, nargs="+")
    parser.add_argument("--shards", type=int, default=400, help="of a job whose driver is measured")
    parser.add_argument("--shard-rows", type=int, default=DRIVER_ROWS, help="rows of each of those")
    parser.add_argument("--rows", type=int, default=16384, help="of the job whose rows' cost is measured")
    parser.add_argument("--token-us", type=float, default=5.0, help="that its device takes for a token of a prompt")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    end_on_sigterm()
    if args.case:
        _run_here(args.case[0], Path(args.case[1]))
        return 0
    result: dict[str, Any] = {"benchmark": "pipeline"}
    for section in args.sections:
        result[section] = list(SECTIONS[section](args))
    if args.save:
        print(save(args.save, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
