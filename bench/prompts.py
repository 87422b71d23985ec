"""Does making prompts slow the engine down? Its steps beside a thread that renders and tokenizes rows without a pause, as the row path does.

`python bench/prompts.py --save prompts_cpu`. The engine decodes the same number of sequences all the time. In turns nothing runs beside it;
another process that does nothing but take a core, which costs what any work on this machine costs; and the tokenizer thread with rows of
one kind: plain text, messages through a chat template, a template over columns, bodies of OpenAI's batch API. What the thread costs more
than the process is Python's lock. The rows it makes are not run, so that the engine's work stays the same. What an engine takes in is one row for each that ends,
which is far less than the thread makes: the share of time that it is busy in a job is (rows the engine ends a second) / (rows a second).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from common import save, write_shape
from grammar import WORDS, make_tokenizer

from nanovllm import AsyncLLM, SamplingParams
from pipelines.inputs import BATCH_SCHEMA
from pipelines.job import JobConfig, build
from pipelines.requests import Requests

TEMPLATE = "Sort the article into one of the sections.\nTitle: {{ title }}\n{% for tag in tags %}- {{ tag }}\n{% endfor %}{{ text }}\nSection:"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}"
    "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "text": {"prompt": {"column": "text"}},
    "chat": {"prompt": {"messages": "messages", "system": "You sort articles."}},
    "template": {"prompt": {"template": TEMPLATE}},
    "batch": {"format": "openai_batch"},
}


def make_rows(count: int, words: int) -> pa.Table:
    """Rows with columns for every kind of prompt, of the same texts."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    bodies = [json.dumps({"model": "m", "messages": m, "max_tokens": 32, "temperature": 0.5}) for m in messages]
    return pa.table(
        {
            "text": texts,
            "title": [" ".join(rng.choices(WORDS, k=6)) for _ in texts],
            "tags": [rng.choices(WORDS, k=4) for _ in texts],
            "messages": messages,
            "custom_id": [f"row-{number}" for number in range(count)],
            "method": ["POST"] * count,
            "url": ["/v1/chat/completions"] * count,
            "body": bodies,
        }
    )


class Load:
    """Keeps `sequences` sequences decoding on an engine."""

    def __init__(self, engine: AsyncLLM, sequences: int, tokens: int) -> None:
        self._engine, self._tokens = engine, tokens
        self._running = True
        for number in range(sequences):
            self._start(number)

    def _start(self, number: int) -> None:
        if self._running:
            params = SamplingParams(temperature=1.0, max_tokens=self._tokens, ignore_eos=True, seed=number)
            future = self._engine.submit([number + 1] * 8, params)
            future.add_done_callback(lambda _: self._start(number))

    def stop(self) -> None:
        """Start no more."""
        self._running = False


class Tokenizer:
    """The tokenizer thread: makes rows over and over until it is stopped."""

    def __init__(self, engine: AsyncLLM, requests: Requests, rows: list[Any]) -> None:
        self._engine, self._requests, self._rows = engine, requests, rows
        self._stop = threading.Event()
        self.made = self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="tokenize", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for row in self._endless():
            prompt, _ = self._requests.request(row, 0)
            self.tokens += len(self._engine.encode(prompt) if isinstance(prompt, str) else prompt)
            self.made += 1

    def _endless(self) -> Iterator[Any]:
        while not self._stop.is_set():
            for row in self._rows:
                if self._stop.is_set():
                    return
                yield row

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


def step_ms(engine: AsyncLLM, seconds: float) -> float:
    """Mean time of a step."""
    before, start = engine.stats().steps, time.perf_counter()
    time.sleep(seconds)
    return (time.perf_counter() - start) * 1e3 / (engine.stats().steps - before)


def settings(kind: str) -> JobConfig:
    """A job with prompts of one kind."""
    return build({"model": "m", "input": "i", "output": "o", **KINDS[kind]})


def measure(engine: AsyncLLM, kind: str, table: pa.Table, seconds: float, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` of: alone, beside a process, beside the thread."""
    if kind == "batch":
        table = table.select(BATCH_SCHEMA.names)
    requests = Requests(settings(kind), table.schema)
    requests.attach(engine.tokenizer, "m")
    rows = requests.rows(table)
    alone, process, beside, made, tokens = [], [], [], [], []
    for _ in range(rounds):
        alone.append(step_ms(engine, seconds))
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        process.append(step_ms(engine, seconds))
        other.kill()
        other.wait()
        tokenizer = Tokenizer(engine, requests, rows)
        start = time.perf_counter()
        beside.append(step_ms(engine, seconds))
        elapsed = time.perf_counter() - start
        made.append(tokenizer.made / elapsed)
        tokens.append(tokenizer.tokens / elapsed)
        tokenizer.stop()
    first, second = statistics.median(alone), statistics.median(beside)
    rows_a_second = statistics.median(made)
    return {
        "kind": kind,
        "step_ms_alone": round(first, 3),
        "step_ms_beside_a_process": round(statistics.median(process), 3),
        "step_ms_beside": round(second, 3),
        "slower": round(second / first - 1, 4),
        "rows_per_s": round(rows_a_second),
        "tokens_per_s": round(statistics.median(tokens)),
    }


def in_a_job(row: dict[str, Any], sequences: int, tokens: int) -> dict[str, Any]:
    """What it costs a job: the thread is busy only as long as the rows take that the engine ends."""
    ended = sequences / (row["step_ms_alone"] / 1e3 * tokens)
    busy = ended / row["rows_per_s"]
    return {
        **row,
        "engine_rows_per_s": round(ended, 1),
        "busy": round(busy, 4),
        "slower_in_a_job": round(busy * row["slower"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-42m", help="of the model, with random weights")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="that a row of the job generates")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--words", type=int, default=200, help="of a row's text")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help=f"write {Path('bench/results')}/NAME.json")
    args = parser.parse_args()
    table = make_rows(args.rows, args.words)
    with tempfile.TemporaryDirectory() as directory:
        write_shape(args.shape, Path(directory))
        vocabulary = json.loads((Path(directory) / "config.json").read_text())["vocab_size"]
        tokenizer = make_tokenizer(vocabulary)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(directory)
        engine = AsyncLLM(
            directory, load_format="dummy", max_model_len=1024, max_num_seqs=args.sequences, kvcache_block_size=64
        )
        load = Load(engine, args.sequences, 256)
        step_ms(engine, args.seconds)  # warm
        result: dict[str, Any] = {
            "benchmark": "prompts",
            "shape": args.shape,
            "sequences": args.sequences,
            "tokens_a_row": args.tokens,
            "words_a_row": args.words,
            "kinds": [],
        }
        for kind in KINDS:
            row = in_a_job(measure(engine, kind, table, args.seconds, args.rounds), args.sequences, args.tokens)
            result["kinds"].append(row)
            print(json.dumps(row), flush=True)
        load.stop()
        engine.shutdown()
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
