"""What constrained outputs cost on the CPU: compiling, and the masks of a step. Starts no engine and needs no model.

`python bench/grammar.py --save grammar_cpu`. Every schema is an object of ten fields. Two cases for the masks: all states follow one
schema, and each its own. The tokenizer is made here, with as many tokens as Qwen3's: byte-level BPE of all bytes, of words of up to four
letters with and without a space or a capital before them, of CJK characters and of what stands between the strings of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import save

from nanovllm.engine.grammar import GrammarCompiler, GrammarState
from nanovllm.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGITS = 151936
EOS = "<|im_end|>"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "price",
    "name",
    "color",
    "size",
    "order",
    "date",
    "note",
    "city",
]


def make_tokenizer(size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of `size` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {character: i for i, character in enumerate(sorted(byte_level.alphabet()))}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if left in vocab and right in vocab and left + right not in vocab and len(vocab) < size - 1:
            vocab[left + right] = len(vocab)
            merges.append((left, right))

    lower, space = string.ascii_lowercase, "Ġ"
    for left, right in ('":', '",', '"}', '{"', "},", '["', '"]', "],", ": ", ", "):
        merge(left.replace(" ", space), right.replace(" ", space))
    for left, right in (('":', space), ('",', space), ('":' + space, '"'), ('",' + space, '"'), (":" + space, '"')):
        merge(left, right)
    for letter in (*lower, *string.ascii_uppercase):
        merge(space, letter)
    starts = [*lower, *string.ascii_uppercase, *(space + letter for letter in lower)]
    for length in (2, 3):
        starts = [start for start in starts if len(start.removeprefix(space)) == length - 1]
        for start, letter in itertools.product(starts, lower):
            merge(start, letter)
        starts = [*starts, *(start + letter for start, letter in itertools.product(starts, lower))]
    for code in range(0x4E00, 0x4E00 + 8000):
        first, second, third = byte_level.pre_tokenize_str(chr(code))[0][0]
        merge(first, second)
        merge(first + second, third)
    rng = random.Random(0)
    threes = [token for token in vocab if len(token.removeprefix(space)) == 3 and token[-3:].isascii()]
    while len(vocab) < size - 1:
        merge(rng.choice(threes), rng.choice(lower))
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def make_schema(number: int) -> dict[str, Any]:
    """An object of ten fields, whose names tell it from all others."""
    kinds: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 1000 + number},
        {"type": "number"},
        {"type": "boolean"},
        {"enum": ["red", "green", "blue", f"shade {number}"]},
        {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        {"type": "string", "format": "date"},
        {"type": ["string", "null"]},
    ]
    rng = random.Random(number)
    names = [f"{word}_{number}" for word in rng.sample(WORDS, 10)]
    properties = dict(zip(names, kinds, strict=True))
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def make_instance(schema: dict[str, Any], rng: random.Random) -> str:
    """A text that satisfies a schema of `make_schema`."""

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    values: list[Any] = [
        words(12),
        words(4),
        rng.randint(0, 1000),
        round(rng.uniform(-1000, 1000), 3),
        rng.random() < 0.5,
        rng.choice(["red", "green", "blue"]),
        [words(2) for _ in range(rng.randint(0, 5))],
        f"AB-{rng.randint(1000, 9999)}",
        f"20{rng.randint(10, 99)}-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}",
        rng.choice([None, words(3)]),
    ]
    return json.dumps(dict(zip(schema["properties"], values, strict=True)))


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quantiles(seconds: list[float], unit: float) -> dict[str, float]:
    values = np.array(seconds) * unit
    return {
        "mean": round(float(values.mean()), 3),
        "p50": round(float(np.median(values)), 3),
        "p99": round(float(np.quantile(values, 0.99)), 3),
        "max": round(float(values.max()), 3),
    }


def compile_cost(tokenizer: PreTrainedTokenizerBase, eos: int, count: int, threads: int) -> dict[str, Any]:
    """Milliseconds a schema, from the dict of a row to a state, and memory of what the cache keeps."""
    wanted = [StructuredOutputsParams(json=make_schema(number)) for number in range(count)]
    compiler = GrammarCompiler(tokenizer, LOGITS, [eos], cache_size=1000)
    seconds: list[float] = []

    def one(params: StructuredOutputsParams) -> None:
        start = time.perf_counter()
        compiler.compile(params).start()
        seconds.append(time.perf_counter() - start)

    before, start = peak_kib(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, wanted))
    total = time.perf_counter() - start
    start = time.perf_counter()
    for params in wanted[-500:]:
        compiler.compile(params).start()
    return {
        "schemas": count,
        "threads": threads,
        "total_s": round(total, 3),
        "schemas_per_s": round(count / total),
        "ms_each": quantiles(seconds, 1e3),
        "us_each_from_cache": round((time.perf_counter() - start) / 500 * 1e6, 1),
        "peak_kib_a_kept_grammar": round((peak_kib() - before) / min(count, 1000)),
    }


def mask_cost(
    tokenizer: PreTrainedTokenizerBase, eos: int, states: int, distinct: bool, threads: int
) -> dict[str, Any]:
    """Milliseconds a step for the masks of `states` sequences, each at another place of its text."""
    compiler = GrammarCompiler(tokenizer, LOGITS, [eos], threads=threads)
    rng = random.Random(1)
    rows: list[tuple[GrammarState, list[int]]] = []
    for number in range(states):
        schema = make_schema(number if distinct else 0)
        ids = tokenizer.encode(make_instance(schema, rng))
        state = compiler.compile(StructuredOutputsParams(json=schema)).start()
        for _ in range(rng.randrange(len(ids) // 2)):
            assert state.accept(ids.pop(0))
        rows.append((state, [*ids, eos]))
    out = np.empty((states, compiler.mask_words), np.int32)
    fill: list[float] = []
    accept: list[float] = []
    forced = tokens = 0
    for step in range(min(len(ids) for _, ids in rows)):
        start = time.perf_counter()
        compiler.fill_masks([state for state, _ in rows], out)
        middle = time.perf_counter()
        for state, ids in rows:
            assert state.accept(ids[step])
        fill.append(middle - start)
        accept.append(time.perf_counter() - middle)
        tokens += states
        forced += sum(bool(state.forced_tokens()) for state, _ in rows)
    return {
        "states": states,
        "schemas": states if distinct else 1,
        "threads": threads,
        "steps": len(fill),
        "fill_ms_a_step": quantiles(fill, 1e3),
        "first_step_ms": round(fill[0] * 1e3, 3),
        "accept_ms_a_step": quantiles(accept, 1e3),
        "forced_share_of_tokens": round(forced / tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=10_000)
    parser.add_argument("--states", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="the second run's; default: all cores")
    parser.add_argument("--save", metavar="NAME", help=f"write {Path('bench/results')}/NAME.json")
    args = parser.parse_args()
    tokenizer = make_tokenizer(LOGITS)
    eos = tokenizer.convert_tokens_to_ids(EOS)
    start = time.perf_counter()
    GrammarCompiler(tokenizer, LOGITS, [eos])
    result: dict[str, Any] = {
        "benchmark": "grammar",
        "vocabulary": len(tokenizer),
        "tokenizer_s": round(time.perf_counter() - start, 3),
        "compile": [],
        "masks": [],
    }
    print(json.dumps({key: value for key, value in result.items() if value != []}))
    for threads in sorted({1, args.threads}):
        result["compile"].append(compile_cost(tokenizer, eos, args.schemas, threads))
        print(json.dumps(result["compile"][-1]), flush=True)
    for distinct, threads in itertools.product((False, True), sorted({1, args.threads})):
        result["masks"].append(mask_cost(tokenizer, eos, args.states, distinct, threads))
        print(json.dumps(result["masks"][-1]), flush=True)
    if args.save:
        print(save(args.save, result))


if __name__ == "__main__":
    main()
