"""What a job tells Prometheus, through Ray: `EngineMetrics` from every engine, `JobMetrics` from the driver.

Ray puts `ray_` before every name and `_total` behind that of a counter, and adds the node's address (`NodeAddress`), the process
(`WorkerId`) and the cluster (`SessionName`). `METRICS` is the list; README.md has it as a table, and a test compares the two.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nanovllm.engine.stats import STEP_BOUNDS_S, EngineStats
from pipelines.counts import Counts, error_kind
from pipelines.progress import WorkerState, alive

if TYPE_CHECKING:
    from pipelines.progress import Sample
    from pipelines.results import RowResult

MAX_KINDS = 20  # of errors, from one process: messages may quote rows, and every kind is a time series
MAX_KIND_CHARS = 100
OTHER = "other"


class Metric(NamedTuple):
    """One metric. `unit` is part of its documentation only; `by` are labels beside `output`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    about: str
    by: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """The name that Prometheus has it by; of a histogram what comes before `_bucket`, `_count` and `_sum`."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


ENGINE = (
    Metric(
        "nanovllm_prompt_tokens",
        "counter",
        "tokens",
        "prompts given to the engine, those found in the prefix cache too",
    ),
    Metric("nanovllm_cached_tokens", "counter", "tokens", "of these found in the prefix cache"),
    Metric("nanovllm_generated_tokens", "counter", "tokens", "generated"),
    Metric("nanovllm_finished_rows", "counter", "rows", "finished, committed or not"),
    Metric("nanovllm_error_rows", "counter", "rows", "of these with an error, by kind (numbers become N)", ("kind",)),
    Metric("nanovllm_preemptions", "counter", "sequences", "put back since the KV pool was full, to be computed again"),
    Metric("nanovllm_step_seconds", "histogram", "seconds", "of a step (`_sum` comes from the middles of the buckets)"),
    Metric("nanovllm_busy_seconds", "counter", "seconds", "spent in steps, exactly"),
    Metric("nanovllm_running_requests", "gauge", "requests", "that the engine works on"),
    Metric("nanovllm_waiting_requests", "gauge", "requests", "queued in the engine"),
    Metric("nanovllm_kv_usage", "gauge", "0 to 1", "part of the KV pool held by sequences"),
)
# Of these the counters are told once for each shard, whatever dies: their sums are those of the report.
JOB = (
    Metric("nanovllm_committed_rows", "counter", "rows", "in files that this start committed"),
    Metric("nanovllm_committed_error_rows", "counter", "rows", "of these with an error, by kind", ("kind",)),
    Metric("nanovllm_committed_prompt_tokens", "counter", "tokens", "prompts of committed rows"),
    Metric("nanovllm_committed_generated_tokens", "counter", "tokens", "generated for committed rows"),
    Metric("nanovllm_restarts", "counter", "engines", "that took the place of one that died, and reported since"),
    Metric("nanovllm_planned_rows", "gauge", "rows", "of the whole job"),
    Metric("nanovllm_done_rows", "gauge", "rows", "finished, those of earlier starts too"),
    Metric("nanovllm_engines", "gauge", "engines", "that report"),
)
METRICS = ENGINE + JOB


class Recorder:
    """Ray's objects for some metrics of one job, told apart by the address of its output, without its options."""

    def __init__(self, metrics: Iterable[Metric], output: str) -> None:
        from ray.util import metrics as ray_metrics

        self._kinds: set[str] = set()
        self._objects: dict[str, Any] = {}
        for metric in metrics:
            labels = ("output", *metric.by)
            if metric.kind == "histogram":
                made: Any = ray_metrics.Histogram(metric.name, metric.about, list(STEP_BOUNDS_S), labels)
            else:
                make = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
                made = make(metric.name, metric.about, labels)
            self._objects[metric.name] = made.set_default_tags({"output": output.partition("?")[0]})

    def add(self, name: str, value: float, kind: str | None = None) -> None:
        """Count; nothing where it is nothing, which Ray refuses."""
        if value > 0:
            self._objects[name].inc(value, None if kind is None else {"kind": self.label(kind)})

    def set(self, name: str, value: float) -> None:
        """Say how much it is now. Ray forgets that after two of its reports, so it must be said again and again."""
        self._objects[name].set(value)

    def observe(self, name: str, value: float, times: int) -> None:
        """Count `times` observations."""
        for _ in range(times):
            self._objects[name].observe(value)

    def label(self, kind: str) -> str:
        """The label of a kind of errors: itself, cut, or `OTHER` where there are many."""
        kind = kind[:MAX_KIND_CHARS]
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            return OTHER
        self._kinds.add(kind)
        return kind


class EngineMetrics:
    """Metrics of one engine. `row` is for the thread that ends rows, `report` for any; only `report` calls Ray."""

    def __init__(self, output: str) -> None:
        self._recorder = Recorder(ENGINE, output)
        self._lock = threading.Lock()
        self._told = EngineStats(0, 0, 0, 0, 0, 0, 0, 0.0)
        self._rows = 0
        self._errors: Counter[str] = Counter()

    def row(self, result: RowResult) -> None:
        """Note that a row is finished."""
        with self._lock:
            self._rows += 1
            if result.error is not None:
                self._errors[error_kind(result.error)] += 1

    def report(self, stats: EngineStats) -> None:
        """Tell Ray what came since the last call, and how things are now."""
        with self._lock:
            told, self._told = self._told, stats
            rows, self._rows = self._rows, 0
            errors, self._errors = self._errors, Counter()
            record = self._recorder
            record.add("nanovllm_prompt_tokens", stats.prompt_tokens - told.prompt_tokens)
            record.add("nanovllm_cached_tokens", stats.cached_tokens - told.cached_tokens)
            record.add("nanovllm_generated_tokens", stats.generated_tokens - told.generated_tokens)
            record.add("nanovllm_preemptions", stats.preemptions - told.preemptions)
            record.add("nanovllm_busy_seconds", stats.step_s - told.step_s)
            record.add("nanovllm_finished_rows", rows)
            for kind, count in errors.items():
                record.add("nanovllm_error_rows", count, kind)
            for middle, now, before in zip(_MIDDLES, stats.step_times, told.step_times, strict=True):
                record.observe("nanovllm_step_seconds", middle, now - before)
            record.set("nanovllm_running_requests", stats.num_running)
            record.set("nanovllm_waiting_requests", stats.num_waiting)
            record.set("nanovllm_kv_usage", stats.kv_usage)


class JobMetrics:
    """Metrics of one start of a job, from its driver: what is committed is told once, whatever dies."""

    def __init__(self, output: str) -> None:
        self._recorder = Recorder(JOB, output)
        self._restarted: set[tuple[str, int, str | None]] = set()

    def committed(self, counts: Counts) -> None:
        """Note a committed shard."""
        record = self._recorder
        record.add("nanovllm_committed_rows", counts.rows)
        record.add("nanovllm_committed_prompt_tokens", counts.input_tokens)
        record.add("nanovllm_committed_generated_tokens", counts.generated_tokens)
        for kind, count in counts.errors.items():
            record.add("nanovllm_committed_error_rows", count, kind)

    def look(self, workers: Iterable[tuple[float, WorkerState]], sample: Sample, total_rows: int) -> None:
        """Note how far the job is, every second. `workers` are all that ever reported, as the board has them."""
        workers = list(workers)
        for _, state in workers:
            process = (state.node, state.pid, state.birth)
            if state.restarted and process not in self._restarted:
                self._restarted.add(process)
                self._recorder.add("nanovllm_restarts", 1)
        self._recorder.set("nanovllm_planned_rows", total_rows)
        self._recorder.set("nanovllm_done_rows", sample.rows)
        self._recorder.set("nanovllm_engines", alive(workers))


def _middles(bounds: tuple[float, ...]) -> tuple[float, ...]:
    """The middle of each bucket; of the last, which has no end, twice its beginning, as Ray takes it."""
    starts = (0.0, *bounds)
    return (*((a + b) / 2 for a, b in zip(starts, bounds, strict=False)), 2 * bounds[-1])


_MIDDLES = _middles(STEP_BOUNDS_S)
