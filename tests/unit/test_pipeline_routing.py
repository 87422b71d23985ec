"""Routing without Ray: what goes together, what is decided from a sample, and output that does not show that rows were moved."""

from __future__ import annotations

import asyncio
import csv
import json
import random
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.commit
import pipelines.external_sort
import pipelines.routing
import pipelines.worker
from nanovllm import RequestOutput, SamplingParams, UserError
from nanovllm.engine.stats import EngineStats
from pipelines.commit import OutputDirectory, output_schema
from pipelines.external_sort import KEY, read_marks, read_range, splitters, write_run
from pipelines.inputs import list_dataset, measure
from pipelines.job import build, load
from pipelines.plan import SHARD_SCHEMA, Stage, make_shards
from pipelines.requests import Requests
from pipelines.routing import Routing, Work, check_routing, group_ends, prompt_key, value_key
from pipelines.sharing import estimate
from pipelines.storage import resolve
from pipelines.worker import ShardWorker, Task

ROWS = 90
DOCUMENTS = 9


class SayingEngine:
    """Says back the end of the prompt and the seed, for each sample, and remembers the prompts."""

    tokenizer = None
    max_prompt_len = 10_000

    def __init__(self, model: str, **options: Any) -> None:
        self.prompts: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def shutdown(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 1, 0, 0, 0, 0, 0.0)

    def submit(self, prompt: str, params: SamplingParams) -> Future[RequestOutput]:
        self.prompts.append(prompt)

        def output(sample: int) -> RequestOutput:
            return RequestOutput(
                text=f"{prompt[-9:]} {params.seed} {sample}",
                token_ids=[1, 2],
                finish_reason="stop",
                num_input_tokens=len(prompt),
                num_generated_tokens=2,
                num_cached_tokens=0,
                logprobs=None,
                error=None,
            )

        future: Future[RequestOutput] = Future()
        samples = [output(sample) for sample in range(params.n)]
        future.set_result({**samples[0], "outputs": samples} if params.n > 1 else samples[0])
        return future


class Killed(BaseException):
    """What a SIGKILL is here."""


class Little:
    """A job over some rows about a few documents, run in this process."""

    def __init__(self, root: Path, name: str, **settings: Any) -> None:
        values = {"model": "m", "input": str(root / "in"), "output": str(root / name), **settings}
        values["run"] = {"shard_rows": 7, "write_retries": 0, **settings.get("run", {})}
        self.config = build(values)
        dataset = list_dataset(self.config.input, self.config.format)
        self.schema, facts = measure(dataset)
        self.shards = make_shards(self.config, dataset.files, facts)
        kept = tuple(output_schema(self.schema, self.config.columns.keep).names)
        self.stage = Stage(dataset.root, dataset.format, self.schema, kept)
        self.output = OutputDirectory(self.config.output)
        self.dataset = dataset
        self.prompts: list[list[str]] = []  # of each shard, in order
        self.counts: list[dict[str, Any]] = []

    def run(self) -> None:
        """One start of the job, from wherever it is."""
        owner = self.output.job() or self.output.create({}, self.dataset.format, self.schema, self.shards)
        work = Work(self.stage, self.shards, self.output)
        routing = Routing(self.config, self.stage, self.shards, self.output)
        if self.config.run.may_route:
            work = routing.work((1, 0.0), lambda: pytest.fail("auto only"), lambda line: None, lambda: None)
        task = Task(self.config.as_dict(), owner.token, "first", False, work.stage, None, SayingEngine)
        worker = ShardWorker(task, None)  # type: ignore[arg-type]
        for shard in work.left():
            engine: SayingEngine = worker._engine  # type: ignore[assignment]
            engine.prompts.clear()
            batch = {name: np.array([getattr(shard, name)]) for name in SHARD_SCHEMA.names}
            result = json.loads(asyncio.run(worker(batch))["result"][0])
            assert result["status"] == "done", result
            self.prompts.append(list(engine.prompts))
            self.counts.append(result["counts"])
        if work.needs_merge:
            routing.merge(work, lambda: None, lambda line: None)

    def parts(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(Path(self.config.output).glob("part-*.parquet"))}

    def error_places(self) -> list[tuple[str, int]]:
        return sorted((sample[1], sample[2]) for counts in self.counts for sample in counts["error_samples"])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of rows in random order; some have no prompt. Tasks run here, one after another."""
    rng = random.Random(0)
    documents = ["".join(rng.choice("abcdef ") for _ in range(200)) for _ in range(DOCUMENTS)]
    which = [number % DOCUMENTS for number in range(ROWS)]
    rng.shuffle(which)
    prompts = [None if n % 30 == 7 else f"{documents[d]} row {n:04}" for n, d in enumerate(which)]
    table = pa.table(
        {
            "id": range(ROWS),
            "doc": [f"d{document}" for document in which],
            "prompt": prompts,
            "ids": [prompt and list(prompt.encode()) for prompt in prompts],
            "view": pa.array([f"v{number}" for number in range(ROWS)], pa.string_view()),
            "kind": pa.array([f"k{number % 4}" for number in range(ROWS)]).dictionary_encode(),
            "where": pa.array([{"x": number, "y": None} for number in range(ROWS)]),
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 50), tmp_path / "in" / "a.parquet", row_group_size=20)
    pq.write_table(table.slice(50), tmp_path / "in" / "b.parquet")

    def each(task: Callable[..., None], arguments: Iterable[tuple[Any, ...]], check: object, tell: object) -> None:
        for given in arguments:
            task(*given)

    monkeypatch.setattr(pipelines.routing, "_each", each)
    monkeypatch.setattr(pipelines.worker, "_report_regularly", lambda worker, board: None)
    return tmp_path


ROUTES = {"group_by": {"group_by": "doc"}, "prefix_sort": {"prefix_sort": "on"}}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampling": {"n": 2}, "columns": {"keep": ["id", "where"], "prefix": "p_"}},
        {"sampling": {"n": 2}, "columns": {"samples": "rows"}},
    ],
    ids=["plain", "lists", "rows"],
)
def test_files_are_those_of_a_job_without_routing(root: Path, route: str, settings: dict[str, Any]) -> None:
    plain, routed = Little(root, "plain", **settings), Little(root, "routed", **settings, run=ROUTES[route])
    plain.run()
    routed.run()
    assert len(plain.parts()) > 10
    assert routed.parts() == plain.parts()
    assert routed.error_places() == plain.error_places() == [("a.parquet", 7), ("a.parquet", 37), ("b.parquet", 17)]

    def documents(job: Little) -> int:
        return sum(len({prompt[:200] for prompt in prompts}) for prompts in job.prompts)

    assert documents(routed) <= DOCUMENTS + len(routed.prompts) < documents(plain) / 2
    routed.output.finish(routed.shards, rows_each=2 if "rows" in str(settings) else 1)
    assert not (root / "routed" / "_run" / "routed").exists()


@pytest.mark.parametrize("kind", ["csv", "openai_batch"])
def test_text_formats_route_too(root: Path, kind: str) -> None:
    rows = pq.read_table(root / "in").to_pylist()
    for path in (root / "in").iterdir():
        path.unlink()
    settings: dict[str, Any] = {}
    with (root / "in" / ("a.csv" if kind == "csv" else "a.jsonl")).open("w", newline="") as stream:
        if kind == "csv":
            writer = csv.writer(stream)
            writer.writerow(["id", "prompt"])
            writer.writerows([row["id"], f'{row["prompt"]}\n"quoted"'] for row in rows)
        else:
            settings["format"] = kind
            for row in rows:
                line = {"custom_id": str(row["id"]), "method": "POST", "url": "/v1/completions"}
                stream.write(json.dumps({**line, "body": {"prompt": row["prompt"], "temperature": 0.5}}) + "\n")
    plain, routed = Little(root, "plain", **settings), Little(root, "routed", **settings, run=ROUTES["prefix_sort"])
    plain.run()
    routed.run()
    assert routed.parts() == plain.parts()
    kinds = [sum(len({prompt[:200] for prompt in prompts}) for prompts in job.prompts) for job in (plain, routed)]
    assert kinds[1] < kinds[0] / 2


def test_any_order_has_every_row_once(root: Path) -> None:
    plain = Little(root, "plain")
    routed = Little(root, "routed", run=ROUTES["group_by"], **{"output.order": "any"})
    plain.run()
    routed.run()
    tables = [pq.read_table(root / name) for name in ("plain", "routed")]
    assert tables[0].schema == tables[1].schema
    assert tables[1]["id"].to_pylist() != list(range(ROWS))
    assert sorted(tables[1].to_pylist(), key=lambda row: int(row["id"])) == tables[0].to_pylist()
    places = list(zip(tables[1]["doc"].to_pylist(), tables[1]["id"].to_pylist(), strict=True))
    assert sum(one != other for (one, _), (other, _) in pairwise(places)) == DOCUMENTS - 1
    assert all(one[1] < other[1] for one, other in pairwise(places) if one[0] == other[0])  # of a document as ever


def test_killed_at_any_file_it_ends_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Little(root, "plain")
    plain.run()
    put = pipelines.commit.put
    lives = 0

    def die_some_day(place: Any, data: Any, scratch: Any) -> None:
        nonlocal lives
        lives -= 1
        if lives < 0 and random.getrandbits(1):  # before the file, or right after it
            put(place, data, scratch)
        if lives < 0:
            raise Killed
        put(place, data, scratch)

    for module in (pipelines.commit, pipelines.external_sort, pipelines.routing):
        monkeypatch.setattr(module, "put", die_some_day)
    routed = Little(root, "routed", run=ROUTES["prefix_sort"])
    deaths = 0
    while True:
        lives = 4
        try:
            routed.run()
            break
        except Killed:
            deaths += 1
            assert routed.parts().items() <= plain.parts().items()
    assert deaths > 8
    assert routed.parts() == plain.parts()
    assert sum(map(len, routed.prompts)) <= ROWS  # what is done is not done again


def test_what_is_decided_stays_decided(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Little(root, "routed", run=ROUTES["group_by"])
    job.run()
    monkeypatch.setattr(pipelines.routing, "make_run", lambda *given: pytest.fail("rows are together already"))
    job.run()
    routing = Routing(job.config, job.stage, job.shards, job.output)
    assert routing.found() is not None
    job.output.put_run("routing.json", json.dumps({"routed": False, "why": "", "row_bytes": 1.0}).encode())
    found = routing.found()
    assert found is not None
    assert found.shards == job.shards
    assert not found.needs_merge


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize(("flops", "column"), [(1e5, "ids"), (1e15, "prompt")])
def test_a_sample_decides(
    root: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, flops: float, column: str
) -> None:
    """A slow engine saves more than the passes cost, a fast one does not."""
    monkeypatch.setattr(pipelines.routing, "_cores", lambda: 2)
    monkeypatch.setattr(pipelines.routing, "CORE_FLOPS", flops)
    engine = {"kvcache_block_size": 16, "num_kvcache_blocks": 40}
    prompt = {"column": column}
    job = Little(root, "routed", model=str(model_dir), engine=engine, prompt=prompt, run={"prefix_sort": "auto"})
    routing = Routing(job.config, job.stage, job.shards, job.output)
    job.output.create({}, job.dataset.format, job.schema, job.shards)
    said: list[str] = []
    ready = (Requests(job.config, job.schema), Bytes())
    work = routing.work((1, 0.0), lambda: ready, said.append, lambda: None)  # type: ignore[arg-type,return-value]
    decision = routing.report()
    assert decision is not None
    assert decision["routed"] == work.stage.routed == (flops == 1e5)
    figures = decision["figures"]
    assert figures["tokens"] == pytest.approx(ROWS * 209, rel=0.05)
    assert figures["together"] < 0.25 * figures["tokens"] < 0.6 * figures["tokens"] < figures["as_it_is"]
    assert (figures["saves_s"] > figures["costs_s"]) == decision["routed"]
    assert ("rows are brought together" if decision["routed"] else "rows stay as they are") in said[0]
    again = Routing(job.config, job.stage, job.shards, job.output).found()
    assert again is not None
    assert again.shards == work.shards


def test_runs_and_ranges_hold_all_rows_in_order(tmp_path: Path) -> None:
    rng = random.Random(3)
    root = resolve(str(tmp_path))
    runs, every = [], []
    for number in range(6):
        keys = [bytes(rng.choices(range(3), k=rng.randint(0, 4))) for _ in range(rng.randint(1, 300))]
        own = [(key, number, row) for row, key in enumerate(keys)]
        table = pa.table({KEY: pa.array(keys, pa.binary()), "run": [number] * len(keys), "row": range(len(keys))})
        runs.append(root.child(f"{number}.arrow"))
        write_run(runs[-1], root.child("tmp"), table, 16)
        every += own
    cuts = splitters([read_marks(run) for run in runs], 8)
    assert 4 <= len(cuts) <= 7
    found = []
    for low, high in zip([None, *cuts], [*cuts, None], strict=True):
        table = read_range(runs, low, high)
        found += list(zip(*(table[name].to_pylist() for name in (KEY, "run", "row")), strict=True))
    assert found == sorted(every)


def test_splitters_make_even_ranges_whatever_the_keys(tmp_path: Path) -> None:
    root = resolve(str(tmp_path))
    runs = []
    for number in range(8):  # half of all rows have one value; each run has values of its own besides
        values = [b"same" if row % 2 else bytes([number, row % 7]) for row in range(400)]
        keys = [value + (400 * number + row).to_bytes(8, "big") for row, value in enumerate(values)]
        runs.append(root.child(str(number)))
        write_run(runs[-1], root.child("tmp"), pa.table({KEY: pa.array(keys, pa.binary())}), 20)
    cuts = splitters([read_marks(run) for run in runs], 10)
    sizes = [read_range(runs, low, high).num_rows for low, high in zip([None, *cuts], [*cuts, None], strict=True)]
    assert len(sizes) == 10
    assert sum(sizes) == 3200
    assert max(sizes) < 2 * 320


def test_keys_are_equal_as_far_as_texts_are() -> None:
    text = "".join(map(chr, range(32, 92))) * 10
    other = text[:500] + "!" + text[501:]
    one, two = prompt_key(text), prompt_key(other)
    shared = 500 // 64 * 4
    assert one[:shared] == two[:shared]
    assert one[shared : shared + 4] != two[shared : shared + 4]
    assert prompt_key("") == b""
    assert len(prompt_key("x" * 10_000_000)) == 2048
    assert value_key(None) == value_key(None) != value_key("None")
    assert prompt_key("half \ud800 a pair")


def test_groups_end_where_rows_share_least() -> None:
    keys = sorted(f"{group:02}{row:03}".encode() for group in range(6) for row in range(10))
    assert group_ends(keys, 8) == [10, 20, 30, 40, 50, 60]
    assert group_ends(keys, 100) == [60]
    assert group_ends([], 3) == []


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ({"template": "{{ b }} then {{ a }}"}, {"a": ["1", "2"], "b": ["same", "same"]}),
        (
            {"messages": "talk"},
            {"talk": [json.dumps([{"role": "user", "content": f"same {n}"}]) for n in range(2)]},
        ),
        ({"column": "ids"}, {"ids": [[5, 6, 7, 8, 1], [5, 6, 7, 8, 2]]}),
    ],
    ids=["template", "messages", "ids"],
)
def test_beginnings_of_all_kinds_of_prompts(prompt: dict[str, Any], rows: dict[str, Any]) -> None:
    config = build({"model": "m", "input": "i", "output": "o", "prompt": prompt})
    table = pa.table(rows)
    requests = Requests(config, table.schema)
    one, two = map(requests.beginning, requests.rows(table))
    assert one != two
    assert one[:7] == two[:7]


def prompts_of(documents: list[int]) -> list[list[int]]:
    """Rows of an instruction of 64 tokens, a document of 192, and a question of their own."""
    return [
        [1] * 64 + [document] + [(document * 7919 + 13 * i) % 5000 for i in range(191)] + [-number] * 20
        for number, document in enumerate(documents)
    ]


def sampled(rows: list[int]) -> list[list[list[int]]]:
    return [prompts_of(rows[start : start + 32]) for start in range(0, len(rows), len(rows) // 32)][:32]


@pytest.mark.parametrize(
    ("questions", "shuffled", "as_it_is", "together"),
    [(8, True, 0.75, 0.16), (8, False, 0.17, 0.16), (1, True, 0.77, 0.77), (50_000, True, 0.07, 0.07)],
    ids=["shuffled", "sorted", "nothing shared", "all shared"],
)
def test_sharing_is_told_from_a_sample(questions: int, shuffled: bool, as_it_is: float, together: float) -> None:
    rows = [number // questions for number in range(50_000)]
    if shuffled:
        random.Random(1).shuffle(rows)
    found = estimate(sampled(rows), len(rows), block=64, cached_tokens=20_000, engines=2)
    assert found.tokens == pytest.approx(276 * 50_000)
    assert found.together / found.tokens == pytest.approx(together, abs=0.06)
    assert found.as_it_is / found.tokens == pytest.approx(as_it_is, abs=0.06)


def test_a_cache_that_holds_all_leaves_little_to_save() -> None:
    rows = [number // 8 for number in range(4000)]
    random.Random(1).shuffle(rows)
    small, large = (estimate(sampled(rows), 4000, 64, tokens, engines=2) for tokens in (20_000, 10_000_000))
    assert 0.02 * small.saved < large.saved < 0.2 * small.saved  # both engines compute most documents
    assert estimate(sampled(rows), 4000, 64, 10_000_000, engines=1).saved == pytest.approx(0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["run.group_by=doc", "run.prefix_sort=auto"], "group_by and prefix_sort both say"),
        (["run.prefix_sort=always"], "run.prefix_sort='always'"),
        (["output.order=any"], "output.order=any is for jobs with run.group_by or run.prefix_sort"),
        (["output.order=random", "run.group_by=doc"], "output.order='random'"),
        (
            ["output.order=any", "run.group_by=custom_id", "format=openai_batch"],
            "answers stand in the order of the input",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(["--model", "m", "--input", "i", "--output", "o", *settings])


def test_columns_that_cannot_route_are_refused() -> None:
    paths = {"model": "m", "input": "i", "output": "o"}
    config = build({**paths, "run": {"group_by": "dox"}})
    with pytest.raises(UserError, match=r"input has no column 'dox' \(run.group_by\): did you mean 'doc'"):
        check_routing(config, pa.schema([("doc", pa.string())]))
    with pytest.raises(UserError, match=r"'_input_row', a name that run.group_by and run.prefix_sort need"):
        check_routing(config, pa.schema([("dox", pa.string()), ("_input_row", pa.string())]))
    check_routing(build(paths), pa.schema([("_input_row", pa.string())]))


def test_switches_and_order_are_read_as_yaml_has_them(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("model: m\ninput: i\noutput: {order: any}\nrun: {prefix_sort: on}\n")
    config = load(["--config", str(job), "--output", "o"]).config
    assert (config.run.prefix_sort, config.output_order, Path(config.output).name) == ("on", "any", "o")
    assert "output.order: any" in config.as_yaml()
    assert (
        load(["--config", str(job), "--output", "o", "run.prefix_sort=off", "output.order=input"]).config.run.may_route
        is False
    )
