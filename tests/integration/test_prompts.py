"""Jobs whose prompts are chats and templates, and whose rows have parameters of their own: killed and resumed, the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from pipelines.requests import row_seed
from tests.integration.jobs import (
    SLOW,
    journalled_rows,
    kill_everything,
    parts,
    run,
    start,
    suspend_when,
    table_of,
)

ROWS = 120
BAD = {
    5: ("talk", None, "messages are null"),
    6: ("talk", [{"role": "user", "content": None}], "message 1 (role 'user') has no content"),
    7: (
        "own",
        {"temperature": -1.0, "max_tokens": 2},
        "temperature=-1.0: must be a finite number of 0 (greedy) or more",
    ),
    8: ("limit", 0, "max_tokens=0: must be a whole number of 1 or more"),
}
SETTINGS = [
    *SLOW,
    "prompt.messages=talk",
    "prompt.system=be brief",
    "prompt.chat_template_kwargs={enable_thinking: false}",
    "sampling_column=own",
    "sampling_columns={max_tokens: limit, seed: seed}",
    "columns.keep=[id]",
    "run.shard_rows=16",
]


def make_row(number: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": number,
        "talk": [{"role": "user", "content": f"the fox {number // 2}"}],
        "own": {"temperature": 1.5 if number % 3 else 0.0, "max_tokens": 30},
        "limit": 18 + number % 5 if number % 4 else None,
        "seed": 7 if number < 40 else None,
    }
    if number in BAD:
        name, value, _ = BAD[number]
        row[name] = value
    return row


@pytest.fixture(scope="module")
def source(workplace: Path) -> Path:
    path = workplace / "chats.jsonl"
    path.write_text("".join(json.dumps(make_row(number)) + "\n" for number in range(ROWS)))
    return path


@pytest.mark.long
def test_a_killed_job_of_chats_ends_as_the_engine_answers(workplace: Path, source: Path, chat_model_dir: Path) -> None:
    output = workplace / "chats"
    arguments = ["--model", str(chat_model_dir), "--input", str(source), "--output", str(output), *SETTINGS]
    process = start(arguments, workplace)
    suspend_when(lambda: len(parts(output)) >= 1 and journalled_rows(output) >= 2, process)
    kill_everything(process)
    before = parts(output)
    assert 0 < len(before) < ROWS // 16
    done = run(arguments, workplace)
    assert done.returncode == 0
    assert f"finished: {ROWS} rows ({len(BAD)} with an error)" in done.stdout
    assert before.items() <= parts(output).items()
    table = table_of(output)
    assert table.column_names[:2] == ["id", "generated_text"]
    assert table["id"].to_pylist() == list(range(ROWS))
    errors = table["error"].to_pylist()
    assert {number: error for number, error in enumerate(errors) if error} == {n: bad[2] for n, bad in BAD.items()}

    # What a user gets who asks the engine for the same rows.
    good = [number for number in range(ROWS) if number not in BAD]
    rows = [make_row(number) for number in good]
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    outputs = llm.chat(
        [[{"role": "system", "content": "be brief"}, *row["talk"]] for row in rows],
        [
            SamplingParams(
                temperature=row["own"]["temperature"],
                max_tokens=row["limit"] or 30,
                ignore_eos=True,
                seed=row_seed(0, "chats.jsonl", row["id"], 0) if row["seed"] is None else row_seed(0, row["seed"]),
            )
            for row in rows
        ],
        use_tqdm=False,
        chat_template_kwargs={"enable_thinking": False},
    )
    llm.exit()
    texts, lengths = table["generated_text"].to_pylist(), table["num_input_tokens"].to_pylist()
    assert [texts[number] for number in good] == [output["text"] for output in outputs]
    assert [lengths[number] for number in good] == [output["num_input_tokens"] for output in outputs]


def test_dry_run_shows_prompts_as_they_are_tokenized(workplace: Path, source: Path, chat_model_dir: Path) -> None:
    done = run(
        [
            "--model",
            str(chat_model_dir),
            "--input",
            str(source),
            "--output",
            str(workplace / "none"),
            "--dry-run",
            *SETTINGS,
        ],
        workplace,
    )
    assert done.returncode == 0
    shown = [line for line in done.stdout.splitlines() if line.startswith(("prompt", "    "))]
    assert len(shown) == 6
    for number in range(3):
        assert "be brief<|im_end|>\\n<|im_start|>user\\nthe fox" in shown[2 * number]
        assert shown[2 * number].endswith("<think>\\n\\n</think>\\n\\n'")
    assert shown[1] == "         with temperature=0.0, max_tokens=30"
    assert shown[3] == "         with temperature=1.5, max_tokens=19"
    assert not (workplace / "none").exists()
