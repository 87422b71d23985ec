"""The actor of a job: reads shards, runs their rows through one engine, journals and commits. Made by `generate.py`.

Ray Data calls it with several shards at a time; all their rows are one continuous batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from cluster.draining import node_is_draining
from nanovllm import EngineConfig, EngineDeadError, RequestOutput, UserError
from nanovllm.engine.ranks import RankLauncher
from nanovllm.utils.heap import settle_heap, unsettle_heap
from pipelines.attempts import AttemptLog, Diagnosis, diagnose, groups, spread
from pipelines.columns import output_columns
from pipelines.commit import Journal, OutputDirectory, read_journal, retrying
from pipelines.counts import Counts, count_part, count_rows
from pipelines.dedupe import Copy, Deduplicated
from pipelines.job import JobConfig, build
from pipelines.metrics import EngineMetrics
from pipelines.models import Source
from pipelines.plan import SHARD_SCHEMA, Shard, Stage, read_schema, read_shard
from pipelines.processes import born
from pipelines.progress import WorkerState
from pipelines.requests import Requests, per_row_parameters, row_seed
from pipelines.results import RowResult, failed_row
from pipelines.rows import Engine, RowPath

T = TypeVar("T")

REPORT_S = 1.0
IO_THREADS = 4
LAST_WORDS_S = 5.0
ENGINE_DIED = 70  # exit status of an actor whose engine died (EX_SOFTWARE)


Status = Literal["done", "apart", "failed", "fatal"]


class Task(NamedTuple):
    """All that a worker needs besides its shards; pickled to every actor.

    Attributes:
        settings: `JobConfig.as_dict()`.
        token: says that the output directory a worker sees is the one the driver wrote.
        start: of the job, by which attempts are told from those of earlier starts.
        apart: the pool runs what is left when all else is done: suspects, with the engine for themselves.
        stage: what it works on.
        actors_per_node: how many engines share a node's CPUs; None where engines run on GPUs.
        engine: makes the engine from a model and the options of `EngineConfig`; `AsyncLLM` where None.
        source: from where the node fetches the model; None where it is a directory that every node sees.
        launcher: makes the engine's ranks; where None they are child processes.
    """

    settings: dict[str, Any]
    token: str
    start: str
    apart: bool
    stage: Stage
    actors_per_node: int | None
    engine: Callable[..., Engine] | None = None
    source: Source | None = None
    launcher: RankLauncher | None = None


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard in one attempt.

    Attributes:
        status: `done`: committed. `apart`: what is left are suspects, to be tried apart. `failed`: this shard cannot be
            done. `fatal`: no shard can, the store refuses writes.
        reason: why it is not done.
        gave_up: it failed because engines died on it again and again.
        counts: of all its rows, as `Counts.as_dict()`; None where it is not done.
        reused_rows: rows taken from the journal or from a file committed by an earlier attempt.
        copied_rows: rows that this attempt did not generate, since it generated an equal one (`run.dedupe`).
        seconds: of this attempt.
        worker: host and process.
        attempt: attempts at the shard are numbered from 0 in each start of the job.
        earlier: what the last one that died said, where there was one.
        engine: its worker's `up_s`, `input_tokens`, `generated_tokens` and `cached_tokens` as in `WorkerState`: what the worker
            did since its last report, the driver would else never hear of.
    """

    index: int
    status: Status
    reason: str | None
    gave_up: bool
    counts: dict[str, Any] | None
    reused_rows: int
    copied_rows: int
    seconds: float
    worker: str
    attempt: int = 0
    earlier: str | None = None
    engine: dict[str, float] | None = None


class _Active:
    """A shard this worker works on: its rows finished so far, by position, their journal, and what the engine runs of it."""

    def __init__(self, shard: Shard, journal: Journal, attempt: AttemptLog, finished: dict[int, RowResult]) -> None:
        self.shard = shard
        self.journal = journal
        self.attempt = attempt
        self.finished = finished
        self.errors = sum(result.error is not None for result in finished.values())
        self.copied = 0
        self._futures: dict[int, Future[RequestOutput]] = {}

    def submitted(self, position: int, future: Future[RequestOutput]) -> None:
        """Note a row that the engine has."""
        self._futures[position] = future
        self.copied += isinstance(future, Copy)

    def done(self, position: int, result: RowResult) -> None:
        """Note a row that is finished."""
        self._futures.pop(position, None)
        self.errors += result.error is not None
        self.finished[position] = result
        self.journal.add(position, result)

    def unfinished(self) -> list[int]:
        """Positions of the rows that are not finished."""
        return [position for position in range(self.shard.rows) if position not in self.finished]

    def in_step(self) -> list[int]:
        """Positions of the rows in the step that the engine died of."""
        futures = dict(self._futures)
        wait(futures.values(), LAST_WORDS_S)  # the engine's thread gives each its error, one after another
        errors = (
            (row, future.exception()) for row, future in futures.items() if future.done() and not future.cancelled()
        )
        return [row for row, error in errors if isinstance(error, EngineDeadError) and error.in_step]


class ShardWorker:
    """One engine and the shards in flight on it. `__call__` takes a batch of shards and returns their results."""

    def __init__(self, task: Task, board: ActorHandle[Any]) -> None:
        self._began = time.monotonic()
        self._board = board
        self._config: JobConfig = build(task.settings)
        self._task = task
        self._stage = task.stage
        self._output = OutputDirectory(self._config.output, task.stage.parts)
        if not self._patiently(self._output.has_token, task.token):
            raise UserError(
                f"output {self._config.output!r} on node {socket.gethostname()} is not the directory that the driver "
                "wrote; use a directory that all nodes share, or an object store"
            )
        schema = task.stage.schema
        self._columns = output_columns(self._config, per_row_parameters(self._config, schema))
        self._requests = Requests(self._config, schema, self._config.run.seed)
        self._schema = read_schema(task.stage, self._requests)
        make = task.engine
        if make is None:
            from nanovllm import AsyncLLM  # and with it torch, 200 MB that an engine of another kind may do without

            make = AsyncLLM
        if task.actors_per_node is not None:
            share_cpus(task.actors_per_node, self._config.engine.tensor_parallel_size)
        retries = self._config.run.write_retries
        model = task.source.fetch(retries) if task.source else self._config.model
        if task.launcher is not None:
            make = partial(make, launcher=task.launcher)
        self._engine: Engine = make(model, **self._config.engine.model_dump(exclude={"model"}))
        self._requests.attach(self._engine.tokenizer, self._config.model)
        deduplicated = Deduplicated(self._engine) if self._config.run.dedupe else self._engine
        self._rows = RowPath(deduplicated, self._config.prompt.too_long)
        self._active: dict[int, _Active] = {}
        self._metrics = EngineMetrics(self._config.output)
        self._restarted: bool | None = None
        self._io = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="shard-io")
        self._steps, self._stepped = 0, time.monotonic()
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._gpu, self._gpus = gpus_held(self._config.engine) if task.engine is None else ("", 0.0)
        settle_heap()
        self._load_s = time.monotonic() - self._began
        reporter = threading.Thread(
            target=_report_regularly, args=(weakref.ref(self), board), name="report", daemon=True
        )
        reporter.start()

    def __del__(self) -> None:
        """Free the engine when Ray lets go of the actor."""
        if hasattr(self, "_engine"):
            unsettle_heap()
            self._engine.shutdown()

    async def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Work on the shards of a batch (one, as the job runs it) and return each result as JSON."""
        shards = [
            Shard(int(index), str(file), *(int(number) for number in numbers))
            for index, file, *numbers in zip(*(batch[name] for name in SHARD_SCHEMA.names), strict=True)
        ]
        results = [replace(await self._attempt(shard), engine=self._counters()) for shard in shards]
        return {"result": [json.dumps(asdict(result)) for result in results]}

    def _counters(self) -> dict[str, float]:
        stats = self._engine.stats()
        return {
            "up_s": round(time.monotonic() - self._began, 2),
            "input_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "cached_tokens": stats.cached_tokens,
        }

    async def _attempt(self, shard: Shard) -> ShardResult:
        started = time.monotonic()
        number = 0
        death: str | None = None

        def result(status: Status, reason: str | None = None, gave_up: bool = False) -> ShardResult:
            seconds = round(time.monotonic() - started, 3)
            return ShardResult(shard.index, status, reason, gave_up, None, 0, 0, seconds, self._name, number, death)

        attempt = AttemptLog(self._output.attempts(shard.index), self._task.start)
        try:
            earlier = await self._off_loop(self._patiently, self._earlier, shard)
            if earlier is not None:
                return replace(result("done"), counts=earlier.as_dict(), reused_rows=shard.rows)
            past = await self._off_loop(self._patiently, attempt.read)
            if died := [one for one in sorted(past, key=lambda one: one.number) if not one.over]:
                number, death = len(died), died[-1].reason or "its process vanished"
            table = await self._off_loop(self._read, shard)
            journal = self._output.journal(shard.index)
            finished = await self._off_loop(self._patiently, read_journal, journal, shard.rows)
        except (OSError, pa.ArrowException) as error:
            return result("failed", _one_line(error))
        reused = len(finished)
        active = _Active(shard, Journal(journal), attempt, finished)
        found = diagnose(past, active.unfinished(), reused)
        if found.deaths >= self._config.run.max_engine_deaths:
            reason = f"the engine died {found.deaths} times on it and finished no row in between, last: {found.last}"
            return result("failed", reason, gave_up=True)
        if self._config.run.dedupe and (found.poison or found.suspects):
            spread(found, self._asked(table), active.unfinished())
        self._active[shard.index] = active  # until it is committed: a commit may be retried for long
        flusher = asyncio.get_running_loop().create_task(self._flush_regularly(active.journal))
        try:
            for position, reason in found.poison.items():
                self._row_done(active, position, failed_row(f"the engine died of this row: {reason}"))
            await self._generate(active, table, found)
            if len(finished) < shard.rows:
                await self._off_loop(_try_flush, active.journal)
                await self._off_loop(self._patiently, attempt.over)
                return replace(result("apart"), copied_rows=active.copied)
            counts = await self._off_loop(self._commit, shard, table, [finished[row] for row in range(shard.rows)])
        except OSError as error:
            return result("fatal", f"shard {shard.index} cannot be written: {_one_line(error)}")
        finally:
            flusher.cancel()
            await self._off_loop(active.journal.close)
            await self._off_loop(attempt.close)
            del self._active[shard.index]
        self._metrics.report(self._engine.stats())  # nobody may wait for the next report where the job ends
        return replace(result("done"), counts=counts.as_dict(), reused_rows=reused, copied_rows=active.copied)

    def _row_done(self, active: _Active, position: int, result: RowResult) -> None:
        active.done(position, result)
        self._metrics.row(result)

    async def _generate(self, active: _Active, table: pa.Table, found: Diagnosis) -> None:
        """Run the rows that no earlier attempt finished: in company, and suspects only where this pool is there for them.

        Raises:
            OSError: the store refuses to note which rows are tried.
        """
        await self._note(active, None)
        await self._run_rows(active, table, [row for row in active.unfinished() if row not in found.suspects])
        for group in groups(found.suspects, found.narrowed) if self._task.apart else ():
            await self._note(active, group)
            await self._run_rows(active, table, group)

    async def _note(self, active: _Active, group: list[int] | None) -> None:
        """Write down what will run, and before it what is finished, so that a death is not taken for one without progress."""

        def write() -> None:
            active.journal.flush()
            active.attempt.begin(len(active.finished), group)

        await self._off_loop(self._patiently, write)

    async def _run_rows(self, active: _Active, table: pa.Table, rows: list[int]) -> None:
        """Generate for the rows at some positions of a shard."""
        place = self._stage.places(active.shard, table)
        assert place is not None  # what is read has the places of its rows, whatever is written
        seeds = [row_seed(self._config.run.seed, *place(row), 0) for row in rows]
        read = table.select(self._requests.columns)
        every = await self._off_loop(self._requests.rows, read)  # Arrow's `take` knows no string views
        try:
            await self._rows.run(
                self._requests,
                [every[row] for row in rows],
                seeds,
                lambda number, result: self._row_done(active, rows[number], result),
                lambda number, future: active.submitted(rows[number], future),
            )
        except EngineDeadError as error:
            self._die(error)

    def _asked(self, table: pa.Table) -> list[str]:
        """What each row of a shard asks for; equal where the requests are."""
        return [repr(row) for row in self._requests.rows(table.select(self._requests.columns))]

    async def _flush_regularly(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(self._config.run.journal_flush_s)
            await self._off_loop(_try_flush, journal)

    def _earlier(self, shard: Shard) -> Counts | None:
        """Counts of a shard that an attempt committed before its actor died; None where none did."""
        if self._output.part_rows(shard.index) != shard.rows * self._columns.rows_each:
            return None
        self._output.forget(shard.index)
        return count_part(self._output, shard, self._columns, self._stage)

    def _read(self, shard: Shard) -> pa.Table:
        stage = self._stage
        return read_shard(stage.root, stage.format, shard, self._schema, self._config.run.write_retries)

    def _patiently(self, ask: Callable[..., T], *arguments: Any) -> T:
        """Ask the output, again where it fails, as often as a failing write is tried again."""
        return retrying(lambda: ask(*arguments), self._config.run.write_retries)

    def _commit(self, shard: Shard, table: pa.Table, results: list[RowResult]) -> Counts:
        whole = self._columns.extend(table.select(self._stage.kept), results)
        retrying(lambda: self._output.commit(shard.index, whole), self._config.run.write_retries)
        return count_rows(whole, self._columns, self._stage.places(shard, table))

    async def _off_loop(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._io, work, *arguments)

    def _die(self, error: EngineDeadError) -> NoReturn:
        """End the process, so that Ray starts a new actor. Finished rows are journalled, and who was in the step noted."""
        _say(f"the engine died: {error}")
        try:
            in_step = {active: active.in_step() for active in self._active.values()}
            for active, rows in in_step.items():
                _try_flush(active.journal)
                if error.killed or rows or not any(in_step.values()):
                    active.attempt.last_words(_one_line(error), error.killed, rows)
                else:  # another shard's rows did it
                    active.attempt.over()
            with contextlib.suppress(Exception):  # for the report, which can do without
                self._io.submit(self._last_words, _one_line(error)).result(REPORT_S)
        finally:
            os._exit(ENGINE_DIED)

    def _last_words(self, reason: str) -> None:
        """Tell the driver's board why this process ends."""
        tell = self._board.last_words.remote
        ray.get(tell(ray.get_runtime_context().get_node_id(), os.getpid(), born(os.getpid()), reason))

    def report(self, board: ActorHandle[Any], name: str, flushed: bool) -> bool:
        """Tell the driver's board how far this worker is; flush the journals and return True when the job stops.

        Where the node is about to go they are flushed too, each time until it goes.
        """
        stats = self._engine.stats()
        now = time.monotonic()
        if stats.steps != self._steps or not stats.num_running + stats.num_waiting:
            self._steps, self._stepped = stats.steps, now
        state = WorkerState(
            finished_rows=sum(len(active.finished) for active in list(self._active.values())),
            input_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            cached_tokens=stats.cached_tokens,
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_usage=stats.kv_usage,
            flushed=flushed,
            stalled_s=round(now - self._stepped, 1),
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            birth=born(os.getpid()),
            actor=ray.get_runtime_context().get_actor_id() or "",
            host=socket.gethostname(),
            gpu=self._gpu,
            gpus=self._gpus,
            up_s=round(now - self._began, 2),
            load_s=round(self._load_s, 2),
            error_rows=sum(active.errors for active in list(self._active.values())),
            restarted=self._was_restarted(),
        )
        self._metrics.report(stats)
        try:
            stopping = bool(ray.get(board.report.remote(name, state), timeout=10 * REPORT_S))
        except ray.exceptions.RayError:
            return False  # the board is away; it comes back, or the job is over
        if stopping or node_is_draining():
            for active in list(self._active.values()):
                _try_flush(active.journal)
        return stopping

    def _was_restarted(self) -> bool:
        """Whether this actor took the place of one that died."""
        if self._restarted is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, of what it does within
                self._restarted = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        return self._restarted


def _report_regularly(worker: weakref.ref[ShardWorker], board: ActorHandle[Any]) -> None:
    """Thread: report while the worker lives. It holds no worker while it sleeps, so that the actor can let go of it."""
    name = uuid.uuid4().hex
    flushed = False
    while (alive := worker()) is not None:
        flushed = alive.report(board, name, flushed)
        del alive
        time.sleep(REPORT_S / 4 if flushed else REPORT_S)


def gpus_held(engine: EngineConfig) -> tuple[str, float]:
    """Name and number of the GPUs that this actor's engine holds; "" and 0 where it runs on CPUs."""
    torch = sys.modules.get("torch")
    if engine.device == "cpu" or torch is None or not torch.cuda.is_available():
        return "", 0.0
    share = float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))
    ranks = engine.tensor_parallel_size  # those on other nodes hold GPUs too, which this actor is not assigned
    return str(torch.cuda.get_device_name()), share if ranks == 1 and share else max(share, float(ranks))


def share_cpus(actors: int, ranks: int) -> None:
    """Give this engine its part of the node's cores. Ray sets OMP_NUM_THREADS=1 for actors that reserve no CPU."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cpus // (actors * ranks))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for tensor-parallel ranks
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)


def _try_flush(journal: Journal) -> None:
    """Flush now or, where the store refuses, at the next turn: a journal is a saving, not a condition."""
    try:
        journal.flush()
    except OSError as error:
        _say(f"journal not written, will be tried again: {_one_line(error)}")


def _say(line: str) -> None:
    """Write to the worker's log; a full disk there must not end what a full disk elsewhere does not."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
