"""OpenAI's batch format: what a body asks for, and the object that answers it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm import SamplingParams, UserError
from pipelines.batch_results import answer
from pipelines.inputs import BATCH_SCHEMA, list_dataset, measure, read_rows
from pipelines.job import build
from pipelines.plan import make_shards
from pipelines.prompts import Rendered
from pipelines.requests import Request, Requests, per_row_parameters, row_seed
from pipelines.row_values import RowError

TURN = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JOB = {"model": "m", "input": "i", "output": "o", "format": "openai_batch"}


@pytest.fixture(scope="module")
def tokenizer(chat_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(chat_model_dir)


def asked(tokenizer: PreTrainedTokenizerBase | None, url: str, body: dict[str, Any], **job: Any) -> Request:
    config = build({**JOB, **job})
    requests = Requests(config, BATCH_SCHEMA, seed=9)
    requests.attach(tokenizer, "m")
    return requests.request({"custom_id": "x", "method": "POST", "url": url, "body": json.dumps(body)}, 5)


def params_of(body: dict[str, Any], url: str = COMPLETIONS, **job: Any) -> SamplingParams:
    return asked(None, url, {"prompt": "x", **body}, **job).params


def test_every_field_that_vllm_takes_arrives() -> None:
    params = params_of(
        {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "max_tokens": 3,
            "min_tokens": 1,
            "stop": ["a"],
            "stop_token_ids": [4],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "n": 2,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.5,
            "logit_bias": {"5": 1},
            "logprobs": 4,
            "bad_words": ["x"],
            "allowed_token_ids": [1, 2],
            "guided_choice": ["a", "b"],
            "seed": 11,
        }
    )
    assert params == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        max_tokens=3,
        min_tokens=1,
        stop=["a"],
        stop_token_ids=[4],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        n=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"5": 1},  # type: ignore[dict-item]
        logprobs=4,
        bad_words=["x"],
        allowed_token_ids=[1, 2],
        structured_outputs={"choice": ["a", "b"]},
        seed=row_seed(9, 11),
    )


def test_what_a_body_leaves_out_is_the_jobs(tokenizer: PreTrainedTokenizerBase) -> None:
    params = params_of({"temperature": None}, sampling={"temperature": 0.25}, engine={"max_model_len": 777})
    assert (params.temperature, params.max_tokens, params.seed) == (0.25, 777, 5)
    assert params_of({}, sampling={"max_tokens": 5}).max_tokens == 5
    chat = {"messages": TURN, "max_tokens": 3, "max_completion_tokens": 4}
    assert asked(tokenizer, CHAT, chat).params.max_tokens == 4


def test_what_is_off_is_as_if_left_out() -> None:
    off = {
        "stream": False,
        "tools": [],
        "tool_choice": "none",
        "echo": False,
        "best_of": 1,
        "suffix": None,
        "user": "me",
    }
    assert params_of({**off, "model": "other"}) == params_of({})


def test_only_post_is_a_request() -> None:
    requests = Requests(build(JOB), BATCH_SCHEMA)
    with pytest.raises(RowError, match="method 'GET': must be 'POST'"):
        requests.request({"custom_id": "x", "method": "GET", "url": COMPLETIONS, "body": '{"prompt": "x"}'}, 0)


def test_logprobs_and_forms_of_chats(tokenizer: PreTrainedTokenizerBase) -> None:
    def chat(**body: Any) -> SamplingParams:
        return asked(tokenizer, CHAT, {"messages": TURN, **body}).params

    assert chat().logprobs is None
    assert chat(logprobs=False).logprobs is None
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).logprobs == 3
    assert chat(response_format={"type": "text"}).structured_outputs is None
    assert chat(response_format={"type": "json_object"}).structured_outputs == {"json_object": True}
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    given = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert json.dumps(given.structured_outputs) == json.dumps({"json": schema})  # the order of properties too


def test_prompts_of_both_kinds(tokenizer: PreTrainedTokenizerBase) -> None:
    def text(url: str, **body: Any) -> str:
        prompt = asked(tokenizer, url, body, prompt={"chat_template_kwargs": {"enable_thinking": False}}).prompt
        assert isinstance(prompt, (str, Rendered))
        return prompt if isinstance(prompt, str) else prompt.text

    turn = "<|im_start|>user\nhi<|im_end|>\n"
    assert text(CHAT, messages=TURN) == turn + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text(CHAT, messages=TURN, chat_template_kwargs={"enable_thinking": True}) == turn + "<|im_start|>assistant\n"
    assert text(CHAT, messages=TURN, add_generation_prompt=False) == turn
    assert text(COMPLETIONS, prompt="hi") == text(COMPLETIONS, prompt=["hi"]) == "hi"
    assert asked(tokenizer, COMPLETIONS, {"prompt": [[4, 5]]}).prompt == [4, 5]
    assert asked(tokenizer, COMPLETIONS, {"prompt": [4, 5]}).prompt == [4, 5]
    bare = asked(tokenizer, COMPLETIONS, {"prompt": "hi", "add_special_tokens": False}).prompt
    assert isinstance(bare, Rendered)
    assert bare.token_ids(tokenizer) == tokenizer.encode("hi", add_special_tokens=False)


def test_a_model_without_a_chat_template_takes_completions() -> None:
    assert params_of({"max_tokens": 3}).max_tokens == 3
    with pytest.raises(RowError, match="no chat template"):
        asked(None, CHAT, {"messages": TURN})
    with pytest.raises(UserError, match="no chat template"):
        asked(None, COMPLETIONS, {"prompt": "x"}, prompt={"chat_template": "{{ messages }}"})


@pytest.mark.parametrize(
    ("url", "body", "message"),
    [
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt holds 2 prompts; write a request for each"),
        (COMPLETIONS, {}, "prompt is null"),
        (COMPLETIONS, {"prompt": "x", "messages": TURN}, "messages="),
        (COMPLETIONS, {"prompt": "x", "echo": True}, "echo=True in the body is not supported"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of=2 in the body is not supported"),
        (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs=True: must be a whole number"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs=21: must be a whole number from 0 to 20"),
        (COMPLETIONS, {"prompt": "x", "stop": {"a": 1}}, "stop={'a': 1}: must be a string or a list"),
        (COMPLETIONS, {"prompt": "x", "seed": 1.5}, "seed=1.5: must be a whole number"),
        (COMPLETIONS, {"prompt": "x", "structured_outputs": {"jsn": 1}}, "unknown key 'jsn'"),
        (CHAT, {"messages": TURN, "top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        (CHAT, {"messages": TURN, "logprobs": 2}, "logprobs=2: must be true or false"),
        (
            CHAT,
            {"messages": TURN, "response_format": {"type": "xml"}},
            "its type must be text, json_object or json_schema",
        ),
        (CHAT, {"messages": TURN, "response_format": {"type": "json_schema"}}, "has no json_schema.schema"),
        (CHAT, {"messages": TURN, "guided_regex": "a", "guided_choice": ["a"]}, "are both given; leave one out"),
        (CHAT, {"messages": TURN, "chat_template": "x"}, "chat_template='x' in the body is not supported"),
        (CHAT, {"messages": TURN, "chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs has 'tokenize'"),
        (CHAT, {"messages": TURN, "chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
        (CHAT, {"messages": "hi"}, "messages are not JSON"),
        (CHAT, {}, "messages are null"),
    ],
)
def test_bodies_that_cannot_be_answered(
    tokenizer: PreTrainedTokenizerBase, url: str, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError) as caught:
        asked(tokenizer, url, body)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rows_may_set_what_bodies_hold() -> None:
    found = per_row_parameters(build(JOB), BATCH_SCHEMA)
    assert {"n", "logprobs", "structured_outputs", "temperature"} <= found
    assert not {"prompt_logprobs", "labels"} & found


def test_lines_are_rows_whatever_they_hold(tmp_path: Path) -> None:
    bodies = [{"prompt": "x" * (number % 7), "odd": [number, {"a": None}]} for number in range(100)]
    good = [{"custom_id": str(n), "method": "POST", "url": COMPLETIONS, "body": body} for n, body in enumerate(bodies)]
    lines = [json.dumps(line).encode() for line in good]
    lines[3], lines[50] = b"\xff\xfe", b"[1]"
    lines[60] = json.dumps({**good[60], "body": "text"}).encode()
    (tmp_path / "a.txt").write_bytes(b"\r\n".join(lines) + b"\n \n")
    dataset = list_dataset(str(tmp_path), "openai_batch")
    schema, facts = measure(dataset)
    assert schema == BATCH_SCHEMA
    config = build({**JOB, "run": {"shard_rows": 32}})
    shards = make_shards(config, dataset.files, facts)
    table = pa.concat_tables(read_rows(dataset.root, dataset.format, shard.row_range, schema) for shard in shards)
    assert [fact.rows for fact in facts] == [100]
    assert len(shards) > 2
    for number, row in enumerate(table.to_pylist()):
        if number in (3, 50):
            assert (row["custom_id"], row["url"]) == (None, None)
        elif number == 60:
            assert row["body"] == '"text"'
        else:
            assert (row["custom_id"], json.loads(row["body"])) == (str(number), bodies[number])


# Answers


def entry(token: str | None, logprob: float, rank: int) -> dict[str, Any]:
    return {"token_id": rank, "logprob": logprob, "rank": rank, "decoded_token": token}


def row(url: str = CHAT, body: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "custom_id": "c",
        "url": url,
        "body": json.dumps(body or {}),
        "generated_text": ["one", "two"],
        "finish_reason": ["stop", "length"],
        "num_input_tokens": 4,
        "num_generated_tokens": [2, 3],
        "error": None,
        "logprobs": [None, None],
        **more,
    }


def test_samples_reasoning_and_usage() -> None:
    found = answer(row(reasoning_text=["why", None], num_cached_tokens=3), "a\0001", 17, "job")
    body = found["response"]["body"]
    assert [choice["message"] for choice in body["choices"]] == [
        {"role": "assistant", "content": "one", "reasoning_content": "why"},
        {"role": "assistant", "content": "two", "reasoning_content": None},
    ]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert (body["model"], body["created"]) == ("job", 17)


def test_ids_follow_from_the_place() -> None:
    first, again, other = (answer(row(), place, 0, "m") for place in ("a\0001", "a\0001", "a\0002"))
    assert first == again
    assert first["id"] != other["id"]
    assert first["response"]["request_id"] != other["response"]["request_id"]
    assert first["response"]["body"]["id"] != other["response"]["body"]["id"]


def test_log_probabilities() -> None:
    tokens = [
        [entry("é", -2.0, 3), entry("a", -0.5, 1), entry("b", -1.0, 2)],
        [entry("a", -0.5, 1), entry("b", -math.inf, 2)],
        [entry(None, -1.0, 1)],
    ]
    body = {"logprobs": True, "top_logprobs": 2}
    found = answer(row(CHAT, body, logprobs=[tokens, None]), "x", 0, "m")["response"]["body"]["choices"]
    content = found[0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["é", "a", ""]
    assert content[0]["bytes"] == [0xC3, 0xA9]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["a", "b"]
    assert [top["logprob"] for top in content[1]["top_logprobs"]] == [-0.5, -9999.0]
    assert found[1]["logprobs"] is None
    chosen = answer(row(COMPLETIONS, {"logprobs": 2}, logprobs=[tokens, None]), "x", 0, "m")
    logprobs = chosen["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["é", "a", ""]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [-2.0, -0.5, -1.0]
    assert logprobs["top_logprobs"][0] == {"é": -2.0, "a": -0.5, "b": -1.0}
    # Others of the job asked for them: this one did not.
    assert answer(row(CHAT, logprobs=[tokens, None]), "x", 0, "m")["response"]["body"]["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [("prompt is null", 400, "BadRequestError"), ("the engine died of this row: x", 500, "InternalServerError")],
)
def test_errors(error: str, code: int, kind: str) -> None:
    found = answer(row(error=error, body={}), "x", 0, "m")
    assert found["error"] == {"message": error, "type": kind, "param": None, "code": code}
    assert found["response"]["status_code"] == code
    assert found["response"]["body"] is None
