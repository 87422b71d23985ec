"""The job: generate text for every row of a dataset, every row exactly once, however often it is killed.

    python pipelines/generate.py --model M --input IN --output OUT [--config job.yaml] [section.key=value ...]
    ray job submit --working-dir . -- python pipelines/generate.py ...

Exit status: 0 finished; 1 ran and failed, start it again to go on; 2 refused, with one line on stderr saying why.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # run as a script: the repository is the root of imports, not its pipelines/ folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pyarrow as pa

from cluster.address import check_reachable, cluster_address
from cluster.groups import ActorRanks, actor_options
from cluster.placement import Placement, eligible, local_gpus, place
from nanovllm import SamplingParams, UserError
from pipelines.batch_results import NAME as RESULTS
from pipelines.batch_results import BatchResults
from pipelines.columns import OutputColumns, check_names, output_columns
from pipelines.commit import JobFile, OutputDirectory, RecordLog, backoff_s, output_schema, read_records, retrying
from pipelines.counts import Counts, ErrorSample, count_part, keep_few
from pipelines.history import History
from pipelines.inputs import Dataset, list_dataset, measure
from pipelines.job import Command, JobConfig, load
from pipelines.lease import Lease, LeaseLost
from pipelines.metrics import JobMetrics
from pipelines.models import look, model_name, named, source_of
from pipelines.plan import Identity, Shard, Stage, differences, identity, make_shards, read_head
from pipelines.progress import Progress, ProgressBoard, WorkerState, duration
from pipelines.prompts import Rendered
from pipelines.report import build_report, to_json
from pipelines.report_page import to_html
from pipelines.requests import Requests, per_row_parameters
from pipelines.routing import Routing, Work, check_routing, describe
from pipelines.row_values import RowError
from pipelines.rows import Engine
from pipelines.stop import GO_ON, Stopped, StopSignals
from pipelines.storage import exists, resolve
from pipelines.watchdog import Watchdog

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from transformers import PreTrainedTokenizerBase

    from pipelines.worker import ShardResult

REPOSITORY = str(Path(__file__).resolve().parent.parent)
FLUSH_S = 4.0  # how long a stopped job waits for its workers to flush
MEND = "mend it and start the same command again to go on"
FAILED = 1
REFUSED = 2
INIT_RETRIES = 3
MAX_GIVEN_UP = 3  # shards in a row given up because engines died: then it is not the rows


class JobFailed(Exception):
    """The job ran and did not finish; the message is one line."""


class Job(NamedTuple):
    """A job that passed every check that needs no Ray."""

    config: JobConfig
    dataset: Dataset
    identity: Identity
    schema: pa.Schema
    columns: OutputColumns
    shards: list[Shard]
    owner: JobFile | None  # the job's mark in the output directory; None where this is its first start

    @property
    def stage(self) -> Stage:
        """The input as engines work on it."""
        kept = output_schema(self.schema, self.config.columns.keep).names
        return Stage(self.dataset.root, self.dataset.format, self.schema, tuple(kept))


def main(arguments: Sequence[str] | None = None, engine: Callable[..., Engine] | None = None) -> int:
    """Run the command line and return its exit status. `engine` as in `run_job`."""
    try:
        command = load(sys.argv[1:] if arguments is None else arguments)
        address = cluster_address(command.address, os.environ)
        if command.print_config:
            print(command.config.as_yaml(), end="")
            return 0
        if command.address is not None:
            os.environ["RAY_ADDRESS"] = address  # for Ray's own processes too
        return _run(command, engine)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return REFUSED
    except (JobFailed, LeaseLost) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"error: input or output failed: {_one_line(error)}; {MEND}", file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        print(f"error: stopped; {GO_ON}", file=sys.stderr)
        return FAILED


def _run(command: Command, engine: Callable[..., Engine] | None) -> int:
    config = command.config
    output = OutputDirectory(config.output)
    try:
        job = check(config, output)
    except OSError as error:
        raise UserError(f"input or output cannot be reached: {_one_line(error)}") from None
    if command.dry_run:
        _show_plan(job, _check_model(job))
        return 0
    if job.owner is not None and output.succeeded():
        _say_finished(job)
    else:
        check_reachable(_ray_address())
        _check_model(job)
        run_job(job, output, engine)
    if command.demo:
        _show_demo(output, config)
    return 0


def _say_finished(job: Job) -> None:
    print(f"already finished: {sum(shard.rows for shard in job.shards):,} rows in {job.config.output}; nothing to do")


# Checks: all that can be refused is refused here


def check(config: JobConfig, output: OutputDirectory) -> Job:
    """List the input, look at the output directory, and make or load the plan. Writes nothing.

    Raises:
        UserError: one line about the first thing that is wrong.
    """
    dataset = list_dataset(config.input, config.format)
    _check_apart(config, dataset, output)
    owner = output.job()
    now = identity(config, dataset)
    if owner is not None:
        differing = differences(owner.identity, json.loads(json.dumps(now)), output.files, dataset.files)
        if differing:
            more = f" (and {len(differing) - 1} more differences)" if len(differing) > 1 else ""
            raise UserError(
                f"output {config.output!r} belongs to another job: {differing[0]}{more}; "
                "give a new output directory, or the settings it was begun with"
            )
        columns = output_columns(config, per_row_parameters(config, owner.schema))
        return Job(config, dataset, now, owner.schema, columns, output.shards(), owner)
    schema, facts = measure(dataset)
    Requests(config, schema)
    check_routing(config, schema)
    columns = output_columns(config, per_row_parameters(config, schema))
    check_names(output_schema(schema, config.columns.keep).names, columns)
    return Job(config, dataset, now, schema, columns, make_shards(config, dataset.files, facts), None)


def _check_apart(config: JobConfig, dataset: Dataset, output: OutputDirectory) -> None:
    """Refuse an output among the input files, which the next start would take for input."""
    first_in = {file.path.rpartition("/")[0]: file.path for file in reversed(dataset.files)}  # a look at each is slow
    inside = [path for path in first_in.values() if output.place.contains(dataset.root.child(path))]
    if inside:
        raise UserError(
            f"output {config.output!r} holds the input file {inside[0]!r}; give an output directory of its own"
        )
    given = resolve(config.input)
    if given.contains(output.place):
        raise UserError(f"output {config.output!r} is inside the input {config.input!r}; give a directory outside it")


def _check_model(job: Job) -> tuple[Requests, PreTrainedTokenizerBase]:
    """Refuse a model that no engine could load, or that cannot take the prompts. Imports torch, so it comes after what is cheaper."""
    from nanovllm.preflight import check_model, check_sampling
    from nanovllm.utils.tokenizer import load_tokenizer

    config = job.config
    directory = look(config.model, config.run.model_cache, config.engine.load_format == "auto")
    engine = config.engine.model_copy(update={"model": str(directory)})
    with named(config.model, directory):
        model = check_model(engine)
        tokenizer = load_tokenizer(engine)
    if tokenizer is None:
        raise UserError(f"model {config.model!r} has no tokenizer; put its tokenizer.json into the directory")
    longest = min(config.engine.max_model_len, model.rope.max_position(model.max_position_embeddings))
    if config.prompt.too_long != "error" and config.sampling.max_tokens >= longest:
        raise UserError(
            f"sampling.max_tokens={config.sampling.max_tokens} leaves no room for a prompt in {longest} tokens, to which "
            f"prompt.too_long={config.prompt.too_long} would cut it; lower it or raise engine.max_model_len"
        )
    check_sampling(engine, config.sampling, model, tokenizer)
    requests = Requests(config, job.schema, config.run.seed)
    requests.attach(tokenizer, config.model)
    return requests, tokenizer


def _show_plan(job: Job, ready: tuple[Requests, PreTrainedTokenizerBase]) -> None:
    """What `--dry-run` prints: the plan, and the first prompts with their length in tokens."""
    requests, tokenizer = ready
    rows = sum(shard.rows for shard in job.shards)
    print(f"input    {rows:,} rows in {len(job.dataset.files):,} {job.dataset.format} files")
    most = max(shard.rows for shard in job.shards) * job.columns.rows_each
    print(f"output   {len(job.shards):,} files of up to {most:,} rows")
    kept = output_schema(job.schema, job.config.columns.keep)
    print(f"columns  {', '.join(f'{field.name} {field.type}' for field in (*kept, *job.columns.schema))}")
    if job.config.run.may_route:
        print(f"routing  {_routing_in_words(job, ready)}")
    first = job.shards[0]
    columns = pa.schema([job.schema.field(name) for name in requests.columns])
    try:
        table = read_head(job.stage, first, 3, columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"input file {first.file!r} cannot be read: {_one_line(error)}") from None
    for row in requests.rows(table):
        try:
            prompt, params = requests.request(row, 0)
            if isinstance(prompt, Rendered):
                prompt = prompt.token_ids(tokenizer)
        except RowError as error:
            print(f"prompt   an error row: {error}")
            continue
        if isinstance(prompt, str):
            print(f"prompt   {len(tokenizer.encode(prompt))} tokens: {prompt!r}")
        else:
            print(f"prompt   {len(prompt)} tokens: {tokenizer.decode(prompt)!r}")
        if params.problem() is None and (differing := _differing(params, job.config.sampling)):
            print(f"         with {differing}")
    print("all checks passed; nothing was written and no engine was started")


def _routing_in_words(job: Job, ready: tuple[Requests, PreTrainedTokenizerBase]) -> str:
    """What the settings do to the order of rows, and what a sample of them shares."""
    run = job.config.run
    if run.group_by is not None:
        return f"rows with equal {run.group_by!r} are brought together"
    routing = Routing(job.config, job.stage, job.shards, OutputDirectory(job.config.output))
    engines = 1 if run.replicas == "auto" else run.replicas[1]
    decided = "are" if run.prefix_sort == "on" else "may be"
    words = describe(routing.sharing(routing.sample(), *ready, engines))
    return f"rows whose prompts begin alike {decided} brought together: {words}"


def _differing(params: SamplingParams, usual: SamplingParams) -> str:
    """The parameters that a row sets, in words; its seed follows from its place."""
    names = (field.name for field in fields(SamplingParams) if field.name != "seed")
    return ", ".join(f"{n}={getattr(params, n)!r}" for n in names if getattr(params, n) != getattr(usual, n))


# The run


def run_job(job: Job, output: OutputDirectory, engine: Callable[..., Engine] | None = None) -> None:
    """Do the shards that are left, check the result, and write report and `_SUCCESS`, as the only start that does.

    Args:
        job: from `check`.
        output: of the job.
        engine: makes an actor's engine from the model and the options of `EngineConfig`; `AsyncLLM` where None.

    Raises:
        UserError: another start runs, the cluster lacks what the job asks for, or the output cannot be written.
        JobFailed: some shard or the whole job failed. What is committed stays; a new start does the rest.
        LeaseLost: another start took over, since this one was suspended or cut off.
        Stopped: SIGTERM or Ctrl-C; workers have flushed their journals.
    """
    if _ray_address() == "local" and Work(job.stage, job.shards, output).left():
        # The cluster is this machine: what it lacks is refused before a file is written.
        _place(job.config, [local_gpus()])
    run = job.config.run
    with StopSignals(FAILED) as stop:
        lease = Lease(output.run, job.config.output, run.lease_s, backoff_s(run.write_retries), stop.interrupt)
        stop.at_the_end = lease.release
        try:
            lease.acquire()
            for claim in lease.superseded:
                _say(job.config, f"taking over from {claim}, which died without releasing the output")
            _run_alone(_look_again(job, output), output, lease, stop, engine)
        finally:
            stop.finish()
            lease.release()


def _look_again(job: Job, output: OutputDirectory) -> Job:
    """The job as it is now that no other start changes it: one may have begun it since it was checked, and ended."""
    owner = output.job()
    if (owner and owner.token) == (job.owner and job.owner.token):
        return job
    return check(job.config, output)


def _run_alone(
    job: Job, output: OutputDirectory, lease: Lease, stop: StopSignals, engine: Callable[..., Engine] | None
) -> None:
    """`run_job` under the lease."""
    if job.owner is not None and output.succeeded():
        _say_finished(job)
        return
    total_rows = sum(shard.rows for shard in job.shards)
    progress = Progress(total_rows, 0, job.config.run.progress_s, quiet=job.config.run.quiet)
    work = Work(job.stage, job.shards, output)
    routing = Routing(job.config, job.stage, job.shards, output) if job.config.run.may_route else None
    found = work if routing is None else routing.found()
    if found is not None and not (work if found.needs_merge else found).left():
        Run(job, output, lease, job.owner, None, progress, engine, found, routing).finish(total_rows, total_rows)
        return
    if _ray_address() == "local":
        owner = _take_possession(job, output, lease)
    with _ray(stop, job.config.run.quiet):
        placement = _place_on_cluster(job.config)
        if _ray_address() != "local":
            owner = _take_possession(job, output, lease)
        if routing is not None:
            work = _route(job, routing, placement, lease)
        pending = work.left()
        progress.committed_rows = resumed_rows = total_rows - sum(shard.rows for shard in pending)
        if resumed_rows:
            _say(job.config, f"resuming: {resumed_rows:,} of {total_rows:,} rows are already committed")
        run = Run(job, output, lease, owner, placement, progress, engine, work, routing)
        if pending:
            run.execute(pending, stop)
        run.merge()
    run.finish(resumed_rows, total_rows)


def _route(job: Job, routing: Routing, placement: Placement, lease: Lease) -> Work:
    """What the engines work on: rows that go together brought together, where that is asked for and pays.

    Raises:
        JobFailed: the input cannot be read, or the output refuses.
    """
    engines = placement.max_actors, float(placement.num_gpus)
    with _as_failures():
        return routing.work(engines, partial(_check_model, job), partial(_say, job.config), lease.check)


@contextmanager
def _as_failures() -> Iterator[None]:
    """Ray raises many kinds; each ends a start.

    Raises:
        JobFailed: with the cause.
    """
    try:
        yield
    except (JobFailed, LeaseLost, UserError):
        raise
    except Exception as error:
        raise JobFailed(f"{_root_cause(error)}; {MEND}") from None


def _take_possession(job: Job, output: OutputDirectory, lease: Lease) -> JobFile:
    """Write the plan where this is the job's first start, and the settings of this start."""
    lease.check()
    owner = job.owner or output.create(job.identity, job.dataset.format, job.schema, job.shards, job.dataset.files)
    retries = job.config.run.write_retries
    retrying(lambda: output.put_run("config.yaml", job.config.as_yaml().encode()), retries)
    return owner


def _ray_address() -> str:
    """The cluster to use: RAY_ADDRESS, which `ray job submit` sets, else a local one."""
    return os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def _ray(stop: StopSignals, quiet: bool) -> Iterator[None]:
    """Ray for the length of a job. `quiet`: what workers print stays in Ray's logs.

    Raises:
        UserError: there is no cluster at RAY_ADDRESS.
    """
    address = _ray_address()
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": not quiet}
    if address == "local":
        options["include_dashboard"] = False
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # `ray job submit` has shipped the working directory already
        paths = [REPOSITORY, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    try:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise UserError(
                f"no Ray cluster at RAY_ADDRESS={address!r}: {_one_line(error)}; one with token authentication wants RAY_AUTH_MODE=token "
                "and its token (RAY_AUTH_TOKEN, ~/.ray/auth_token); without an address the job runs here"
            ) from None
        except SystemExit:  # while Ray starts, the handler of SIGTERM is its own
            stop.finish()
            raise stop.error from None
        stop.install()
        yield
    finally:
        ray.shutdown()


def _place(config: JobConfig, node_gpus: Sequence[float]) -> Placement:
    return place(config.engine, config.run.replicas, config.run.num_gpus, node_gpus, config.run.group)


def _place_on_cluster(config: JobConfig) -> Placement:
    """Where the job's engines go on the cluster that Ray is connected to.

    Raises:
        UserError: it has no place for them, and will not get one.
    """
    import ray

    nodes = eligible(ray.nodes(), config.run.selectors)
    if not nodes:
        asked = " or ".join(map(str, config.run.selectors))
        if _ray_address() == "local":
            raise UserError(f"run.label_selector: this machine has no labels {asked}; leave it out to run here")
        print(f"no node has labels {asked} yet; engines wait for one", flush=True)
    return _place(config, [node["Resources"].get("GPU", 0) for node in nodes])


def _say(config: JobConfig, line: str) -> None:
    """Tell what nobody needs to know who only waits for the end."""
    if not config.run.quiet:
        print(line, flush=True)


class Run:
    """One start of a job: feeds shards to the pool, keeps the ledger and the progress, and sums up at the end."""

    def __init__(
        self,
        job: Job,
        output: OutputDirectory,
        lease: Lease,
        owner: JobFile | None,
        placement: Placement | None,
        progress: Progress,
        engine: Callable[..., Engine] | None,
        work: Work,
        routing: Routing | None,
    ) -> None:
        self._work = work
        self._routing = routing
        self._job = job
        self._config = job.config
        self._output = output
        self._lease = lease
        self._owner = owner
        self._placement = placement or Placement(0, 0, 0)  # nothing left to run: only the end of the job is done again
        self._progress = progress
        self._engine = engine
        self._name = uuid.uuid4().hex
        self._apart: list[Shard] = []
        self._given_up = 0  # shards in a row
        self._history = History(output.history(), self._name, lambda: progress.seconds)
        self._words = 0  # of the board that the history has
        self._error_samples: list[ErrorSample] = []  # that the ledger has
        self._watchdog = Watchdog(job.config.run.hang_s, self._note_hang)
        self._ledger = RecordLog(output.ledger())
        self._unwritten: list[ShardResult] = []
        self._written_at = time.monotonic()
        self._failures: dict[str, str] = {}
        self._reused_rows = 0
        self._copied_rows = 0
        self._results: list[dict[str, Any]] = []

    def execute(self, pending: Sequence[Shard], stop: StopSignals) -> None:
        """Run the pending shards on the pool.

        Raises:
            JobFailed: the pool cannot start or the store refuses writes.
            LeaseLost: another start took over.
            Stopped: the user stopped the job; workers have flushed their journals.
        """
        import ray

        self._metrics = JobMetrics(self._config.output)
        board = ray.remote(ProgressBoard).options(num_cpus=0, max_restarts=-1, max_task_retries=3).remote()
        finished = threading.Event()
        printer = threading.Thread(target=self._print_progress, args=(board, finished), daemon=True)
        printer.start()
        self._history.begin()
        if self._routing is not None and (routed := self._routing.report()):
            self._history.note("routing", routed["why"])
        threading.Thread(target=self._history.write_regularly, args=(finished,), name="history", daemon=True).start()
        stop.before = lambda: self._flush_workers(board)
        shards = {shard.index: shard for shard in pending}
        try:
            for result in self._results_of(pending, board):
                self._take(result, shards[result.index])
            if self._apart:
                words = f"suspect rows of {len(self._apart):,} shards are now tried apart"
                _say(self._config, f"engines died; {words}")
                self._history.note("apart", words)
                for result in self._results_of(self._apart, board, apart=True):
                    self._take(result, shards[result.index])
            finished.set()
            printer.join()
            self._look(board)
        except JobFailed as error:
            self._history.end("failed", str(error))
            raise
        except Exception as error:  # Ray and Ray Data raise many kinds; each ends this start
            cause = _root_cause(error)
            self._history.end("failed", cause)
            raise JobFailed(cause) from None
        except Stopped:
            self._history.end("stopped", "by SIGTERM or Ctrl-C")
            raise
        finally:
            stop.before = lambda: None
            finished.set()
            if not self._lease.lost:
                self._write_ledger()
            printer.join(timeout=1)
            self._progress.end()
        self._history.look(_read_board(board, timeout_s=5) or [])
        self._hear_words(board)

    def _results_of(
        self, pending: Sequence[Shard], board: ActorHandle[Any], apart: bool = False
    ) -> Iterator[ShardResult]:
        """Results of shards as a pool of engines is done with them. `apart`: of their suspects, see `attempts`."""
        import logging

        import ray
        from ray.data import ActorPoolStrategy, DataContext

        from pipelines.source import in_flight, stream_shards
        from pipelines.worker import ShardResult, ShardWorker, Task

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A constructor that failed is tried again in a new process, which finds the memory of the old one free. The budget is the
        # pool's, and starts anew with every engine that loads.
        context.max_consecutive_actor_init_deaths = INIT_RETRIES * self._placement.max_actors
        # Shards queue for every actor (below: one more in flight than run at a time) while there are any: then the pool grows up to its
        # maximum, as far as there are GPUs now. It never waits for its minimum.
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        context.execution_no_progress_timeout_s = -1  # a shard may take hours on a small machine
        nodes = max(1, sum(node["Alive"] for node in ray.nodes()))
        # An engine of another kind takes the model as it is given.
        source = None if self._engine is not None else source_of(self._config)
        task = Task(
            self._config.as_dict(),
            self._owner.token if self._owner else "",
            self._name,
            apart,
            self._work.stage,
            None if self._placement.num_gpus else -(-self._placement.max_actors // nodes),
            self._engine,
            source,
            ActorRanks(None if source is None else partial(source.fetch, self._config.run.write_retries))
            if self._placement.spanning
            else None,
        )
        run = self._config.run
        least, most = self._placement.min_actors, self._placement.max_actors
        at_once, given = in_flight(len(pending), least, most, 1 if apart else run.shards_in_flight)
        if self._placement.spanning:
            # They ask for the options of an actor more often than there are actors, and each time would be given a group.
            context.issue_detectors_config.detectors = []
            warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
        with actor_options(self._placement, run.num_cpus, run.label_selector, run.label_fallbacks) as options:
            dataset = stream_shards(pending).map_batches(
                ShardWorker,
                fn_constructor_args=(task, board),
                batch_size=1,
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_concurrent_calls_per_actor=at_once,
                    max_tasks_in_flight_per_actor=given,
                ),
                **options,
            )
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                for text in batch["result"].to_pylist():
                    yield ShardResult(**json.loads(text))

    def _take(self, result: ShardResult, shard: Shard) -> None:
        """Count a shard that a worker is done with."""
        self._lease.check()
        if result.status == "fatal":
            raise JobFailed(f"{result.reason}; {MEND}")
        if result.earlier is not None:
            place = f"rows {shard.first_row} to {shard.first_row + shard.rows - 1} of {shard.file}"
            text = f"shard {shard.index} ({place}), attempt {result.attempt + 1}, after: {result.earlier}"
            self._history.note("retry", text, ago=result.seconds)
        self._history.did(result.worker, result.engine or {})
        self._copied_rows += result.copied_rows
        if result.status == "apart":
            self._apart.append(shard)
            return
        self._results.append({key: value for key, value in asdict(result).items() if key not in ("counts", "engine")})
        self._given_up = self._given_up + 1 if result.gave_up else 0
        if self._given_up >= MAX_GIVEN_UP:
            raise JobFailed(f"engines die whatever they run: {result.reason}")
        if result.status == "failed":
            where = f"{shard.file} rows {shard.first_row} to {shard.first_row + shard.rows - 1}"
            self._failures[where] = result.reason or ""
            self._history.note("failed", f"shard {shard.index} ({where}): {result.reason}")
            return
        self._progress.committed_rows += shard.rows
        self._reused_rows += result.reused_rows
        counts = Counts.from_dict(result.counts or {})
        self._progress.committed_errors += counts.error_rows
        self._metrics.committed(counts)
        counts.error_samples = keep_few(self._error_samples, counts.error_samples)  # so that the ledger stays small
        self._unwritten.append(replace(result, counts=counts.as_dict()))
        if time.monotonic() - self._written_at > self._config.run.journal_flush_s:
            self._write_ledger()

    def _write_ledger(self) -> None:
        """Record counts of committed shards, so that the report needs to read none of them again."""
        self._written_at = time.monotonic()
        if not self._unwritten:
            return
        try:
            entries = [[result.index, result.counts] for result in self._unwritten]
            self._ledger.append(json.dumps(entries).encode())
            self._unwritten.clear()
        except OSError:
            return  # at the latest, the report reads what is missing from the shards' files

    def _print_progress(self, board: ActorHandle[Any], finished: threading.Event) -> None:
        """Thread: sample the board every second."""
        while not finished.wait(1.0):
            workers = self._look(board)
            self._watchdog.look(workers)
            self._history.look(workers)
            self._hear_words(board)

    def _look(self, board: ActorHandle[Any]) -> list[tuple[float, WorkerState]]:
        """Sample the board once, for the lines and for Prometheus; what it says."""
        workers = _read_board(board, timeout_s=5) or []
        self._metrics.look(workers, self._progress.sample(workers), self._progress.total_rows)
        return workers

    def _hear_words(self, board: ActorHandle[Any]) -> None:
        """Note what engines said when they died."""
        import ray

        with suppress(ray.exceptions.RayError):
            for age, word in ray.get(board.words.remote(self._words), timeout=5):
                self._words += 1
                actor = self._history.actor_of(word.node, word.pid, word.birth)
                self._history.note("death", f"{actor} pid {word.pid}: {word.text}", actor, ago=age)

    def _note_hang(self, state: WorkerState) -> None:
        actor = self._history.actor_of(state.node, state.pid, state.birth)
        self._history.note("hang", f"{actor} pid {state.pid} on {state.host} hung and was killed", actor)

    def _flush_workers(self, board: ActorHandle[Any]) -> None:
        """Before the job is stopped: let workers flush their journals, so that the next start repeats nothing that is finished."""
        board.stop.remote()
        self._history.note("stopping", "told to stop; workers flush their journals")
        deadline = time.monotonic() + FLUSH_S
        while (left := deadline - time.monotonic()) > 0:
            workers = _read_board(board, left)
            # One that was silent for so long is dead, or hangs and will not flush either.
            if workers is not None and all(state.flushed for age, state in workers if age < FLUSH_S):
                return
            time.sleep(0.1)

    def merge(self) -> None:
        """Write the output in the order of the input, where engines worked in another one and all shards are done.

        Raises:
            JobFailed: a file cannot be read or written.
        """
        if self._routing is not None and self._work.needs_merge and not self._failures:
            with _as_failures():
                self._routing.merge(self._work, self._lease.check, partial(_say, self._config))

    def finish(self, resumed_rows: int, total_rows: int) -> None:
        """Check the files, mark success, write the report and say how it went.

        Raises:
            JobFailed: a shard failed, or a file is not as planned.
            LeaseLost: another start took over.
        """
        retries = self._config.run.write_retries
        counts = retrying(self._count, retries)
        status = "failed" if self._failures else "finished"
        self._history.end(status, f"{counts.rows:,} of {total_rows:,} rows are done")
        starts = retrying(self._history.starts, retries)
        report = build_report(
            status=status,
            config=self._config.as_dict(),
            counts=counts,
            total_rows=total_rows,
            seconds=self._progress.seconds,
            resumed_rows=resumed_rows,
            reused_rows=self._reused_rows,
            copied_rows=self._copied_rows,
            samples=self._progress.as_list(),
            shards=self._results[-1000:],
            failures=self._failures,
            starts=starts,
            actors=self._history.actors(),
            routing=None if self._routing is None else self._routing.report(),
        )
        try:
            self._confirm()
            retrying(lambda: self._output.put_run("report.json", to_json(report)), retries)
            retrying(lambda: self._output.put_run("report.html", to_html(report)), retries)
            if not self._failures:
                self._answer()
                shards = self._job.shards if self._work.needs_merge else self._work.shards
                self._output.finish(shards, self._confirm, retries, self._job.columns.rows_each)
        except OSError as error:
            raise JobFailed(f"the job could not be finished: {_one_line(error)}; {MEND}") from None
        if self._failures:
            where, reason = next(iter(self._failures.items()))
            raise JobFailed(
                f"{len(self._failures)} of {len(self._work.shards)} shards failed, first {where}: {reason}; "
                "start again to try them again"
            )
        seconds = self._progress.seconds
        copies = f", {self._copied_rows:,} copies" if self._config.run.dedupe else ""
        rate = f", {report['this_start']['generated_tokens'] / seconds:,.0f} tok/s" if seconds else ""
        print(
            f"finished: {counts.rows:,} rows ({counts.error_rows:,} with an error{copies}), {counts.input_tokens:,} tokens in, "
            f"{counts.generated_tokens:,} out, {duration(seconds)}{rate}",
            flush=True,
        )
        _say(self._config, f"output   {self._config.output}\nreport   {self._output.run.child('report.html').path}")

    def _answer(self) -> None:
        """Write the answers to the requests of a batch, where the input is one.

        Raises:
            OSError: a shard cannot be read, or the file not written.
        """
        if self._config.format != "openai_batch":
            return
        answers = BatchResults(self._output, self._job.shards, self._job.columns, model_name(self._config.model))
        retrying(lambda: self._output.put_top(RESULTS, answers.lines()), self._config.run.write_retries)
        repeated, custom_id = retrying(answers.repeated, self._config.run.write_retries)
        if repeated:
            print(
                f"warning: {repeated:,} requests have the custom_id of an earlier one, the first of them {custom_id!r}"
            )
        _say(self._config, f"answers  {self._output.place.child(RESULTS).path}")

    def _confirm(self) -> None:
        """See that the output is this start's, before what only its holder may write.

        Raises:
            LeaseLost: it is not.
            OSError: the store does not say.
        """
        retrying(self._lease.confirm, self._config.run.write_retries)
        if retrying(self._output.succeeded, self._config.run.write_retries):
            raise LeaseLost(
                f"output {self._config.output!r} was finished by another start while this one was suspended"
            )

    def _count(self) -> Counts:
        """Counts of all committed shards: from the ledger, and from the files of the few that no driver lived to record."""
        recorded: dict[int, Counts] = {}
        for payload in read_records(self._output.ledger()):
            for index, counts in json.loads(payload):
                recorded[index] = Counts.from_dict(counts)
        stage, output = self._work.stage, self._work.output
        shards = {shard.index: shard for shard in self._work.shards}
        total = Counts()
        for index in sorted(output.committed()):
            if index not in recorded:
                recorded[index] = count_part(output, shards[index], self._job.columns, stage)
            total.add(recorded[index])
        return total


def _read_board(board: ActorHandle[Any], timeout_s: float) -> list[tuple[float, WorkerState]] | None:
    """What workers reported; None where the board does not answer."""
    import ray

    try:
        states: list[tuple[float, WorkerState]] = ray.get(board.read.remote(), timeout=timeout_s)
        return states
    except ray.exceptions.RayError:
        return None


def _root_cause(error: BaseException) -> str:
    """The engine's or worker's own words, from inside what Ray wraps around them."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        # Ray Data puts a SystemException behind what did not come from a call of the worker: a mark, no cause.
        if not isinstance(inner, BaseException) or type(inner).__name__ == "SystemException":
            break
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if (
        lines and "retried_map_errors" in lines[-1]
    ):  # Ray Data's own advice; what was raised stands before its exception
        end = next((i for i, line in enumerate(lines) if line.startswith("The above exception was the direct")), None)
        lines = lines[:end]
    # A failed constructor comes as the text of its traceback.
    return lines[-1].removeprefix("nanovllm.errors.UserError: ") if lines else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# The demo


def _show_demo(output: OutputDirectory, config: JobConfig) -> None:
    """Some rows of the result, and how many answers are right."""
    prompt, generated = config.prompt.column or "prompt", config.columns.prefix + "generated_text"
    right = rows = 0
    shown: list[tuple[str, str, str]] = []
    for index in sorted(output.committed()):
        table = output.read_part(index, [prompt, generated, "answer"])
        for question, texts, answer in zip(*(column.to_pylist() for column in table.columns), strict=True):
            text = texts[0] if isinstance(texts, list) else texts  # of several samples the first
            rows += 1
            right += (text or "").strip() == answer.strip()
            if len(shown) < 8 and rows % 7 == 1:
                shown.append((question, text, answer))
    print("\nsome rows (without the instruction that all of them share):")
    for question, text, answer in shown:
        row = " ".join(question.split("\n", 1)[-1].split())
        print(f"  {row}  ->  {text}{'' if (text or '').strip() == answer.strip() else f'   (wanted {answer})'}")
    print(f"accuracy {right / rows:.2%} ({right:,} of {rows:,} answers right)")
    report = output.run.child("report.html")
    if exists(report):
        print(f"report   {report.path}")


if __name__ == "__main__":
    status = main()
    # Exit hooks take a second that `ray job stop` may not grant, and could wait for what hangs; and threads of libraries that are
    # still at work when the interpreter goes have been seen to abort a process that was done.
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
