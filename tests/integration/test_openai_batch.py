"""A batch of OpenAI requests through `generate.py`: what a user of `vllm run-batch` puts in, and gets back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.integration.jobs import run, table_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TURN = [{"role": "user", "content": "the quick brown fox"}]
SHORT = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
SETTINGS = ["format=openai_batch", "engine.kvcache_block_size=16", "engine.max_model_len=128", "run.shard_rows=16"]


def request(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "mine", **body}}


REQUESTS: list[Any] = [
    request("chat", messages=TURN, **SHORT),
    request("completion", COMPLETIONS, prompt="the lazy dog", **SHORT),
    request("ids", COMPLETIONS, prompt=[5, 6, 7], max_tokens=2, temperature=0, ignore_eos=True),
    request("several", messages=TURN, max_completion_tokens=3, n=3, seed=5, temperature=1.5, ignore_eos=True),
    request("several again", messages=TURN, max_tokens=3, n=3, seed=5, temperature=1.5, ignore_eos=True),
    request("logprobs", messages=TURN, logprobs=True, top_logprobs=2, **SHORT),
    request("completion logprobs", COMPLETIONS, prompt="the lazy dog", logprobs=1, **SHORT),
    request(
        "schema",
        messages=TURN,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"enum": [1, 2]}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            },
        },
        max_tokens=40,
        temperature=0,
    ),
    request("choice", messages=TURN, structured_outputs={"choice": ["red", "blue"]}, temperature=0),
    request("silent", messages=TURN, chat_template_kwargs={"enable_thinking": False}, **SHORT),
    request("stream", messages=TURN, stream=True),
    request("tools", messages=TURN, tools=[{"type": "function"}]),
    request("hot", messages=TURN, temperature=-1),
    request("url", "/v1/embeddings", input="x"),
    request("no messages", prompt="x"),
    request("long", COMPLETIONS, prompt="many words " * 100),
    request("picture", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]),
    request("chat", messages=TURN, **{**SHORT, "max_tokens": 2}),
    request("off", messages=TURN, stream=False, tools=[], tool_choice="none", user="me", stop=None, **SHORT),
    '{"custom_id": "torn", "method": "POST", ',
    ["no object"],
    {"custom_id": 7, "method": "POST", "url": CHAT, "body": {}},
    {"custom_id": "bodiless", "method": "POST", "url": CHAT},
    request("surrogate", messages=[{"role": "\ud800", "content": "\ud800"}], model="\ud800", **SHORT),
    request("last", messages=[{"role": "user", "content": "é\u2028ü"}], **SHORT),
]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory, chat_model_dir: Path) -> tuple[Path, list[dict[str, Any]], str]:
    """Output, answers, and what was printed."""
    root = tmp_path_factory.mktemp("batch")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in REQUESTS]
    (root / "in.jsonl").write_text("\n".join(lines) + "\n\n")
    output = root / "out"
    done = run(
        ["--model", str(chat_model_dir), "--input", str(root / "in.jsonl"), "--output", str(output), *SETTINGS], root
    )
    assert done.returncode == 0
    text = (output / "_results.jsonl").read_text()
    assert text.count("\n") == len(REQUESTS)
    return output, [json.loads(line) for line in text.split("\n")[:-1]], done.stdout


def body_of(answers: list[dict[str, Any]], custom_id: str) -> dict[str, Any]:
    answer = next(answer for answer in answers if answer["custom_id"] == custom_id)
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    body: dict[str, Any] = answer["response"]["body"]
    return body


def test_every_request_has_its_answer_in_order(batch: tuple[Path, list[dict[str, Any]], str]) -> None:
    output, answers, printed = batch
    wanted = [r["custom_id"] if isinstance(r, dict) and isinstance(r["custom_id"], str) else None for r in REQUESTS]
    assert [answer["custom_id"] for answer in answers] == wanted
    for name in ("id", "response"):
        assert len({json.dumps(answer[name]) for answer in answers}) == len(answers)
    assert "1 requests have the custom_id of an earlier one, the first of them 'chat'" in printed
    assert len(list(output.glob("part-*.parquet"))) == 2
    assert table_of(output)["custom_id"].to_pylist() == wanted


def test_answers_are_the_engines(batch: tuple[Path, list[dict[str, Any]], str], chat_model_dir: Path) -> None:
    _, answers, _ = batch
    llm = LLM(str(chat_model_dir), kvcache_block_size=16, max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
    (chat,) = llm.chat(TURN, params, use_tqdm=False)
    (text,) = llm.generate(["the lazy dog"], params, use_tqdm=False)
    (silent,) = llm.chat(TURN, params, use_tqdm=False, enable_thinking=False)
    llm.exit()
    body = body_of(answers, "chat")
    assert body["object"] == "chat.completion"
    assert body["model"] == "mine"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": chat["text"]},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": chat["num_input_tokens"],
        "completion_tokens": 6,
        "total_tokens": chat["num_input_tokens"] + 6,
    }
    completion = body_of(answers, "completion")
    assert completion["object"] == "text_completion"
    assert completion["choices"] == [{"index": 0, "text": text["text"], "logprobs": None, "finish_reason": "length"}]
    assert body_of(answers, "silent")["choices"][0]["message"]["content"] == silent["text"]
    assert body_of(answers, "silent")["usage"]["prompt_tokens"] > body["usage"]["prompt_tokens"]
    assert body_of(answers, "off")["choices"] == body["choices"]
    assert body_of(answers, "ids")["usage"]["prompt_tokens"] == 3

    content = body_of(answers, "logprobs")["choices"][0]["logprobs"]["content"]
    assert chat["logprobs"] is not None
    assert len(content) == 6
    for token, token_id, known in zip(content, chat["token_ids"], chat["logprobs"], strict=True):
        assert math.isclose(token["logprob"], known[token_id].logprob, rel_tol=1e-5, abs_tol=1e-6)
        assert bytes(token["bytes"]).decode() == token["token"] == known[token_id].decoded_token
        assert [top["token"] for top in token["top_logprobs"]] == [
            one.decoded_token for one in sorted(known.values(), key=lambda one: one.rank) if one.rank <= 2
        ]
    assert text["logprobs"] is not None
    found = body_of(answers, "completion logprobs")["choices"][0]["logprobs"]
    firsts = [known[token_id] for known, token_id in zip(text["logprobs"], text["token_ids"], strict=True)]
    assert found["tokens"] == [one.decoded_token for one in firsts]
    assert all(math.isclose(a, b.logprob, rel_tol=1e-5) for a, b in zip(found["token_logprobs"], firsts, strict=True))
    assert [len(top) for top in found["top_logprobs"]] == [1] * 6
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(6)]


def test_samples_and_forms(batch: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, answers, _ = batch
    several = body_of(answers, "several")
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in several["choices"]]
    assert len(set(texts)) > 1
    assert several["usage"]["completion_tokens"] == 9
    # The same seed, the same answer, wherever the request stands.
    assert [choice["message"]["content"] for choice in body_of(answers, "several again")["choices"]] == texts
    schema = body_of(answers, "schema")["choices"][0]
    assert json.loads(schema["message"]["content"])["a"] in (1, 2)
    assert body_of(answers, "choice")["choices"][0]["message"]["content"] in ("red", "blue")


@pytest.mark.parametrize(
    ("custom_id", "message"),
    [
        ("stream", "stream=True in the body is not supported"),
        ("tools", "tools=[{'type': 'function'}] in the body is not supported"),
        ("hot", "temperature=-1: must be"),
        ("url", "url '/v1/embeddings': must be one of /v1/chat/completions, /v1/completions"),
        ("no messages", "prompt='x' in the body is not supported"),
        ("long", "the most is 127"),
        ("picture", "message 1 has a part of type 'image_url'; only text can be used"),
        ("bodiless", "the request has no body"),
    ],
)
def test_what_cannot_be_answered_is_an_error_object(
    batch: tuple[Path, list[dict[str, Any]], str], custom_id: str, message: str
) -> None:
    _, answers, _ = batch
    answer = next(answer for answer in answers if answer["custom_id"] == custom_id)
    assert message in answer["error"]["message"]
    assert (answer["error"]["type"], answer["error"]["code"]) == ("BadRequestError", 400)
    assert (answer["response"]["status_code"], answer["response"]["body"]) == (400, None)


def test_lines_that_are_no_requests(batch: tuple[Path, list[dict[str, Any]], str]) -> None:
    _, answers, _ = batch
    torn, array, number = (answer["error"]["message"] for answer in answers if answer["custom_id"] is None)
    assert torn.startswith("the line is not JSON: ")
    assert array == number == "the line is no request with a custom_id, which must be a string"


def test_refused_before_anything_runs(batch: tuple[Path, list[dict[str, Any]], str], chat_model_dir: Path) -> None:
    output, _, _ = batch
    source = output.parent / "in.jsonl"
    arguments = ["--model", str(chat_model_dir), "--input", str(source), "--output", str(output.parent / "other")]
    for more, message in (
        (["columns.keep=[custom_id, url]"], "columns.keep lacks 'method', which answers are made of"),
        (["prompt.messages=x"], "prompt.messages has no meaning with format=openai_batch"),
        (["sampling_column=x"], "sampling_column has no meaning with format=openai_batch"),
        (["columns.samples=rows"], "needs one n for all rows"),
    ):
        done = run([*arguments, *SETTINGS, *more], output.parent)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_start_that_only_has_to_end_the_job_writes_the_same_answers(
    batch: tuple[Path, list[dict[str, Any]], str], chat_model_dir: Path
) -> None:
    output, _, _ = batch
    before = (output / "_results.jsonl").read_bytes()
    (output / "_SUCCESS").unlink()
    (output / "_results.jsonl").write_text("torn")
    source = output.parent / "in.jsonl"
    done = run(
        ["--model", str(chat_model_dir), "--input", str(source), "--output", str(output), *SETTINGS], output.parent
    )
    assert done.returncode == 0
    assert (output / "_results.jsonl").read_bytes() == before
    assert (output / "_SUCCESS").exists()
