"""`NanoVLLMPredictor` in a user's own Ray Data program, and `generate.py` through `ray job submit`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from tests.integration.jobs import REPOSITORY, environment, kill_everything, table_of, write_prompts

PROGRAM = """
import sys
import ray
from pipelines import NanoVLLMPredictor

p, m, out = sys.argv[1:]
ray.init(address="local", include_dashboard=False, logging_level="ERROR")
ds = ray.data.read_parquet(p).map_batches(NanoVLLMPredictor, fn_constructor_kwargs={"model": m}, batch_size=64, concurrency=2, num_cpus=0)
ds.write_parquet(out)
try:
    ray.data.read_parquet(p).map_batches(
        NanoVLLMPredictor, fn_constructor_kwargs={"model": m, "max_model_length": 9}, concurrency=1, num_cpus=0
    ).materialize()
except Exception as error:
    print("refused:", str(error).splitlines()[-1])
"""


def test_the_line_in_the_readme_works_as_written(tmp_path: Path, chat_model_dir: Path) -> None:
    rows = write_prompts(tmp_path / "in", {"a.parquet": 150, "b.parquet": 60})
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(chat_model_dir), str(out)],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    result = table_of(out).sort_by("id")
    assert result["id"].to_pylist() == list(range(rows))
    assert result["prompt"].to_pylist() == [f"the quick brown fox {number}" for number in range(rows)]
    assert result["error"].null_count == rows
    assert all(0 < count <= 64 for count in result["num_generated_tokens"].to_pylist())
    assert "did you mean 'max_model_len'?" in done.stdout


CHATS = """
import sys
import ray
from pipelines import NanoVLLMPredictor

m, out = sys.argv[1:]
ray.init(address="local", include_dashboard=False, logging_level="ERROR")
rows = [
    {
        "id": number,
        "talk": [{"role": "user", "content": "the fox " * (number % 3 + 1)}],
        "ids": [5, 6] if number % 2 else [7],
        "own": {"max_tokens": number % 5 + 1, "ignore_eos": True},
    }
    for number in range(60)
]
ds = ray.data.from_items(rows)
for name, prompt, batch_format in (
    ("numpy", {"messages": "talk"}, "default"),
    ("arrow", {"messages": "talk"}, "pyarrow"),
    ("ids", {"column": "ids"}, "default"),
    ("text", {"template": "{{ talk[0].content }}, {{ id }}", "chat": True, "system": "be brief"}, "pandas"),
):
    arguments = {"model": m, "prompt": prompt, "sampling_column": "own", "sampling_params": {"temperature": 0}}
    done = ds.map_batches(
        NanoVLLMPredictor, fn_constructor_kwargs=arguments, batch_size=16, concurrency=1, num_cpus=0, batch_format=batch_format
    )
    generated = ["id", "generated_text", "num_input_tokens", "num_generated_tokens", "error"]
    done.select_columns(generated).write_parquet(f"{out}/{name}")
"""


def test_chats_and_parameters_of_rows_in_every_batch_format(tmp_path: Path, chat_model_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHATS, str(chat_model_dir), str(tmp_path)],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    tables = {name: table_of(tmp_path / name).sort_by("id") for name in ("numpy", "arrow", "ids", "text")}
    for table in tables.values():
        assert table["id"].to_pylist() == list(range(60))
        assert table["error"].null_count == 60
        assert table["num_generated_tokens"].to_pylist() == [number % 5 + 1 for number in range(60)]
    assert tables["numpy"].equals(tables["arrow"])
    assert tables["ids"]["num_input_tokens"].to_pylist() == [1, 2] * 30
    llm = LLM(str(chat_model_dir), kvcache_block_size=16)
    for number in (0, 7):
        params = SamplingParams(temperature=0, max_tokens=number % 5 + 1, ignore_eos=True)
        content = "the fox " * (number % 3 + 1)
        for name, turns in (
            ("numpy", [{"role": "user", "content": content}]),
            ("text", [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"{content}, {number}"}]),
        ):
            (expected,) = llm.chat(turns, params, use_tqdm=False)
            found = tables[name].slice(number, 1).to_pylist()[0]
            assert found["generated_text"] == expected["text"]
            assert found["num_input_tokens"] == expected["num_input_tokens"]
    llm.exit()


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A real head node with its job server, on this machine only. Gives the environment of its clients."""
    ports = free_ports(2)
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    env.pop("RAY_ADDRESS", None)
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports[1]}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1", "--block"]
    command += [f"--port={ports[0]}", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}", "--num-cpus=2"]
    # Its default, 52365, lies among the ports that other clusters on this machine may have been given; an agent that cannot
    # listen there goes on without, and every job is answered "No available agent" for ever.
    command += ["--dashboard-agent-listen-port=0"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield env
    finally:
        kill_everything(process)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.long  # test_ray_jobs is its kind
def test_ray_job_submit(head: dict[str, str], tmp_path: Path, chat_model_dir: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    prompts = [f'line one {number}\nline "two"' for number in range(50)]
    source.write_text("".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(prompts)))
    working_dir = tmp_path / "checkout"  # what a user submits: the packages, without tests, environments and results
    working_dir.mkdir()
    for package in ("nanovllm", "pipelines"):
        (working_dir / package).symlink_to(REPOSITORY / package)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."]
    command = ["--", sys.executable, "pipelines/generate.py", "--model", str(chat_model_dir)]
    command += ["--input", str(source), "--output", str(output), "prompt.column=text", "sampling.max_tokens=3"]
    command += ["columns.prefix=my_", "columns.num_cached_tokens=true"]
    # The job server comes up some seconds after the node, and the agent that starts jobs some after that.
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [*submit, *command], cwd=working_dir, env=head, capture_output=True, text=True, timeout=250, check=False
        )
        not_yet = re.search("Failed to connect|No available agent", done.stdout + done.stderr)
        if not not_yet or time.monotonic() > deadline:
            break
        time.sleep(1)
    print(done.stdout, done.stderr, (tmp_path / "head.log").read_text()[-3000:])
    assert done.returncode == 0
    assert "finished: 50 rows (0 with an error)" in done.stdout
    result = table_of(output)
    assert result["text"].to_pylist() == prompts
    assert result["n"].to_pylist() == list(range(50))
    assert result["my_error"].null_count == 50
    assert "my_num_cached_tokens" in result.column_names
