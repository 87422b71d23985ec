"""How fast are prompts made, and does making them slow the engine down? For five kinds of rows: plain text, messages through a chat
template, a template over columns, bodies of OpenAI's batch API, and token ids. A row is made as far as the engine's sequence.

`python bench/prompts.py --save prompts_cpu`. First with the engine idle: rows a second of the row path, which tokenizes 64 rows in one
call, and of the same rows one by one; and of each the share of the thread's processor time that is spent in Python, outside the
tokenizer's own code: at most that long it holds Python's lock, which the engine wants too.

Then beside the engine, which decodes the same number of sequences all the time. In turns nothing runs; another process that does nothing
but take a core, which costs what any work on this machine costs; and the row path without a pause. What it costs more than the process is
Python's lock. The rows it makes are not run, so that the engine's work stays the same. What an engine takes in is one row for each that ends,
which is far less than the thread makes: the share of time that it is busy in a job is (rows the engine ends a second) / (rows a second).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
from common import save, write_shape
from grammar import WORDS, make_tokenizer

from nanovllm import AsyncLLM, RequestOutput, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import error_output
from pipelines.inputs import BATCH_SCHEMA
from pipelines.job import JobConfig, build
from pipelines.prompts import Rendered
from pipelines.requests import Requests
from pipelines.row_values import TokenIds
from pipelines.rows import SUBMIT_ROWS, RowPath

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
    "tokens": {"prompt": {"column": "ids"}},
}


def make_rows(count: int, words: int, tokens: int, vocabulary: int) -> pa.Table:
    """Rows with columns for every kind of prompt: the same texts of some words, and some token ids of a vocabulary."""
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
            "ids": pa.array([rng.choices(range(vocabulary), k=tokens) for _ in texts], pa.list_(pa.int32())),
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


class Native:
    """A tokenizer's compiled half, with the time that a thread spends in it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.cpu_s = 0.0

    def __getattr__(self, name: str) -> Any:
        """Everything else."""
        return getattr(self._inner, name)

    def encode_batch(self, *args: Any, **options: Any) -> Any:
        """As it does, timed."""
        start = time.thread_time()
        try:
            return self._inner.encode_batch(*args, **options)
        finally:
            self.cpu_s += time.thread_time() - start


class Sink:
    """An engine that tokenizes as another one does, and runs nothing."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.tokenizer, self.max_prompt_len = engine.tokenizer, engine.max_prompt_len
        self.encode, self.encode_batch = engine.encode, engine.encode_batch
        self.stats, self.shutdown = engine.stats, engine.shutdown
        self._make = engine._engine.make_sequence
        self.made = self.tokens = 0
        self.cpu_s = 0.0

    def submit(self, prompt: str | TokenIds, params: SamplingParams) -> Future[RequestOutput]:
        """Make and count one row."""
        assert isinstance(self._make(prompt, params), Sequence)
        self.made += 1
        self.tokens += len(prompt)
        self.cpu_s = time.thread_time()  # of the row path's own thread so far
        future: Future[RequestOutput] = Future()
        future.set_result(error_output("not run"))
        return future


class Making:
    """The row path, which makes rows over and over until it is stopped; or a thread that makes the same rows one by one."""

    def __init__(self, engine: AsyncLLM, requests: Requests, rows: list[Any], together: bool = True) -> None:
        self.sink, self._requests, self._rows = Sink(engine), requests, rows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._together if together else self._one_by_one, daemon=True)
        self._thread.start()

    def _together(self) -> None:
        path = RowPath(self.sink, "error")
        while not self._stop.is_set():
            for start in range(0, len(self._rows), 2 * SUBMIT_ROWS):
                some = self._rows[start : start + 2 * SUBMIT_ROWS]
                asyncio.run(path.run(self._requests, some, [0] * len(some), lambda *_: None))
                if self._stop.is_set():
                    return

    def _one_by_one(self) -> None:
        assert self.sink.tokenizer is not None
        while not self._stop.is_set():
            for row in self._rows:
                prompt, params = self._requests.request(row, 0)
                if isinstance(prompt, Rendered):
                    prompt = prompt.token_ids(self.sink.tokenizer)
                self.sink.submit(self.sink.encode(prompt) if isinstance(prompt, str) else prompt, params)
                if self._stop.is_set():
                    return

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()


def rates(engine: AsyncLLM, requests: Requests, rows: list[Any], seconds: float, rounds: int) -> dict[str, Any]:
    """Of both ways in turns, with nothing beside them: medians of rows a second and of what a row costs the thread."""
    tokenizer: Any = engine.tokenizer
    found: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    inner = tokenizer._tokenizer
    for _ in range(rounds):
        for together, some in found.items():
            tokenizer._tokenizer = native = Native(inner)
            start = time.perf_counter()
            making = Making(engine, requests, rows, together)
            time.sleep(seconds)
            making.stop()
            sink, elapsed = making.sink, time.perf_counter() - start
            python_s = sink.cpu_s - native.cpu_s
            some.append((sink.made / elapsed, python_s / sink.made, python_s / elapsed))
    tokenizer._tokenizer = inner
    result: dict[str, Any] = {}
    for name, together in (("together", True), ("one_by_one", False)):
        a_second, python, share = (statistics.median(values) for values in zip(*found[together], strict=True))
        result[name] = {
            "rows_per_s": round(a_second),
            "python_us_a_row": round(python * 1e6),
            "python_share": round(share, 3),
        }
    return result


def step_ms(engine: AsyncLLM, seconds: float) -> float:
    """Mean time of a step."""
    before, start = engine.stats().steps, time.perf_counter()
    time.sleep(seconds)
    return (time.perf_counter() - start) * 1e3 / (engine.stats().steps - before)


def settings(kind: str) -> JobConfig:
    """A job with prompts of one kind."""
    return build({"model": "m", "input": "i", "output": "o", **KINDS[kind]})


def rows_of(engine: AsyncLLM, kind: str, table: pa.Table) -> tuple[Requests, list[Any]]:
    """What makes the prompts of one kind, and the rows."""
    if kind == "batch":
        table = table.select(BATCH_SCHEMA.names)
    requests = Requests(settings(kind), table.schema)
    requests.attach(engine.tokenizer, "m")
    return requests, requests.rows(table)


def beside(engine: AsyncLLM, requests: Requests, rows: list[Any], seconds: float, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` of: alone, beside a process, beside the row path."""
    alone, process, making, made, tokens = [], [], [], [], []
    for _ in range(rounds):
        alone.append(step_ms(engine, seconds))
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        process.append(step_ms(engine, seconds))
        other.kill()
        other.wait()
        thread = Making(engine, requests, rows)
        start = time.perf_counter()
        making.append(step_ms(engine, seconds))
        elapsed = time.perf_counter() - start
        made.append(thread.sink.made / elapsed)
        tokens.append(thread.sink.tokens / elapsed)
        thread.stop()
    first, second = statistics.median(alone), statistics.median(making)
    rows_a_second = statistics.median(made)
    return {
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
    parser.add_argument("--prompt-tokens", type=int, default=1184, help="of a row of token ids")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help=f"write {Path('bench/results')}/NAME.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_shape(args.shape, Path(directory))
        vocabulary = json.loads((Path(directory) / "config.json").read_text())["vocab_size"]
        table = make_rows(args.rows, args.words, args.prompt_tokens, vocabulary)
        tokenizer = make_tokenizer(vocabulary)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(directory)
        engine = AsyncLLM(
            directory,
            load_format="dummy",
            max_model_len=max(1024, 2 * args.prompt_tokens),
            max_num_seqs=args.sequences,
            kvcache_block_size=64,
        )
        kinds = {kind: rows_of(engine, kind, table) for kind in args.kinds}
        idle = {kind: rates(engine, *made, args.seconds, args.rounds) for kind, made in kinds.items()}
        load = Load(engine, args.sequences, 256)
        step_ms(engine, args.seconds)  # warm
        result: dict[str, Any] = {
            "benchmark": "prompts",
            "shape": args.shape,
            "sequences": args.sequences,
            "tokens_a_row": args.tokens,
            "words_a_row": args.words,
            "prompt_tokens": args.prompt_tokens,
            "kinds": [],
        }
        for kind in args.kinds:
            row = in_a_job(beside(engine, *kinds[kind], args.seconds, args.rounds), args.sequences, args.tokens)
            row = {"kind": kind, "idle": idle[kind], **row}
            result["kinds"].append(row)
            print(json.dumps(row), flush=True)
        load.stop()
        engine.shutdown()
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
