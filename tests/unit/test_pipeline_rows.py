"""The row path: bad rows are values, other rows do not feel them, and a row's seed depends on its place alone."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer

from nanovllm import AsyncLLM, EngineDeadError, RequestOutput, SamplingParams, UserError
from nanovllm.engine.stats import EngineStats
from nanovllm.outputs import error_output
from pipelines.inputs import BATCH_SCHEMA
from pipelines.job import PromptConfig, TooLong
from pipelines.predictor import NanoVLLMPredictor
from pipelines.prompts import Prompts
from pipelines.requests import Requests, row_seed
from pipelines.results import RowResult
from pipelines.rows import ROWS_AHEAD, SUBMIT_ROWS, RowPath
from tests.rows import Settings, run_rows
from tests.unit.test_chat import bos_model

LONG = "many words " * 400


@pytest.fixture(scope="module")
def engine(chat_model_dir: Path) -> Iterator[AsyncLLM]:
    """A tiny engine whose KV pool holds 6 blocks of 16 tokens and whose model could take 128."""
    engine = AsyncLLM(
        str(chat_model_dir), max_model_len=128, kvcache_block_size=16, num_kvcache_blocks=6, max_num_seqs=8
    )
    yield engine
    engine.shutdown()


def run(engine: object, values: list[object], too_long: TooLong = "error", max_tokens: int = 5) -> list[RowResult]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return run_rows(engine, values, [row_seed(0, str(value)) for value in values], sampling, too_long)


def test_bad_rows_are_values_and_others_do_not_feel_them(engine: AsyncLLM) -> None:
    good: list[object] = [f"row {number}" for number in range(20)]
    bad: list[object] = [None, "", math.nan, 7, LONG]
    alone = run(engine, good)
    assert all(row.error is None and row.samples[0].num_generated_tokens == 5 for row in alone)
    mixed = run(engine, [value for pair in zip(good, bad * 4, strict=True) for value in pair])
    assert mixed[::2] == alone
    errors = mixed[1::2]
    assert all((row.samples[0].finish_reason, row.samples[0].text) == ("error", None) for row in errors)
    assert [row.error for row in errors[:4]] == [
        "prompt is null",
        "prompt is empty",
        "prompt is null",
        "prompt is int, not a string",
    ]
    assert errors[4].num_input_tokens == len(engine.encode(LONG))
    assert errors[4].error is not None
    assert "\n" not in errors[4].error


def test_a_prompt_larger_than_the_pool_is_an_error_row(engine: AsyncLLM) -> None:
    text = "x" * 100
    assert engine.max_prompt_len < len(engine.encode(text)) < engine.max_model_len
    fits, too_large = run(engine, ["x" * 80, text])
    assert fits.error is None
    assert too_large.error is not None
    assert str(len(engine.encode(text))) in too_large.error


@pytest.mark.parametrize("too_long", ["truncate_left", "truncate_right"])
def test_truncation_leaves_room_for_the_output(engine: AsyncLLM, too_long: TooLong) -> None:
    ids = engine.encode(LONG)
    room = engine.max_prompt_len + 1 - 30
    kept = ids[-room:] if too_long == "truncate_left" else ids[:room]
    short, cut, null = run(engine, ["short", LONG, None], too_long, max_tokens=30)
    (sample,) = cut.samples
    assert (cut.num_input_tokens, sample.num_generated_tokens, sample.finish_reason) == (room, 30, "length")
    future = engine.submit(kept, SamplingParams(max_tokens=30, ignore_eos=True, seed=row_seed(0, LONG)))
    assert future.result()["text"] == sample.text
    assert short == run(engine, ["short"], "error", max_tokens=30)[0]
    assert null.error == "prompt is null"


class Watched:
    """An engine that notes what it is asked to tokenize and to run."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self.tokenizer, self.max_prompt_len = engine.tokenizer, engine.max_prompt_len
        self.alone: list[str] = []
        self.together: list[int] = []
        self.submitted: list[str | list[int]] = []

    def encode(self, text: str) -> list[int]:
        self.alone.append(text)
        return self._engine.encode(text)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        self.together.append(len(texts))
        return self._engine.encode_batch(texts, add_special_tokens)

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        self.submitted.append(prompt)
        return self._engine.submit(prompt, params)

    def stats(self) -> EngineStats:
        return self._engine.stats()


@pytest.fixture(scope="module")
def bos_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    """Its tokenizer puts a BOS before a text, as its chat template does, and its file asks to cut and to pad texts."""
    path = bos_model(tmp_path_factory.mktemp("bos") / "model")
    inner = Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.enable_truncation(8)
    inner.enable_padding()
    inner.save(str(path / "tokenizer.json"))
    engine = AsyncLLM(str(path), max_model_len=128, kvcache_block_size=16, num_kvcache_blocks=16, max_num_seqs=8)
    yield engine
    engine.shutdown()


def batch_rows(*bodies: dict[str, object]) -> pa.Table:
    """Lines of OpenAI's format: chats where they have messages, completions where not."""
    urls = ["/v1/chat/completions" if "messages" in body else "/v1/completions" for body in bodies]
    texts = [json.dumps({"max_tokens": 2, **body}) for body in bodies]
    columns = {"custom_id": [str(number) for number in range(len(bodies))], "method": ["POST"] * len(bodies)}
    return pa.table({**columns, "url": urls, "body": texts}, schema=BATCH_SCHEMA)


def run_batch(engine: Any, *bodies: dict[str, object], too_long: TooLong = "error") -> list[RowResult]:
    table = batch_rows(*bodies)
    requests = Requests(Settings(SamplingParams(ignore_eos=True), format="openai_batch"), table.schema)
    requests.attach(engine.tokenizer, "m")
    found: dict[int, RowResult] = {}
    path = RowPath(engine, too_long)
    asyncio.run(path.run(requests, requests.rows(table), [5] * len(bodies), found.__setitem__))
    return [found[number] for number in range(len(bodies))]


def say(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


AWKWARD = [
    "",
    " ",
    "\n\n\t",
    "a\0b",
    "\ufeffbom",
    "e\u0301 \u00e9",
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f98a" * 9,
    "<|endoftext|>the<|im_start|>",
    "the quick " * 300,
]


@pytest.mark.parametrize("special", [True, False])
def test_texts_tokenized_together_are_what_they_are_alone(bos_engine: AsyncLLM, special: bool) -> None:
    tokenizer = bos_engine.tokenizer
    assert tokenizer is not None
    together = bos_engine.encode_batch(AWKWARD, special)
    assert together == [tokenizer.encode(text, add_special_tokens=special) for text in AWKWARD]
    if special:
        assert together == [bos_engine.encode(text) for text in AWKWARD]
    assert len(together[-1]) > 600  # neither cut
    assert len(together[1]) < 3  # nor padded
    assert bos_engine.encode_batch([], special) == []


def test_rows_are_tokenized_in_groups_and_begin_in_order(engine: AsyncLLM) -> None:
    watched, begun = Watched(engine), []
    values = [f"row {number}" if number % 10 else None for number in range(150)]
    requests = Requests(Settings(SamplingParams(max_tokens=1)), pa.schema([("prompt", pa.string())]))
    path = RowPath(watched, "error")  # type: ignore[arg-type]
    rows = [{"prompt": value} for value in values]
    run = path.run(requests, rows, range(150), lambda *_: None, lambda position, _: begun.append(position))
    asyncio.run(run)
    assert begun == list(range(150))
    assert watched.alone == []
    assert [count for count in watched.together if count] == [57, 58, 20]
    assert watched.submitted == [engine.encode(value) for value in values if value is not None]


def test_special_tokens_come_once(bos_engine: AsyncLLM) -> None:
    tokenizer, watched = bos_engine.tokenizer, Watched(bos_engine)
    assert tokenizer is not None
    results = run_batch(
        watched,
        say("the fox"),
        {"prompt": "the fox"},
        {"prompt": "the fox", "add_special_tokens": False},
        {"prompt": [4, 5]},
        say("a dog"),
    )
    assert [row.error for row in results] == [None] * 5
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    bare = tokenizer.encode("the fox", add_special_tokens=False)
    turn = "<|endoftext|><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    chats = [tokenizer.encode(turn(text), add_special_tokens=False) for text in ("the fox", "a dog")]
    assert watched.submitted == [chats[0], [bos, *bare], bare, [4, 5], chats[1]]
    assert [ids.count(bos) for ids in watched.submitted] == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("too_long", ["error", "truncate_left"])
def test_half_a_surrogate_pair_costs_its_own_row(engine: AsyncLLM, too_long: TooLong) -> None:
    # JSON may hold one, and a tokenizer refuses all texts of a call for it.
    why = "TextEncodeInput must be Union[TextInputSequence, Tuple[InputSequence, InputSequence]]"
    good = [say("a fox"), {"prompt": "a dog"}, {"prompt": "a cat", "add_special_tokens": False}]
    odd = [say("\ud83d"), {"prompt": "\ud83d"}, {"prompt": "\ud83d", "add_special_tokens": False}]
    alone = run_batch(engine, *good, too_long=too_long)
    assert [row.error for row in alone] == [None] * 3
    mixed = run_batch(engine, *(body for pair in zip(good, odd, strict=True) for body in pair), too_long=too_long)
    assert mixed[::2] == alone
    plain = "the prompt cannot be tokenized" if too_long == "error" else "prompt cannot be tokenized"
    assert [row.error for row in mixed[1::2]] == [
        f"the chat template refuses the messages: {why}",
        f"{plain}: {why}",
        f"prompt cannot be tokenized: {why}",
    ]
    assert all((row.num_input_tokens, row.samples[0].finish_reason) == (0, "error") for row in mixed[1::2])


def test_of_two_errors_a_rendered_prompts_comes_first(engine: AsyncLLM) -> None:
    first, second, third = run_batch(
        engine, {**say("\ud83d"), "top_p": 7}, {**say("fine"), "top_p": 7}, {"prompt": "\ud83d", "top_p": 7}
    )
    assert first.error is not None
    assert first.error.startswith("the chat template refuses the messages: TextEncodeInput")
    assert second.error == third.error
    assert second.error is not None
    assert second.error.startswith("top_p=7")


def test_a_tokenizer_with_a_chat_of_its_own_makes_the_tokens(engine: AsyncLLM) -> None:
    tokenizer = copy.copy(engine.tokenizer)

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:
            return [7, 8] if tokenize else "no text has these tokens"

    tokenizer.__class__ = Own
    watched = Watched(engine)
    watched.tokenizer = tokenizer
    (row,) = run_batch(watched, say("hi"))
    assert row.error is None
    assert watched.submitted == [[7, 8]]


def test_more_tokens_than_fit_truncate_to_one(engine: AsyncLLM) -> None:
    (row,) = run(engine, ["some words"], "truncate_right", max_tokens=1000)
    assert row.num_input_tokens == 1


class DyingEngine:
    """Answers short prompts, fails to tokenize one, and dies of another."""

    max_prompt_len = 10
    tokenizer = None

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        future: Future[RequestOutput] = Future()
        if prompt == "odd":
            raise RuntimeError("cannot\nencode")
        if prompt == "poison":
            future.set_exception(EngineDeadError("rank 1 died"))
        else:
            future.set_result(error_output("fine"))
        return future

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0, 0.0)


def test_a_text_the_tokenizer_refuses_is_an_error_row() -> None:
    assert [row.error for row in run(DyingEngine(), ["a", "odd"])] == [
        "fine",
        "prompt cannot be tokenized: cannot encode",
    ]


def test_every_row_gets_its_own_seed() -> None:
    class Echo(DyingEngine):
        def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
            future: Future[RequestOutput] = Future()
            future.set_result({**error_output(f"{prompt} {params.seed}")})
            return future

    values: list[object] = [f"row {number}" for number in range(150)]
    assert [row.error for row in run(Echo(), values)] == [f"{value} {row_seed(0, str(value))}" for value in values]


class HeldEngine(DyingEngine):
    """Ends no row by itself."""

    def __init__(self, rows: int) -> None:
        self.futures: list[Future[RequestOutput]] = []
        self.has_all = threading.Event()
        self._rows = rows

    def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
        self.futures.append(Future())
        if len(self.futures) == self._rows:
            self.has_all.set()
        return self.futures[-1]


async def run_held(
    engine: HeldEngine, rows: int, done: Callable[[int, RowResult], None], then: Callable[[asyncio.Task[None]], None]
) -> None:
    """Run some rows; `then` is called on the event loop when the engine has them all."""
    requests = Requests(Settings(SamplingParams()), pa.schema([("prompt", pa.string())]))
    path = RowPath(engine, "error")  # type: ignore[arg-type]
    task = asyncio.create_task(path.run(requests, [{"prompt": "a"}] * rows, [0] * rows, done))
    await asyncio.get_running_loop().run_in_executor(None, engine.has_all.wait, 60)
    await asyncio.sleep(0.1)  # the row path's own threads are done
    then(task)
    await task


def test_rows_that_end_together_wake_the_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wake it costs the engine's thread a wait for Python's lock."""
    engine, found, wakes = HeldEngine(500), dict[int, RowResult](), []

    def end(task: asyncio.Task[None]) -> None:
        monkeypatch.setattr(task.get_loop(), "call_soon_threadsafe", lambda call: wakes.append(call))
        for number, future in enumerate(engine.futures):
            future.set_result(error_output(f"row {number}"))
        monkeypatch.undo()
        task.get_loop().call_soon(wakes[0])

    asyncio.run(run_held(engine, 500, found.__setitem__, end))
    assert [found[number].error for number in range(500)] == [f"row {number}" for number in range(500)]
    assert len(wakes) == 1


def test_rows_are_made_as_the_engine_takes_them() -> None:
    """Their making takes Python's lock from its steps."""

    class Slots(HeldEngine):
        """Runs up to 400 rows at once, and ends them when it is told to."""

        running = 0

        def stats(self) -> EngineStats:
            left = sum(not future.done() for future in self.futures)
            self.running = min(400, left)
            return super().stats()._replace(num_running=self.running, num_waiting=left - self.running)

    engine, found, made = Slots(3000), dict[int, RowResult](), []

    async def run() -> None:
        requests = Requests(Settings(SamplingParams()), pa.schema([("prompt", pa.string())]))
        path = RowPath(engine, "error")  # type: ignore[arg-type]
        task = asyncio.create_task(path.run(requests, [{"prompt": "a"}] * 3000, [0] * 3000, found.__setitem__))
        while not task.done():
            count = -1
            while count != len(engine.futures):  # as many as it is given
                count = len(engine.futures)
                await asyncio.sleep(0.2)
            made.append(count)
            for future in engine.futures[-count:]:
                if not future.done():
                    future.set_result(error_output("fine"))
        await task

    asyncio.run(run())
    assert len(found) == 3000
    # What runs, as many again that wait, and what is made at once; never an engine that runs fewer than it could.
    given = [now - before for before, now in itertools.pairwise([0, *made])]
    assert all(800 <= count <= 800 + 2 * SUBMIT_ROWS for count in given[1:-2]), given
    assert max(given) <= 800 + 2 * SUBMIT_ROWS


def test_an_engine_that_died_keeps_nobody_waiting(chat_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncLLM(str(chat_model_dir), max_model_len=128, kvcache_block_size=16, num_kvcache_blocks=6)
    waits, dies = threading.Event(), threading.Event()

    def step() -> list[object]:
        if not waits.is_set():  # the next one finds all these rows waiting
            while engine.stats().num_waiting < ROWS_AHEAD:
                time.sleep(0.01)
            waits.set()
            return []
        dies.wait(60)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine._engine, "step", step)

    async def run() -> None:
        requests = Requests(Settings(SamplingParams()), pa.schema([("prompt", pa.string())]))
        path = RowPath(engine, "error")
        calls = [path.run(requests, [{"prompt": "a"}] * 2000, [0] * 2000, lambda *_: None) for _ in range(2)]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.get_running_loop().run_in_executor(None, waits.wait, 60)
        await asyncio.sleep(0.3)
        dies.set()
        for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60):
            assert isinstance(result, EngineDeadError)

    asyncio.run(run())


def test_calls_are_served_one_after_another() -> None:
    """Else they would all end at about the same time, and the engine run empty before new ones have begun."""
    served: list[str] = []

    class Noting(DyingEngine):
        def submit(self, prompt: str | list[int], params: SamplingParams) -> Future[RequestOutput]:
            served.append(str(prompt))
            return super().submit(prompt, params)

    async def run() -> None:
        requests = Requests(Settings(SamplingParams()), pa.schema([("prompt", pa.string())]))
        path = RowPath(Noting(), "error")  # type: ignore[arg-type]
        rows = [[{"prompt": name}] * 300 for name in "abc"]
        await asyncio.gather(*(path.run(requests, some, [0] * 300, lambda *_: None) for some in rows))

    asyncio.run(run())
    assert served == ["a"] * 300 + ["b"] * 300 + ["c"] * 300


@pytest.mark.parametrize("why", ["cancelled", "done raises"])
def test_rows_that_nobody_waits_for_are_cancelled(why: str) -> None:
    engine = HeldEngine(100)

    def done(position: int, result: RowResult) -> None:
        raise KeyError("no place for it")

    def end(task: asyncio.Task[None]) -> None:
        if why == "cancelled":
            task.cancel()
        else:
            engine.futures[3].set_result(error_output("first"))

    with pytest.raises(asyncio.CancelledError if why == "cancelled" else KeyError):
        asyncio.run(run_held(engine, 100, done, end))
    assert [future.cancelled() for future in engine.futures].count(False) == (why != "cancelled")


def test_a_dead_engine_is_an_exception() -> None:
    with pytest.raises(EngineDeadError, match="rank 1 died"):
        run(DyingEngine(), ["a", "poison", "b"])


def test_results_that_come_with_the_engines_death_count() -> None:
    found: dict[int, RowResult] = {}
    engine = HeldEngine(4)

    def end(task: asyncio.Task[None]) -> None:
        for number, future in enumerate(engine.futures):
            if number % 2:
                future.set_result(error_output(f"row {number}"))
            else:
                future.set_exception(EngineDeadError("rank 1 died"))

    with pytest.raises(EngineDeadError, match="rank 1 died"):
        asyncio.run(run_held(engine, 4, found.__setitem__, end))
    assert {number: result.error for number, result in found.items()} == {1: "row 1", 3: "row 3"}
    assert not any(future.cancelled() for future in engine.futures)  # they tell what it died of


def test_seeds_depend_on_each_part_of_the_place() -> None:
    seeds = {
        row_seed(*place) for place in [(0, "a", 1, 0), (1, "a", 1, 0), (0, "b", 1, 0), (0, "a", 2, 0), (0, "a", 1, 1)]
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "part.parquet", 12, 0) == 4688273492894331153
    assert row_seed(0, "\ud800") != row_seed(0, "a")


def test_columns_are_checked() -> None:
    schema = pa.schema([("text", pa.string()), ("n", pa.int64()), ("error", pa.string())])
    with pytest.raises(UserError, match=r"no column 'txt'.*did you mean 'text'"):
        Prompts(PromptConfig(column="txt"), schema)
    with pytest.raises(UserError, match=r"'n' .*is int64; prompts are strings"):
        Prompts(PromptConfig(column="n"), schema)
    Prompts(PromptConfig(column="text"), pa.schema([("text", pa.dictionary(pa.int32(), pa.large_string()))]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt_column": "x"}, "unknown option 'promt_column': did you mean 'prompt_column'?"),
        ({"max_model_length": 3}, "unknown option 'max_model_length': did you mean 'max_model_len'?"),
        ({"sampling_params": {"max_token": 3}}, "unknown sampling parameter 'max_token': did you mean 'max_tokens'?"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens=0: must be"),
        ({"sampling_params": SamplingParams(temperature=math.nan)}, "temperature=nan: must be"),
        ({"too_long": "cut"}, "too_long='cut'"),
        ({"samples": "row"}, "samples='row'"),
        ({"kvcache_block_size": 7}, "must be a power of two"),
    ],
)
def test_the_predictor_refuses_before_it_loads(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        NanoVLLMPredictor("no-such-model", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_the_predictor_refuses_what_cannot_be_compiled_before_it_loads(chat_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chat_model_dir, model)
    (model / "model.safetensors").unlink()  # loading would say so
    for sampling, message in (
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "json cannot be compiled"),
        ({"allowed_token_ids": [99999]}, "allowed_token_ids holds 99999"),
    ):
        with pytest.raises(UserError, match=message):
            NanoVLLMPredictor(str(model), sampling)
    with pytest.raises(UserError, match="safetensors"):
        NanoVLLMPredictor(str(model), {"structured_outputs": {"choice": ["a", "b"]}})
