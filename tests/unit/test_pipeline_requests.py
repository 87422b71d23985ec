"""From a job's settings and a table to requests: what prompts and parameters a user's rows get, and what is refused or an error row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm import SamplingParams, UserError
from pipelines.inputs import list_dataset, measure
from pipelines.job import JobConfig, build, load
from pipelines.plan import identity
from pipelines.prompts import Rendered
from pipelines.requests import Request, Requests, per_row_parameters, row_seed
from pipelines.row_values import RowError

JOB = {"model": "m", "input": "i", "output": "o"}
TABLE = pa.table(
    {
        "prompt": ["the fox", "the dog", None],
        "title": ["One", None, "Three"],
        "words": pa.array([1, 2, 3], pa.int32()),
        "ids": pa.array([[5, 6], [], None], pa.list_(pa.int64())),
        "talk": pa.array(
            [
                [{"role": "user", "content": "hi", "name": None}],
                [{"role": "system", "content": "own"}, {"role": "user", "content": "hi", "name": None}],
                None,
            ]
        ),
        "talk_json": ['[{"role": "user", "content": "hi"}]', "[", '{"role": "user"}'],
    }
)


@pytest.fixture(scope="module")
def tokenizer(chat_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model_dir)


def job(**settings: Any) -> JobConfig:
    return build({**JOB, **settings})


def requests_of(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0, **settings: Any
) -> list[Request | str]:
    """Prompt and parameters of each row, or what is wrong with it."""
    config = job(**settings)
    requests = Requests(config, table.schema, seed)
    requests.attach(tokenizer, config.model)
    found: list[Request | str] = []
    for number, row in enumerate(requests.rows(table)):
        try:
            found.append(requests.request(row, 100 + number))
        except RowError as error:
            found.append(str(error))
    assert not any("\n" in row for row in found if isinstance(row, str))
    return found


def prompts_of(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase | None = None, **prompt: Any
) -> list[str | list[int]]:
    """Prompts as text (through a chat template, as it reads), or what is wrong."""
    found = requests_of(table, tokenizer, prompt=prompt)
    prompts = [row if isinstance(row, str) else row[0] for row in found]
    texts = [prompt.text if isinstance(prompt, Rendered) else prompt for prompt in prompts]
    return [prompt if isinstance(prompt, str) else list(prompt) for prompt in texts]


# Prompts


def test_a_column_of_text_or_of_token_ids() -> None:
    assert prompts_of(TABLE) == ["the fox", "the dog", "prompt is null"]
    assert prompts_of(TABLE, column="ids") == [[5, 6], "prompt is empty", "prompt is null"]


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list, pa.list_view, lambda item: pa.list_(item, 3)])
@pytest.mark.parametrize("item", [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64()])
def test_token_ids_of_every_integer_type(lists: Callable[[pa.DataType], pa.DataType], item: pa.DataType) -> None:
    """Wherever they begin in a file's pages, and whatever lies under a list that is null."""
    fixed = pa.types.is_fixed_size_list(lists(item))
    values = [None if number % 5 == 3 else [number, 100 - number, 7] for number in range(40)]
    if not fixed:
        values = [value and value[: number % 4] for number, value in enumerate(values)]
    column = pa.chunked_array([pa.array(values[:11], lists(item)), pa.array(values[11:], lists(item))])
    table = pa.table({"ids": column.slice(2, 30)})
    expected = [value or ("prompt is null" if value is None else "prompt is empty") for value in values[2:32]]
    assert prompts_of(table, column="ids") == expected


def test_a_null_list_that_lies_over_numbers() -> None:
    ids = pa.ListArray.from_arrays([0, 2, 4, 5], pa.array([1, 2, 3, 4, 5]), mask=pa.array([False, True, False]))
    assert prompts_of(pa.table({"ids": ids}), column="ids") == [[1, 2], "prompt is null", [5]]


def test_a_null_among_token_ids_is_for_the_engine_to_refuse() -> None:
    table = pa.table({"ids": pa.array([[5, None], [6]], pa.list_(pa.int32()))})
    assert prompts_of(table, column="ids") == [[5, None], [6]]


def test_a_template_sees_lists_of_numbers_as_lists() -> None:
    assert prompts_of(TABLE, template="{{ ids }}")[0] == "[5, 6]"


def test_the_seed_of_token_ids_is_that_of_the_list() -> None:
    """The predictor's seeds come from it: a result must not change with how a column is read. Long ones are not cut."""
    long = list(range(2000))
    table = pa.table({"ids": pa.array([long], pa.list_(pa.int32()))})
    requests = Requests(job(prompt={"column": "ids"}), table.schema)
    assert requests.key(requests.rows(table)[0]) == str(long)


def test_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    hi = "<|im_start|>user\nhi<|im_end|>\n"
    ask = "<|im_start|>assistant\n"
    assert prompts_of(TABLE, tokenizer, messages="talk") == [
        hi + ask,
        "<|im_start|>system\nown<|im_end|>\n" + hi + ask,
        "messages are null",
    ]
    first, second, third = prompts_of(TABLE, tokenizer, messages="talk_json")
    assert first == hi + ask
    assert isinstance(second, str) and second.startswith("messages are not JSON: ")
    assert third == "messages are dict, not a list of role and content"


def test_system_and_few_shot_come_before_the_rows_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    shots = [{"user": "a", "assistant": "b"}, {"role": "user", "content": "c"}]
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    between = turn("user", "a") + turn("assistant", "b") + turn("user", "c")
    first, second, _ = prompts_of(TABLE, tokenizer, messages="talk", system="job's", few_shot=shots)
    assert first == turn("system", "job's") + between + turn("user", "hi") + "<|im_start|>assistant\n"
    assert second == turn("system", "own") + between + turn("user", "hi") + "<|im_start|>assistant\n"
    (text, *_) = prompts_of(
        TABLE, tokenizer, chat=True, system="s", add_generation_prompt=False, chat_template_kwargs={"x": 1}
    )
    assert text == turn("system", "s") + turn("user", "the fox")


def test_chat_template_and_its_variables(tokenizer: PreTrainedTokenizerBase) -> None:
    (text, *_) = prompts_of(TABLE, tokenizer, chat=True, chat_template_kwargs={"enable_thinking": False})
    assert isinstance(text, str) and text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    own = "{{ greeting }} {{ messages[-1].content }}"
    (text, *_) = prompts_of(TABLE, tokenizer, chat=True, chat_template=own, chat_template_kwargs={"greeting": "Hello,"})
    assert text == "Hello, the fox"


def test_a_template_over_columns(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ title or 'untitled' }}: {{ prompt }}{% for i in range(words) %}!{% endfor %} {{ talk[0] | tojson }}"
    first, second, third = prompts_of(TABLE, template=template)
    assert first == 'One: the fox! {"role": "user", "content": "hi", "name": null}'
    assert isinstance(second, str) and second.startswith("untitled: the dog!! {")
    assert third == "prompt.template would write a null (null here: 'prompt', 'talk')"
    assert prompts_of(TABLE, template="{{ title.nope }}")[0].startswith("prompt.template fails on this row: ")  # type: ignore[union-attr]
    assert prompts_of(TABLE, template="{% if words > 1 %}x{% endif %}")[0] == "prompt is empty"
    (chatted, *_) = prompts_of(TABLE, tokenizer, template="Say {{ prompt }}", chat=True)
    assert chatted == "<|im_start|>user\nSay the fox<|im_end|>\n<|im_start|>assistant\n"


def test_a_column_may_have_the_name_of_a_function() -> None:
    assert prompts_of(pa.table({"range": ["far"], "dict": ["book"]}), template="{{ range }} {{ dict }}") == ["far book"]


def test_a_template_is_sandboxed() -> None:
    (row, *_) = prompts_of(TABLE, template="{{ prompt.__class__.__mro__ }}")
    assert isinstance(row, str) and "prompt.template fails on this row" in row and "__class__" in row


def test_only_what_is_used_is_read() -> None:
    config = job(
        prompt={"template": "{{ words }} {{ title }}"},
        sampling_columns={"max_tokens": "words", "temperature": "prompt"},
    )
    assert Requests(config, TABLE.schema).columns == ["prompt", "title", "words"]


def test_files_are_read_once_and_travel_with_the_job(tmp_path: Path) -> None:
    (tmp_path / "row.jinja").write_text("{{ title }}?\n")
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    settings = {"template_file": str(tmp_path / "row.jinja"), "chat_template_file": str(tmp_path / "chat.jinja")}
    config = job(prompt={**settings, "chat": True})
    assert (config.prompt.template, config.prompt.template_file) == ("{{ title }}?\n", None)
    assert config.prompt.chat_template == "{{ messages[0].content }}"
    assert build(config.as_dict()) == config
    for broken, message in ((tmp_path / "none", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            job(prompt={"template_file": str(broken)})
    with pytest.raises(UserError, match="both given"):
        job(prompt={"template_file": str(tmp_path / "row.jinja"), "template": "x"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"column": "prompt", "messages": "talk"}, "prompt.column and prompt.messages are both given"),
        ({"messages": "talk", "template": "{{ x }}"}, "prompt.messages and prompt.template are both given"),
        ({"system": "x"}, "prompt.system is for chats, and this prompt is plain text; set prompt.chat=true"),
        ({"template": "{{ x }}", "few_shot": []}, "prompt.few_shot is for chats"),
        ({"chat_template_kwargs": {"a": 1}}, "prompt.chat_template_kwargs is for chats"),
        ({"chat": True, "few_shot": [{"user": "x"}]}, "prompt.few_shot has {'user': 'x'}; give {user"),
        ({"chat": True, "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs has 'tokenize'"),
        ({"mesages": "talk"}, "unknown job config 'prompt.mesages': did you mean 'messages'?"),
    ],
)
def test_prompt_settings_that_do_not_go_together(prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        job(prompt=prompt)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": {"messages": "tlk"}}, "input has no column 'tlk' (prompt.messages): did you mean 'talk'?"),
        ({"prompt": {"messages": "words"}}, "'words' (prompt.messages) is int32; conversations are lists of structs"),
        ({"prompt": {"messages": "ids"}}, "conversations are lists of structs with role and content, or JSON text"),
        (
            {"prompt": {"column": "words"}},
            "'words' (prompt.column) is int32; prompts are strings, or lists of token ids",
        ),
        ({"prompt": {"column": "talk"}}, "prompts are strings, or lists of token ids"),
        ({"prompt": {"column": "ids", "chat": True}}, "column 'ids' holds token ids, which no chat template takes"),
        ({"prompt": {"template": "{{ titel }}"}}, "uses 'titel', which is no column: did you mean 'title'?"),
        ({"prompt": {"template": "{{ title "}}, "prompt.template is not Jinja: "),
        ({"prompt": {"template": "{{ title | nope }}"}}, "prompt.template is not Jinja: No filter named 'nope'"),
        ({"prompt": {"template": "{% include 'x' %}{{ title }}"}}, "includes another template"),
        ({"prompt": {"template": "always the same"}}, "uses no column"),
        (
            {"sampling_columns": {"max_token": "words"}},
            "unknown sampling parameter 'max_token': did you mean 'max_tokens'?",
        ),
        (
            {"sampling_columns": {"max_tokens": "wrds"}},
            "no column 'wrds' (sampling_columns.max_tokens): did you mean 'words'",
        ),
        ({"sampling_columns": {"n": "words"}}, "'n' is the same for all rows of a job; set sampling.n"),
        ({"sampling_column": "words"}, "'words' (sampling_column) is int32; it must be structs, or JSON text"),
        ({"sampling_column": "wrds"}, "no column 'wrds' (sampling_column)"),
    ],
)
def test_refused_for_these_columns(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Requests(job(**settings), TABLE.schema)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_in_files_are_not_read() -> None:
    from ray.data.extensions import ArrowPythonObjectType

    for kind in (ArrowPythonObjectType(), pa.list_(pa.struct([("x", ArrowPythonObjectType())]))):
        schema = pa.schema([("text", pa.string()), ("odd", kind)])
        with pytest.raises(UserError, match="column 'odd' holds pickled Python objects"):
            Requests(job(prompt={"template": "{{ text }} {{ odd }}"}), schema)
        Requests(job(prompt={"template": "{{ text }}"}), schema)


# Parameters


def params_of(values: dict[str, Any], rows: int = 1, **settings: Any) -> list[SamplingParams | str]:
    table = pa.table({"prompt": ["x"] * rows, **values})
    return [row if isinstance(row, str) else row[1] for row in requests_of(table, **settings)]


def test_parameters_from_columns() -> None:
    first, second, third = params_of(
        {"m": pa.array([7.0, None, 7.5]), "t": [0.5, 0.25, None]},
        3,
        sampling={"max_tokens": 9, "temperature": 2.0},
        sampling_columns={"max_tokens": "m", "temperature": "t"},
    )
    assert isinstance(first, SamplingParams) and isinstance(second, SamplingParams)
    assert (first.max_tokens, first.temperature, first.seed) == (7, 0.5, 100)
    assert (second.max_tokens, second.temperature, second.seed) == (9, 0.25, 101)
    assert third == "max_tokens=7.5: must be a whole number of 1 or more"


def test_parameters_of_every_type() -> None:
    struct = pa.array(
        [
            {
                "stop": ["a", "b"],
                "logit_bias": [(3, 1.5)],
                "structured_outputs": {"choice": ["x", "y"], "regex": None},
                "ignore_eos": True,
                "top_k": None,
            }
        ],
        pa.struct(
            [
                ("stop", pa.list_(pa.string())),
                ("logit_bias", pa.map_(pa.int32(), pa.float64())),
                ("structured_outputs", pa.struct([("choice", pa.list_(pa.string())), ("regex", pa.string())])),
                ("ignore_eos", pa.bool_()),
                ("top_k", pa.int8()),
            ]
        ),
    )
    (params,) = params_of({"p": struct}, sampling={"top_k": 5}, sampling_column="p")
    assert isinstance(params, SamplingParams)
    assert (params.stop, params.logit_bias, params.ignore_eos, params.top_k) == (["a", "b"], {3: 1.5}, True, 5)
    assert params.structure is not None and params.structure.choice == ["x", "y"]


def test_parameters_as_json_text_and_which_comes_first() -> None:
    rows = ['{"max_tokens": 3, "stop": "."}', "", None, '{"max_token": 3}', "{", "[1]", '{"n": 2}', '{"top_p": 7}']
    found = params_of(
        {"p": rows, "m": [None] * 7 + [4], "s": ["42"] + [None] * 7},
        8,
        sampling_column="p",
        sampling_columns={"max_tokens": "m", "logit_bias": "s"},
        sampling={"max_tokens": 8},
    )
    assert found[0] == "logit_bias=42: must map token ids to numbers"
    for row in found[1:3]:
        assert isinstance(row, SamplingParams) and (row.max_tokens, row.stop) == (8, None)
    assert found[3] == "column 'p': unknown sampling parameter 'max_token': did you mean 'max_tokens'?"
    assert isinstance(found[4], str) and found[4].startswith("column 'p' is not JSON")
    assert found[5] == "column 'p' holds list, not an object of sampling parameters"
    assert found[6] == "column 'p': 'n' is the same for all rows of a job; set sampling.n"
    assert found[7] == "top_p=7: must be a number above 0, at most 1 (all tokens)"
    first, second = params_of(
        {"p": ['{"max_tokens": 3}'] * 2, "m": [5, None]}, 2, sampling_column="p", sampling_columns={"max_tokens": "m"}
    )
    assert isinstance(first, SamplingParams) and isinstance(second, SamplingParams)
    assert (first.max_tokens, second.max_tokens) == (5, 3)


def test_parameters_from_csv_are_text() -> None:
    found = params_of(
        {"m": ["12", "", "many"], "s": ["###", "", "."]}, 3, sampling_columns={"max_tokens": "m", "stop": "s"}
    )
    assert isinstance(found[0], SamplingParams) and (found[0].max_tokens, found[0].stop) == (12, "###")
    assert isinstance(found[1], SamplingParams) and (found[1].max_tokens, found[1].stop) == (64, None)
    assert found[2] == "column 'm': max_tokens='many' is not JSON"


def test_a_row_with_a_seed_of_its_own() -> None:
    found = params_of({"s": [7, None, 7, -1]}, 4, seed=3, sampling_columns={"seed": "s"})
    seeds = [params.seed for params in found if isinstance(params, SamplingParams)]
    assert seeds == [row_seed(3, 7), 101, row_seed(3, 7), row_seed(3, -1)]
    assert params_of({"s": ['"x"']}, sampling_columns={"seed": "s"}) == ["seed='x': must be a whole number"]


def test_what_rows_may_set_is_known_from_the_schema() -> None:
    schema = pa.schema(
        [("prompt", pa.string()), ("p", pa.struct([("top_k", pa.int8())])), ("m", pa.int8()), ("j", pa.string())]
    )
    everything = {field.name for field in dataclasses.fields(SamplingParams)} - {"n"}
    assert per_row_parameters(job(), schema) == frozenset()
    named = job(sampling_column="p", sampling_columns={"max_tokens": "m"})
    assert per_row_parameters(named, schema) == {"top_k", "max_tokens"}
    assert per_row_parameters(job(sampling_column="j"), schema) == everything
    with pytest.raises(UserError, match="column 'p': unknown sampling parameter 'topk': did you mean 'top_k'"):
        per_row_parameters(job(sampling_column="p"), pa.schema([("p", pa.struct([("topk", pa.int8())]))]))


# Identity


def test_settings_that_are_not_used_are_no_part_of_a_jobs_identity(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n')

    def named(*overrides: str) -> dict[str, Any]:
        config = load(["--model", "m", "--input", str(tmp_path), "--output", "o", *overrides]).config
        dataset = list_dataset(config.input, config.format)
        measure(dataset)
        return {key: value for key, value in identity(config, dataset).items() if value is not None}

    before = {"row path version", "model", "input", "prompt.column", "prompt.too_long", "run.seed"}
    usual = named()
    assert {key for key in usual if key.split(".")[0] not in ("sampling", "columns", "engine")} == before
    assert named("format=jsonl") == usual
    assert set(named("sampling_columns={max_tokens: m}")) - set(usual) == {"sampling_columns"}
    assert set(named("prompt.chat=true", "prompt.system=x")) - set(usual) == {"prompt.chat", "prompt.system"}
    assert json.dumps(usual)
