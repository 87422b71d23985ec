"""The answers of a job with `format: openai_batch`: `_results.jsonl`, one object a request, in the order of the input.

The driver writes it when all shards are committed, from their files, a few rows at a time; `_SUCCESS` comes after it. Objects are those
of OpenAI's batch API, with what `vllm run-batch` adds. All but `created`, the second in which a shard was committed, follow from the
input, so a job that is resumed writes the same lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipelines.columns import OutputColumns
from pipelines.commit import OutputDirectory
from pipelines.inputs import BATCH_SCHEMA
from pipelines.openai_batch import ENDPOINTS
from pipelines.plan import Shard

NAME = "_results.jsonl"
ROWS_AT_ONCE = 64  # a row may have log-probabilities of thousands of tokens
LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM writes this too

Answer = dict[str, Any]


class BatchResults:
    """The answers of one job.

    Args:
        output: where its shards are.
        shards: of the plan, all of them committed.
        columns: of the output.
        model: the name that answers have where a body gives none.
    """

    def __init__(self, output: OutputDirectory, shards: Sequence[Shard], columns: OutputColumns, model: str) -> None:
        self._output = output
        self._shards = shards
        self._columns = columns
        self._model = model
        self._ids: list[np.ndarray] = []

    def lines(self) -> Iterator[bytes]:
        """The lines of the file, some at a time.

        Raises:
            OSError: a shard cannot be read.
        """
        self._ids = []
        for shard in self._shards:
            created = self._output.committed_at(shard.index)
            number = shard.first_row
            for rows in self._rows(shard):
                places = [f"{shard.file}\0{row}" for row in range(number, number + len(rows))]
                number += len(rows)
                # A request without an id repeats none.
                ids = [row["custom_id"] or f"\0{place}" for row, place in zip(rows, places, strict=True)]
                self._ids.append(np.array([xxhash.xxh64_intdigest(_bytes(one)) for one in ids], np.uint64))
                answers = (answer(row, place, created, self._model) for row, place in zip(rows, places, strict=True))
                yield b"".join(_line(one) for one in answers)

    def repeated(self) -> tuple[int, str | None]:
        """After `lines`: how many requests have the `custom_id` of an earlier one, and one such id."""
        ids = np.concatenate(self._ids) if self._ids else np.empty(0, np.uint64)
        order = np.argsort(ids, kind="stable")
        again = order[1:][ids[order[1:]] == ids[order[:-1]]]
        if not len(again):
            return 0, None
        position = int(again.min())
        for shard in self._shards:
            if position < shard.rows:
                return len(again), self._output.read_part(shard.index, ["custom_id"])["custom_id"][position].as_py()
            position -= shard.rows
        raise AssertionError("positions are of rows")

    def _rows(self, shard: Shard) -> Iterator[list[dict[str, Any]]]:
        """Rows of a shard with their generated columns under names without the prefix."""
        generated = {self._columns.name(name): name for name in self._columns.names}
        place = self._output.part(shard.index)
        with place.fs.open_input_file(place.path) as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[*BATCH_SCHEMA.names, *generated]):
                names = [generated.get(name, name) for name in batch.schema.names]
                yield pa.RecordBatch.from_arrays(batch.columns, names=names).to_pylist()


def answer(row: Mapping[str, Any], place: str, created: int, model: str) -> Answer:
    """The answer to one request.

    Args:
        row: its columns in the output, those of samples as lists.
        place: of the request in the input; ids follow from it.
        created: seconds since 1970.
        model: the job's.
    """
    key = xxhash.xxh3_128_hexdigest(_bytes(place))
    envelope: Answer = {"id": f"batch_req_{key}", "custom_id": row["custom_id"]}
    request_id = f"req_{key}"
    if row["error"] is not None:
        # What an engine died of is no mistake of the request, as far as anyone knows.
        code, kind = (
            (500, "InternalServerError") if row["error"].startswith("the engine died") else (400, "BadRequestError")
        )
        error = {"message": row["error"], "type": kind, "param": None, "code": code}
        return {**envelope, "response": {"status_code": code, "request_id": request_id, "body": None}, "error": error}
    body = json.loads(row["body"])
    chat = ENDPOINTS[row["url"]] == "chat"
    generated = sum(row["num_generated_tokens"])
    usage = {
        "prompt_tokens": row["num_input_tokens"],
        "completion_tokens": generated,
        "total_tokens": row["num_input_tokens"] + generated,
    }
    if row.get("num_cached_tokens") is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": row["num_cached_tokens"]}
    completion = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{key}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": body.get("model") or model,
        "choices": [(_chat_choice if chat else _choice)(row, body, i) for i in range(len(row["generated_text"]))],
        "usage": usage,
    }
    return {**envelope, "response": {"status_code": 200, "request_id": request_id, "body": completion}, "error": None}


def _chat_choice(row: Mapping[str, Any], body: Mapping[str, Any], number: int) -> Answer:
    message = {"role": "assistant", "content": row["generated_text"][number]}
    if "reasoning_text" in row:
        message["reasoning_content"] = row["reasoning_text"][number]
    logprobs = None
    if body.get("logprobs") and row["logprobs"][number] is not None:
        top = body.get("top_logprobs") or 0
        logprobs = {"content": [_chat_token(token, top) for token in row["logprobs"][number]]}
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": row["finish_reason"][number]}


def _chat_token(found: Sequence[Mapping[str, Any]], top: int) -> Answer:
    """What is known of one token: `found` has it first, then the likeliest ones."""
    likeliest = sorted((entry for entry in found if entry["rank"] <= top), key=lambda entry: int(entry["rank"]))
    return {**_token(found[0]), "top_logprobs": [_token(entry) for entry in likeliest]}


def _token(entry: Mapping[str, Any]) -> Answer:
    text = entry["decoded_token"] or ""
    return {"token": text, "logprob": _finite(entry["logprob"]), "bytes": list(text.encode())}


def _choice(row: Mapping[str, Any], body: Mapping[str, Any], number: int) -> Answer:
    text = row["generated_text"][number]
    logprobs = None
    if body.get("logprobs") is not None and row["logprobs"][number] is not None:
        tokens = row["logprobs"][number]
        texts = [found[0]["decoded_token"] or "" for found in tokens]
        logprobs = {
            "text_offset": [0, *np.cumsum([len(one) for one in texts]).tolist()][: len(texts)],
            "token_logprobs": [_finite(found[0]["logprob"]) for found in tokens],
            "tokens": texts,
            "top_logprobs": [
                {entry["decoded_token"] or "": _finite(entry["logprob"]) for entry in found} for found in tokens
            ],
        }
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": row["finish_reason"][number]}


def _line(one: Answer) -> bytes:
    try:
        return json.dumps(one, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in the name of a model can only be written as its escape
        return json.dumps(one).encode() + b"\n"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # names of files may be any bytes


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
