"""Prefix routing: rows that share a prefix are brought together before shards are cut, so that one engine computes it (`run.group_by`,
`run.prefix_sort`). Used by `generate`.

Three stages, whose files are in `OUT/_run/routed/` and appear whole or not at all, so that a start which was killed anywhere is gone on with:

    route     tasks read the input and write sorted runs of it, then files of ranges of keys, in which rows that go together follow one
              another; these are cut into shards as any input is, and `plan.parquet` says that all of it is there
    generate  engines work on these shards. A row carries its place in the input, which its seed follows from, as if it had not moved
    merge     tasks sort the results by position in the input and write the files of the input's own plan: the same, byte for byte, as
              of a job without routing. With `output.order=any` there is no merge, the shards' files are the output

What is sorted is the columns that prompts need, and results; other columns are read from the input when the output is written. Whether
there is any routing at all is decided once, in `OUT/_run/routing.json`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from nanovllm import UserError
from nanovllm.models.config import ModelConfig
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.utils.roofline import H200, Costs
from nanovllm.utils.validation import suggest
from pipelines.columns import OutputColumns, output_columns
from pipelines.commit import OutputDirectory, parquet_bytes
from pipelines.external_sort import KEY, Key, read_marks, read_range, splitters, write_run
from pipelines.inputs import Dataset, InputFile, measure
from pipelines.job import JobConfig, build
from pipelines.models import look
from pipelines.plan import (
    PLACES,
    Shard,
    Stage,
    make_shards,
    read_head,
    read_schema,
    read_shard,
    shards_from_table,
    shards_to_table,
)
from pipelines.prompts import Rendered
from pipelines.requests import Requests, per_row_parameters
from pipelines.row_values import RowError, TokenIds, column_values
from pipelines.sharing import Sharing, estimate
from pipelines.storage import Location, children, delete_tree, exists, put, read, retrying

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESULTS = "_run/routed/results"  # of the shards of a routed stage, below the output

# A key has 4 bytes for every CHUNK_BYTES of a prompt's text; what comes after MOST_BYTES of it moves no row.
CHUNK_BYTES = 64
MOST_BYTES = 32 << 10
# Rows sorted together, by their decoded size: a task needs some four times as much memory. Every range is read from every run, in
# pieces of about READ_BYTES at the least, for which runs and ranges of large datasets grow.
SORT_BYTES = 256 << 20
READ_BYTES = 256 << 10
RUNS = 16  # at least, where there are as many shards, so that a small dataset is not one task's work
MOST_MARKS = 1024  # of a run
SHARDS_EACH = 4  # of a range, at least

LOOK_S = 1.0  # most seconds between looks at the tasks that run

SAMPLE_STRETCHES = 64
FEW_STRETCHES = 8  # where only the size of rows is to be known
SAMPLE_THREADS = 8
SAMPLE_ROWS = 4096
SAMPLE_BYTES = 32 << 20

# What `auto` weighs. Prefill at half of what an H200 can do, so that on slower GPUs it saves more. What the passes take of a core:
# 7.0 s for 100,000 rows of 1.6 KB (2.1 GHz).
GPU_FLOPS = H200.flops / 2
CORE_FLOPS = 40e9
CACHE_TOKENS = 1_000_000  # of an engine that sizes its pool by the memory it finds: an H200's, of a model of 0.6B to 8B
PASS_S = 5.0
PASS_ROW_S = 30e-6
PASS_BYTE_S = 1 / 40e6

Engines = tuple[int, float]  # how many there are, and GPUs of each (0: they run on CPUs)


class Work(NamedTuple):
    """What the engines of a job work on.

    Attributes:
        stage: the rows, as they are or routed.
        shards: of it, in order.
        output: with the files of these shards.
    """

    stage: Stage
    shards: list[Shard]
    output: OutputDirectory

    @property
    def needs_merge(self) -> bool:
        """Whether the files of these shards are not the output yet."""
        return bool(self.stage.parts)

    def left(self) -> list[Shard]:
        """Shards without a file."""
        committed = self.output.committed()
        return [shard for shard in self.shards if shard.index not in committed]


@dataclass(frozen=True)
class Decision:
    """What `routing.json` holds; no later start decides again.

    Attributes:
        routed: whether rows are brought together.
        why: in words.
        row_bytes: of the columns that are sorted, decoded, in the mean.
        figures: what it was decided from, where it was.
    """

    routed: bool
    why: str
    row_bytes: float
    figures: dict[str, float] = field(default_factory=dict)


class Context(NamedTuple):
    """All that a task needs besides its part of the work."""

    settings: dict[str, Any]
    stage: Stage
    batch_rows: int
    group_rows: int


class Routing:
    """The routing of one job, as its driver sees it.

    Args:
        config: of the job.
        stage: the input.
        shards: the input's own plan.
        output: of the job.
    """

    def __init__(self, config: JobConfig, stage: Stage, shards: Sequence[Shard], output: OutputDirectory) -> None:
        self._config = config
        self._stage = stage
        self._shards = list(shards)
        self._starts = list(accumulate((shard.rows for shard in shards), initial=0))
        self._output = output
        self._area = Area(output)
        self._retries = config.run.write_retries
        self.seconds: dict[str, float] = {}

    def report(self) -> dict[str, Any] | None:
        """What the report says; None where nothing was decided."""
        decision = self._decision()
        return None if decision is None else {**asdict(decision), "seconds": self.seconds}

    def found(self) -> Work | None:
        """What engines work on, where earlier starts have come so far; else None."""
        decision = self._decision()
        if decision is None:
            return None
        return self._routed() if decision.routed else Work(self._stage, self._shards, self._output)

    def work(
        self,
        engines: Engines,
        ready: Callable[[], tuple[Requests, PreTrainedTokenizerBase]],
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> Work:
        """Decide, and bring rows together, as far as earlier starts have not. Needs Ray where it is to be done.

        Args:
            engines: of the job.
            ready: makes requests, and the model's tokenizer.
            say: prints a line.
            check: called before something is written; raises where it may not be.

        Raises:
            OSError, pa.ArrowException, ray.exceptions.RayError: a file cannot be read or written.
        """
        decision = self._decision()
        if decision is None:
            decision = self._decide(engines, ready)
            check()
            data = json.dumps(asdict(decision)).encode()
            retrying(lambda: self._output.put_run("routing.json", data), self._retries)
        say(f"routing  {decision.why}")
        if not decision.routed:
            return Work(self._stage, self._shards, self._output)
        return self._routed() or self._route(decision, say, check)

    def merge(self, work: Work, check: Callable[[], None], say: Callable[[str], None]) -> None:
        """Write the output in the order of the input, as far as that is not done. All shards of `work` are committed.

        Raises:
            OSError, pa.ArrowException, ray.exceptions.RayError: a file cannot be read or written.
        """
        began = time.monotonic()
        committed = self._output.committed()
        rows = self._starts[-1]
        most = rows / max(RUNS, self._pieces(self._result_bytes(work)))
        runs, parts = (list(_groups([shard.rows for shard in some], most)) for some in (work.shards, self._shards))
        context = self._context(rows / len(runs), len(parts))
        say(f"routing  {len(work.shards):,} shards are done; their rows go back into the order of the input")
        some = [(context, number, [work.shards[i].index for i in group]) for number, group in enumerate(runs)]
        _each(make_result_run, some, check, self._teller(say, "runs of results sorted"))
        left = [group for group in parts if any(self._shards[i].index not in committed for i in group)]
        groups = [(context, [self._shards[i] for i in g], self._starts[g.start : g.stop + 1], len(runs)) for g in left]
        _each(make_parts, groups, check, self._teller(say, "groups of output files written"))
        self.seconds["merge"] = round(time.monotonic() - began, 2)

    def _decision(self) -> Decision | None:
        place = self._output.run.child("routing.json")
        return Decision(**json.loads(read(place))) if exists(place) else None

    def _decide(self, engines: Engines, ready: Callable[[], tuple[Requests, PreTrainedTokenizerBase]]) -> Decision:
        config = self._config
        stretches = self.sample(SAMPLE_STRETCHES if config.run.prefix_sort == "auto" else FEW_STRETCHES)
        row_bytes = sum(table.nbytes for table in stretches) / max(1, sum(table.num_rows for table in stretches))
        if config.run.group_by is not None:
            return Decision(True, f"rows with equal {config.run.group_by!r} are brought together", row_bytes)
        if config.run.prefix_sort == "on":
            return Decision(True, "rows whose prompts begin alike are brought together", row_bytes)
        sharing = self.sharing(stretches, *ready(), engines[0])
        figures = {name: float(f"{value:.4g}") for name, value in sharing._asdict().items()}
        saves, costs = self._saves(sharing.saved, engines), self._costs(row_bytes)
        figures |= {"saves_s": float(f"{saves:.3g}"), "costs_s": float(f"{costs:.3g}")}
        verdict = "rows are brought together" if saves > costs else "rows stay as they are"
        why = f"{describe(sharing)}: saves engines about {saves:,.1f} s, costs about {costs:,.1f} s; {verdict}"
        return Decision(saves > costs, why, row_bytes, figures)

    def sample(self, stretches: int = SAMPLE_STRETCHES) -> list[pa.Table]:
        """Stretches of rows from all over the input, with the columns that are sorted. What cannot be read is left out: it is told later."""
        schema = _read_columns(self._config, self._stage)
        count = min(stretches, len(self._shards))
        shards = [self._shards[number * len(self._shards) // count] for number in range(count)]

        def head(shard: Shard, rows: int) -> pa.Table:
            try:
                return read_head(self._stage, shard, rows, schema)
            except (OSError, pa.ArrowException):
                return schema.empty_table()

        few = head(shards[0], 16)
        rows = int(SAMPLE_BYTES / (count * few.nbytes / max(1, few.num_rows) + 1))
        rows = max(1, min(rows, SAMPLE_ROWS // count))
        with ThreadPoolExecutor(SAMPLE_THREADS) as pool:
            return list(pool.map(lambda shard: head(shard, rows), shards))

    def sharing(
        self, stretches: Sequence[pa.Table], requests: Requests, tokenizer: PreTrainedTokenizerBase, engines: int
    ) -> Sharing:
        """What the rows of the input share, by some stretches of them."""
        engine = self._config.engine
        cached = min(CACHE_TOKENS, engine.max_num_seqs * engine.max_model_len)
        if engine.num_kvcache_blocks > 0:
            cached = engine.num_kvcache_blocks * engine.kvcache_block_size
        rows = [
            [ids for row in requests.rows(table) if (ids := _token_ids(requests, row, tokenizer)) is not None]
            for table in stretches
        ]
        return estimate(rows, self._starts[-1], engine.kvcache_block_size, cached, max(1, engines))

    def _saves(self, tokens: float, engines: Engines) -> float:
        """Seconds of all engines for the prefill of so many tokens."""
        count, gpus = engines
        model = look(self._config.model, self._config.run.model_cache, weights=False)
        flops = count * gpus * GPU_FLOPS if gpus else _cores() * CORE_FLOPS
        return float(Costs.of(ModelConfig.from_dir(model, ARCHITECTURES), flops=flops).prefill(tokens, 0, 0))

    def _costs(self, row_bytes: float) -> float:
        """Seconds of the passes, on all cores."""
        return PASS_S + self._starts[-1] * (PASS_ROW_S + row_bytes * PASS_BYTE_S) / _cores()

    def _routed(self) -> Work | None:
        """The routed stage, where all of it is there."""
        if not exists(self._area.plan):
            return None
        shards = shards_from_table(pq.read_table(pa.BufferReader(read(self._area.plan))))
        schema = routed_schema(self._config, self._stage)
        if self._config.output_order == "any":
            stage = Stage(self._area.rows, "parquet", schema, self._stage.kept, routed=True)
        else:
            stage = Stage(self._area.rows, "parquet", schema, tuple(PLACES.names), RESULTS, routed=True)
        return Work(stage, shards, OutputDirectory(self._config.output, stage.parts))

    def _route(self, decision: Decision, say: Callable[[str], None], check: Callable[[], None]) -> Work:
        began = time.monotonic()
        check()
        retrying(self._area.make, self._retries)
        rows = self._starts[-1]
        pieces = self._pieces(decision.row_bytes)
        groups = list(_groups([shard.rows for shard in self._shards], rows / max(pieces, RUNS)))
        ranges = max(pieces, min(RUNS, len(self._shards) // SHARDS_EACH))
        context = self._context(rows / len(groups), ranges)
        some = [(context, n, [(self._shards[i], self._starts[i]) for i in group]) for n, group in enumerate(groups)]
        _each(make_run, some, check, self._teller(say, "runs of the input sorted"))
        runs = [self._area.run(number) for number in range(len(groups))]
        cuts = splitters([read_marks(run) for run in runs], ranges)
        bounds = zip([None, *cuts], [*cuts, None], strict=True)
        ordered = [(context, n, low, high, len(runs)) for n, (low, high) in enumerate(bounds)]
        _each(make_rows, ordered, check, self._teller(say, "files of rows in their new order written"))
        files = [
            InputFile(entry.base_name, entry.size or 0, 0)  # an output may be moved, and gets other time stamps
            for entry in children(self._area.rows)
        ]
        _, facts = measure(Dataset(self._area.rows, "parquet", files))
        data = parquet_bytes(shards_to_table(make_shards(self._config, files, facts)))
        check()
        retrying(lambda: put(self._area.plan, data, self._output.scratch), self._retries)
        delete_tree(self._area.runs)
        self.seconds["route"] = round(time.monotonic() - began, 2)
        say(f"routing  {rows:,} rows brought together in {self.seconds['route']:,.1f} s")
        work = self._routed()
        assert work is not None
        return work

    def _context(self, run_rows: float, ranges: int) -> Context:
        """For tasks whose runs have about so many rows and are read for so many ranges."""
        return Context(
            self._config.as_dict(),
            self._stage,
            math.ceil(run_rows / min(MOST_MARKS, 2 * ranges)),
            max(1, max(shard.rows for shard in self._shards) // 4),
        )

    def _teller(self, say: Callable[[str], None], what: str) -> Callable[[int, int], None]:
        """Says from time to time how far a pass is."""
        due = time.monotonic() + self._config.run.progress_s

        def tell(done: int, of: int) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + self._config.run.progress_s
                say(f"routing  {done:,} of {of:,} {what}")

        return tell

    def _pieces(self, row_bytes: float) -> int:
        """How many runs, and ranges, rows of this size are sorted in."""
        total = self._starts[-1] * row_bytes
        return math.ceil(total / max(SORT_BYTES, math.sqrt(total * READ_BYTES))) or 1

    def _result_bytes(self, work: Work) -> float:
        """Mean size of a result, by some of them."""
        some = work.shards[:: max(1, len(work.shards) // SAMPLE_STRETCHES)]
        names = output_columns(self._config, per_row_parameters(self._config, self._stage.schema)).schema.names
        return float(sum(work.output.read_part(s.index, names).nbytes for s in some) / sum(s.rows for s in some))


class Area:
    """Where the files of a routing are."""

    def __init__(self, output: OutputDirectory) -> None:
        self._place = output.routed()
        self.runs = self._place.child("runs")
        self.rows = self._place.child("rows")
        self.plan = self._place.child("plan.parquet")

    def make(self) -> None:
        """Make the directories, where files are in such."""
        if self._place.renames:
            for name in ("runs", "rows", "results", "merge"):
                self._place.fs.create_dir(self._place.child(name).path, recursive=True)

    def run(self, number: int) -> Location:
        """A sorted run of the input."""
        return self.runs.child(f"{number:05d}.arrow")

    def file(self, number: int) -> Location:
        """The rows of a range of keys."""
        return self.rows.child(f"rows-{number:05d}.parquet")

    def result_run(self, number: int) -> Location:
        """A run of results."""
        return self._place.child("merge", f"{number:05d}.arrow")


def check_routing(config: JobConfig, schema: pa.Schema) -> None:
    """Refuse what cannot be routed.

    Raises:
        UserError: a column is missing, or has a name that routing needs.
    """
    if not config.run.may_route:
        return
    name = config.run.group_by
    if name is not None and name not in schema.names:
        raise UserError(f"input has no column {name!r} (run.group_by): {suggest(name, schema.names)}")
    taken = [name for name in (*PLACES.names, KEY) if name in schema.names]
    if taken:
        raise UserError(
            f"input has a column {taken[0]!r}, a name that run.group_by and run.prefix_sort need; rename it"
        )


def describe(sharing: Sharing) -> str:
    """What is shared, in words."""
    now, then = (sharing.tokens - computed for computed in (sharing.as_it_is, sharing.together))
    of = max(1.0, sharing.tokens)
    return (
        f"of {_short(sharing.tokens)} prompt tokens about {now / of:.0%} are shared with rows near by as the input stands, and "
        f"{then / of:.0%} with rows brought together"
    )


def routed_schema(config: JobConfig, stage: Stage) -> pa.Schema:
    """The columns of routed rows: their places, and what prompts need; what the output keeps only where nothing reads the input again."""
    wanted = set(Requests(config, stage.schema).columns)
    if config.output_order == "any":
        wanted.update(stage.kept)
    return pa.schema([*PLACES, *(column for column in stage.schema if column.name in wanted)])


def prompt_key(text: str) -> bytes:
    """Keys that are equal as far as texts are: 4 bytes for each chunk, the last of which may be a shorter one."""
    data = text.encode("utf-8", "surrogatepass")[:MOST_BYTES]
    return b"".join(xxhash.xxh32_digest(data[i : i + CHUNK_BYTES]) for i in range(0, len(data), CHUNK_BYTES))


def value_key(value: object) -> bytes:
    """A key that is equal for equal values."""
    return xxhash.xxh64_digest(repr(value).encode("utf-8", "surrogatepass"))


def group_ends(keys: Sequence[bytes], least: int) -> list[int]:
    """Where to end groups of `least` to twice as many rows, but for the last: after rows that share the least with the one behind them.

    `keys` are sorted.
    """
    ends: list[int] = []
    start = 0
    while len(keys) - start > 2 * least:
        candidates = range(start + least, start + 2 * least + 1)
        end = min(candidates, key=lambda row: _shared(keys[row - 1], keys[row]))
        ends.append(end)
        start = end
    return [*ends, len(keys)] if keys else ends


def _shared(one: bytes, other: bytes) -> int:
    """How many bytes at their beginning are the same."""
    both = min(len(one), len(other))
    differing = int.from_bytes(one[:both], "big") ^ int.from_bytes(other[:both], "big")
    return both - (differing.bit_length() + 7) // 8


# Tasks. Each writes its files whole, does nothing where they are there already, and gives the same ones whenever it runs.


def make_run(context: Context, number: int, shards: Sequence[tuple[Shard, int]]) -> None:
    """Sort some shards of the input, each given with the position of its first row, into a run."""
    config = build(context.settings)
    output = OutputDirectory(config.output)
    place = Area(output).run(number)
    if exists(place):
        return
    stage, requests = context.stage, Requests(config, context.stage.schema)
    schema, read_for = routed_schema(config, stage), _read_columns(config, stage)
    tables = []
    for shard, start in shards:
        table = read_shard(stage.root, stage.format, shard, read_for, config.run.write_retries)
        keys = pa.array(list(_keys(config, requests, table, start)), pa.binary())
        first, rows = shard.first_row, shard.rows
        places = (
            pa.repeat(shard.file, rows),
            pa.array(range(first, first + rows)),
            pa.array(range(start, start + rows)),
        )
        columns = dict(zip(PLACES.names, places, strict=True))
        own = [columns[name] if name in columns else table[name] for name in schema.names]
        tables.append(pa.table([*own, keys], schema=schema.append(pa.field(KEY, pa.binary()))))
    retrying(
        lambda: write_run(place, output.scratch, pa.concat_tables(tables), context.batch_rows), config.run.write_retries
    )


def make_rows(context: Context, number: int, low: Key, high: Key, runs: int) -> None:
    """Write the rows of a range of keys, in row groups that end where rows share little with the next ones."""
    config = build(context.settings)
    output = OutputDirectory(config.output)
    area = Area(output)
    if exists(area.file(number)):
        return
    retries = config.run.write_retries
    table = retrying(lambda: read_range([area.run(run) for run in range(runs)], low, high), retries)
    ends = group_ends(table[KEY].to_pylist(), context.group_rows)
    table = table.drop_columns(KEY)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        for start, end in zip([0, *ends], ends, strict=False):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
    retrying(lambda: put(area.file(number), sink.getvalue(), output.scratch), retries)


def make_result_run(context: Context, number: int, shards: Sequence[int]) -> None:
    """Sort the results of some routed shards by their positions in the input."""
    config = build(context.settings)
    output = OutputDirectory(config.output, RESULTS)
    place = Area(output).result_run(number)
    if exists(place):
        return
    columns, retries = _columns(context, config), config.run.write_retries
    position = PLACES.names[2]
    tables = []
    for shard in shards:
        read_results = partial(output.read_part, shard, [position, *columns.schema.names])
        table = retrying(read_results, retries)
        keys = pa.array([_position_key(row) for row in table[position].to_pylist()], pa.binary())
        results = table.select(columns.schema.names).cast(columns.schema)
        tables.append(results.append_column(KEY, keys))
    retrying(lambda: write_run(place, output.scratch, pa.concat_tables(tables), context.batch_rows), retries)


def make_parts(context: Context, shards: Sequence[Shard], starts: Sequence[int], runs: int) -> None:
    """Commit shards of the input that follow one another, from all results. `starts` has the position of each, and of what comes after.

    Raises:
        OSError: results are missing.
    """
    config = build(context.settings)
    output = OutputDirectory(config.output)
    area, columns, retries = Area(output), _columns(context, config), config.run.write_retries
    stage, requests = context.stage, Requests(config, context.stage.schema)
    places = [area.result_run(run) for run in range(runs)]
    low, high = (_position_key(position) for position in (starts[0], starts[-1]))
    results = retrying(lambda: read_range(places, low, high), retries).drop_columns(KEY)
    each = columns.rows_each
    if results.num_rows != (starts[-1] - starts[0]) * each:
        raise OSError(f"{results.num_rows} results for {(starts[-1] - starts[0]) * each} rows; was a file removed?")
    for shard, start in zip(shards, starts[:-1], strict=True):
        if retrying(partial(output.part_rows, shard.index), retries) == shard.rows * each:
            continue
        table = read_shard(stage.root, stage.format, shard, read_schema(stage, requests), retries)
        generated = results.slice((start - starts[0]) * each, shard.rows * each).combine_chunks()
        whole = columns.join(table.select(stage.kept), generated)
        retrying(partial(output.commit, shard.index, whole), retries)


def _columns(context: Context, config: JobConfig) -> OutputColumns:
    return output_columns(config, per_row_parameters(config, context.stage.schema))


def _read_columns(config: JobConfig, stage: Stage) -> pa.Schema:
    """The input columns that routing reads."""
    names = {*routed_schema(config, stage).names, config.run.group_by}
    return pa.schema([column for column in stage.schema if column.name in names])


def _keys(config: JobConfig, requests: Requests, table: pa.Table, start: int) -> Iterator[bytes]:
    """A key of each row, unlike all others: of equal ones the row that comes first in the input is first."""
    if config.run.group_by is not None:
        found: Iterable[bytes] = map(value_key, column_values(table[config.run.group_by]))
    else:
        found = (_beginning(requests, row) for row in requests.rows(table))
    return (key + _position_key(position) for position, key in enumerate(found, start))


def _beginning(requests: Requests, row: Any) -> bytes:
    try:
        return prompt_key(requests.beginning(row))
    except RowError:
        return b""


def _position_key(position: int) -> bytes:
    return position.to_bytes(8, "big")


def _token_ids(requests: Requests, row: Any, tokenizer: PreTrainedTokenizerBase) -> TokenIds | None:
    """The prompt of a row; None where it is an error row."""
    try:
        prompt = requests.request(row, 0).prompt
        if isinstance(prompt, Rendered):
            return prompt.token_ids(tokenizer)
        return list(tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
    except Exception:  # of a row, as far as it has one; the engine says what is wrong with it
        return None


def _groups(rows: Sequence[int], most: float) -> Iterator[range]:
    """Ranges of consecutive shards of about as many rows, at most `most` where they have more than one shard."""
    start = total = 0
    for number, count in enumerate(rows):
        if total and total + count > most:
            yield range(start, number)
            start, total = number, 0
        total += count
    yield range(start, len(rows))


def _each(
    task: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    check: Callable[[], None],
    tell: Callable[[int, int], None],
) -> None:
    """Run tasks on all nodes, as many at a time as there are cores. They reserve none, which engines of other jobs may hold.

    Args:
        task: called with each of `arguments`.
        check: called all the while; raises where nothing more may be written.
        tell: called with how many are done, and of how many.
    """
    import ray

    remote = ray.remote(task).options(num_cpus=0, scheduling_strategy="SPREAD", name=task.__name__)
    running: list[ray.ObjectRef[None]] = []
    begun = 0
    while running or begun < len(arguments):
        check()
        width = _cores()  # nodes come and go
        while len(running) < width and begun < len(arguments):
            running.append(remote.remote(*arguments[begun]))
            begun += 1
        done, running = ray.wait(running, timeout=LOOK_S)
        ray.get(done)
        tell(begun - len(running), len(arguments))


def _cores() -> int:
    """Of all nodes."""
    import ray

    return max(1, int(sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])))


def _short(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.1f}M"
