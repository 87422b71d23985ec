"""The row path: bad rows are values, other rows do not feel them, and a row's seed depends on its place alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pytest

from nanovllm import AsyncLLM, EngineDeadError, RequestOutput, SamplingParams, UserError
from nanovllm.outputs import error_output
from pipelines.job import PromptConfig, TooLong
from pipelines.predictor import NanoVLLMPredictor
from pipelines.prompts import Prompts
from pipelines.requests import row_seed
from pipelines.results import RowResult
from tests.rows import run_rows

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


def test_more_tokens_than_fit_truncate_to_one(engine: AsyncLLM) -> None:
    (row,) = run(engine, ["some words"], "truncate_right", max_tokens=1000)
    assert row.num_input_tokens == 1


class DyingEngine:
    """Answers short prompts, fails to tokenize one, and dies of another."""

    max_prompt_len = 10

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


def test_a_dead_engine_is_an_exception() -> None:
    with pytest.raises(EngineDeadError, match="rank 1 died"):
        run(DyingEngine(), ["a", "poison", "b"])


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
