"""The job files in `pipelines/jobs/` run as they stand, on the bundled data and model, and give what they promise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from pipelines.job import load
from tests.integration.jobs import REPOSITORY, report, run, table_of

JOBS = REPOSITORY / "pipelines" / "jobs"
PROMPTS = pq.read_table(REPOSITORY / "pipelines" / "demo" / "prompts.parquet")
ANSWERS = PROMPTS["answer"].to_pylist()
FEW = 300  # of the bundled rows: enough to tell right from wrong in a third of the time

# Looks at an output of so many of the bundled rows.
Check = Callable[[Path, int], None]
CHECKS: dict[str, Check] = {}


def check(check_output: Check) -> Check:
    """Register what to look at in the output of the job file that the function is named after."""
    CHECKS[check_output.__name__] = check_output
    return check_output


@check
def generate(output: Path, rows: int) -> None:
    table = table_of(output)
    assert table["id"].to_pylist() == PROMPTS["id"].to_pylist()[:rows]
    assert table.schema.names[-5:] == [
        "generated_text",
        "finish_reason",
        "num_input_tokens",
        "num_generated_tokens",
        "error",
    ]
    right = sum(
        text == answer for text, answer in zip(table["generated_text"].to_pylist(), ANSWERS[:rows], strict=True)
    )
    assert right >= 0.99 * rows


@check
def classify(output: Path, rows: int) -> None:
    table = table_of(output)
    assert table["id"].to_pylist() == PROMPTS["id"].to_pylist()[:rows]
    assert table.schema.names[:2] == ["id", "prompt"]
    assert table.schema.names[-3:] == ["label", "label_logprob", "label_probs"]
    assert table["label_probs"].type == pa.struct([(name, pa.float64()) for name in ("19", "20", "invalid")])
    truth = [answer if answer == "invalid" else answer[:2] for answer in ANSWERS[:rows]]
    labels, probs = table["label"].to_pylist(), table["label_probs"].to_pylist()
    right = [label == true for label, true in zip(labels, truth, strict=True)]
    assert sum(right) >= 0.99 * len(right)
    assert {"19", "20", "invalid"} == set(labels)
    for label, of_each, logprob in zip(labels, probs, table["label_logprob"].to_pylist(), strict=True):
        assert math.isclose(sum(of_each.values()), 1)
        assert max(of_each, key=of_each.__getitem__) == label
        assert logprob <= 0
        assert math.exp(logprob) <= of_each[label] + 1e-9
    # The threshold that the file shows, as a user would set it.
    sure = pq.read_table(output, filters=pc.field("label_probs", "invalid") < 0.01)
    assert 0 < sure.num_rows < table.num_rows
    assert "invalid" not in sure["label"].to_pylist()
    assert table["generated_text"].equals(table["label"])
    assert report(output)["generated_tokens"] == 0


@check
def extract_json(output: Path, rows: int) -> None:
    table = table_of(output)
    assert table["id"].to_pylist() == PROMPTS["id"].to_pylist()[:rows]
    schema = yaml.safe_load((JOBS / "extract_json.yaml").read_text())["sampling"]["structured_outputs"]["json"]
    values = [json.loads(text) for text in table["parsed"].to_pylist()]
    for value in values:
        jsonschema.validate(value, schema)
    assert [json.loads(text) for text in table["generated_text"].to_pylist()] == values
    assert all(" " not in text for text in table["parsed"].to_pylist())
    assert set(table["finish_reason"].to_pylist()) == {"stop"}
    right = sum(value["iso"] == answer for value, answer in zip(values, ANSWERS[:rows], strict=True))
    assert right >= 0.7 * rows


@check
def chat(output: Path, rows: int) -> None:
    table = table_of(output)
    assert table["id"].to_pylist() == list(range(0, 3000, 10))
    assert table["generated_text"].to_pylist() == table["answer"].to_pylist() == ANSWERS[::10]
    # The template of the file is the form that the model learnt: ChatML around the bundled prompts.
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "pipelines" / "demo" / "model")
    plain = [len(tokenizer.encode(prompt)) for prompt in PROMPTS["prompt"].to_pylist()[::10]]
    assert {chat - text for chat, text in zip(table["num_input_tokens"].to_pylist(), plain, strict=True)} == {
        len(tokenizer.encode("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"))
    }


@check
def openai_batch(output: Path, rows: int) -> None:
    requests = [json.loads(line) for line in (REPOSITORY / "pipelines/demo/requests.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (output / "_results.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [request["custom_id"] for request in requests]
    texts = []
    for request, answer in zip(requests, answers, strict=True):
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        (choice,) = body["choices"]
        chat = request["url"] == "/v1/chat/completions"
        assert body["object"] == ("chat.completion" if chat else "text_completion")
        assert (body["model"], choice["index"], choice["finish_reason"]) == ("demo", 0, "stop")
        texts.append(choice["message"]["content"] if chat else choice["text"])
    right = sum(text == answer for text, answer in zip(texts, ANSWERS[::20], strict=True))
    assert right >= 0.99 * len(texts)
    assert table_of(output)["custom_id"].to_pylist() == [request["custom_id"] for request in requests]


def test_every_job_file_is_tried() -> None:
    assert {path.stem for path in JOBS.iterdir()} == set(CHECKS)


@pytest.mark.parametrize(
    ("name", "rows"),
    [(name, FEW) for name in CHECKS]
    + [pytest.param(name, len(ANSWERS), marks=pytest.mark.long) for name in ("generate", "classify", "extract_json")],
)
def test_it_runs_as_it_stands(name: str, rows: int, tmp_path: Path) -> None:
    """On all bundled data, or on the first rows of it; conversations and requests are few already."""
    config = f"pipelines/jobs/{name}.yaml"
    # Only where it writes is another place, which the file names itself.
    assert Path(load(["--config", str(REPOSITORY / config)]).config.output).name.endswith("_output")
    arguments = ["--config", config, "--output", str(tmp_path / "out")]
    if rows == FEW and name not in ("chat", "openai_batch"):
        pq.write_table(PROMPTS.slice(0, rows), tmp_path / "few.parquet")
        arguments += ["--input", str(tmp_path / "few.parquet")]
    done = run(arguments, REPOSITORY)
    assert done.returncode == 0
    table = table_of(tmp_path / "out")
    assert table["error"].null_count == table.num_rows
    CHECKS[name](tmp_path / "out", rows)
