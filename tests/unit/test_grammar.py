"""Constrained outputs without a model: a walker that draws any allowed token, checked by validators that know no grammar."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.engine.grammar import Grammar, GrammarCompiler, GrammarState, allow_all, allow_only, grammar_problem
from nanovllm.engine.reasoning import Constraint
from nanovllm.errors import UserError
from nanovllm.structured_outputs import StructuredOutputsParams, parsed_value
from tests.models import write_tokenizer

EOS = (2, 0)  # <|im_end|>, which is the tokenizer's, and <|endoftext|>
VOCAB = 330  # the tokenizer has 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, EOS)


def params(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def allowed(state: Constraint) -> list[int]:
    mask = np.full((VOCAB + 31) // 32, 0x5A5A5A5A, np.int32)
    state.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


class Walker:
    """Generates from masks, any allowed token with the same chance; after `patience` tokens it hurries to the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, patience: int = 24, limit: int = 400) -> None:
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.patience = patience
        self.limit = limit
        # What closes JSON soonest; a regex has its own ends.
        self.closers = [tokenizer.encode(c)[0] for c in '}]"n']

    def walk(self, state: GrammarState) -> tuple[str, bool]:
        """The text, and whether the grammar came to its end within the limit."""
        ids: list[int] = []
        while len(ids) < self.limit:
            ids_allowed = allowed(state)
            assert ids_allowed, "a mask allows something"
            assert max(ids_allowed) < 300, "no id past the tokenizer's vocabulary"
            assert (EOS[0] in ids_allowed) == (EOS[1] in ids_allowed) == state.is_complete
            token = self.choose(ids_allowed, len(ids))
            assert state.accept(token), state.problem
            if token in EOS:
                assert state.is_finished and state.is_complete
                break
            ids.append(token)
        assert state.problem is None
        return self.tokenizer.decode(ids), state.is_finished

    def choose(self, ids: list[int], length: int) -> int:
        ends = [i for i in ids if i in EOS]
        if ends and (len(ends) == len(ids) or length > self.patience or self.rng.random() < 0.2):
            return self.rng.choice(ends)
        others = [i for i in ids if i not in EOS]
        if length > self.patience:
            closers = [i for i in others if i in self.closers]
            return self.rng.choice(closers or others)
        return self.rng.choice(others)


# --- random schemas, regexes and choices ---------------------------------------------------------------------------------

WORDS = ["a", "ab", "name", "price", "fox", "the dog", "größe", "日本", "🙂 yes", 'say "hi"', "back\\slash", "a/b", "tab\t", ""]
PATTERNS = ["^[a-z]{1,5}$", "^(ab|cd)+$", "^\\d{3}-\\d{4}$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "^[^\\s]{2,4}$", "fo+", "^é?[à-ü]+$"]
FORMATS = ["date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "hostname", "duration", "uri"]


class SchemaMaker:
    """Random JSON schemas of every feature that is claimed to work."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.defs: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        if self.rng.random() < 0.15:
            # A list or a tree: it refers to itself.
            items = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
            self.defs["node"] = self.closed({"value": self.leaf(), "next": items}, ["value", "next"])
            schema: dict[str, Any] = {"$ref": "#/$defs/node"}
        else:
            schema = self.schema(self.rng.randint(1, 3))
        return {**schema, "$defs": self.defs} if self.defs else schema

    def schema(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        if depth == 0 or rng.random() < 0.25:
            return self.leaf()
        kind = rng.choice(["object", "object", "object", "array", "array", "anyOf", "oneOf", "$ref", "allOf"])
        if kind == "object":
            return self.object(depth)
        if kind == "array":
            return self.array(depth)
        if kind == "anyOf":
            return {"anyOf": [self.schema(depth - 1) for _ in range(rng.randint(1, 3))]}
        if kind == "oneOf":  # alternatives that exclude each other by their tag
            return {"oneOf": [self.closed({"kind": {"const": t}, "x": self.leaf()}, ["kind", "x"]) for t in ("p", "q")]}
        if kind == "allOf":
            low, high = sorted(rng.sample(range(-20, 20), 2))
            return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": high}]}
        name = f"d{len(self.defs)}"
        self.defs[name] = {}  # the name is taken
        self.defs[name] = self.schema(depth - 1)
        return {"$ref": f"#/$defs/{name}"}

    def closed(self, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def object(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        names = rng.sample(WORDS, rng.randint(0, 4))
        schema = self.closed({name: self.schema(depth - 1) for name in names}, [n for n in names if rng.random() < 0.6])
        kind = rng.random()
        if kind < 0.1:
            schema["additionalProperties"] = self.leaf()
        elif kind < 0.15:
            del schema["additionalProperties"]
        elif kind < 0.2:
            schema["patternProperties"] = {"^x_": self.leaf()}
        elif kind < 0.3:
            schema["maxProperties"] = max(1, len(schema["required"]))
        elif kind < 0.4 and names:
            schema["minProperties"] = rng.randint(1, len(names))
        return schema

    def array(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        low = rng.randint(0, 3)
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth - 1)}
        if rng.random() < 0.7:
            schema["minItems"] = low
        if rng.random() < 0.7:
            schema["maxItems"] = low + rng.randint(0, 3)
        if rng.random() < 0.2:
            schema["prefixItems"] = [self.leaf() for _ in range(rng.randint(1, 2))]
        return schema

    def leaf(self) -> dict[str, Any]:
        rng = self.rng
        kind = rng.choice(["string", "length", "pattern", "format", "integer", "number", "const", "enum", "type", "types"])
        if kind == "string":
            return {"type": "string", "description": "any"}
        if kind == "length":
            low = rng.randint(0, 4)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}
        if kind == "pattern":
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        if kind == "format":
            return {"type": "string", "format": rng.choice(FORMATS)}
        if kind in ("integer", "number"):
            return self.number(kind)
        if kind == "const":
            return {"const": rng.choice([*WORDS, 0, -17, 2.5, True, False, None, [1, "x"], {"k": [None]}])}
        if kind == "enum":
            return {"enum": rng.sample([*WORDS, 1, 2.5, None, True, [], {"a": 1}], rng.randint(1, 5))}
        if kind == "type":
            return {"type": rng.choice(["boolean", "null", "string", "integer", "number"])}
        return {"type": rng.sample(["boolean", "null", "string", "integer"], 2)}

    def number(self, kind: str) -> dict[str, Any]:
        rng = self.rng
        schema: dict[str, Any] = {"type": kind}
        low = rng.randint(-1000, 1000)
        high = low + rng.choice([2, 3, 10, 12345])
        if rng.random() < 0.7:
            schema[rng.choice(["minimum", "exclusiveMinimum"])] = low if kind == "integer" else low + rng.choice([0, 0.25])
        if rng.random() < 0.7:
            schema[rng.choice(["maximum", "exclusiveMaximum"])] = high if kind == "integer" else high + rng.choice([0, 0.5])
        if rng.random() < 0.15:
            schema["multipleOf"] = rng.choice([2, 3, 5]) if kind == "integer" else rng.choice([0.5, 0.25, 0.1])
        return schema


def make_regex(rng: random.Random, depth: int = 3) -> str:
    if depth == 0:
        return rng.choice(["a", "b", "[a-f]", "\\d", "[^x-z\\n]", "é", "🙂", "\\.", ".", "\\w", "[A-Z0-9_]", "\\\\", '"', "/"])
    parts = []
    for _ in range(rng.randint(1, 3)):
        part = make_regex(rng, depth - 1)
        kind = rng.random()
        if kind < 0.3:
            part = f"(?:{part}|{make_regex(rng, depth - 1)})"
        if kind < 0.6:
            part = f"(?:{part}){rng.choice(['?', '*', '+', '{2}', '{1,3}', '*?'])}"
        parts.append(part)
    text = "".join(parts)
    return f"^{text}$" if depth == 3 and rng.random() < 0.2 else text


def make_choice(rng: random.Random) -> list[str]:
    alphabet = ["a", "b", "ab", "the ", "quick", "Ä", "🙂", "\n", '"', "\\", "\x01", "/", "|", "<|", "0"]
    return sorted({"".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 12))})


# jsonschema checks few formats without further packages; these are the rest.
FORMAT_CHECKER = FormatChecker(["email", "ipv4", "ipv6", "uuid"])
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|z|[+-]([01]\d|2[0-3]):[0-5]\d)"


@FORMAT_CHECKER.checks("time")
def is_time(value: object) -> bool:
    return re.fullmatch(_TIME, str(value)) is not None


@FORMAT_CHECKER.checks("date", raises=ValueError)
def is_date(value: object) -> bool:
    text = str(value)
    # RFC 3339 has a year 0, a leap year; Python has not.
    return date.fromisoformat("2000" + text[4:] if text.startswith("0000") else text) is not None and len(text) == 10


@FORMAT_CHECKER.checks("date-time", raises=ValueError)
def is_date_time(value: object) -> bool:
    text = str(value)
    return is_date(text[:10]) and re.fullmatch("[Tt ]" + _TIME, text[10:]) is not None


@FORMAT_CHECKER.checks("hostname")
def is_hostname(value: object) -> bool:
    label = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return re.fullmatch(rf"{label}(\.{label})*", str(value)) is not None


@FORMAT_CHECKER.checks("duration")
def is_duration(value: object) -> bool:
    return re.fullmatch(r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?", str(value)) is not None


@FORMAT_CHECKER.checks("uri")
def is_uri(value: object) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s]*$", str(value)) is not None


def exactly(text: str) -> Any:
    """Numbers with all their digits: a float of 0.99999999999999999999 is 1."""
    return json.loads(text, parse_float=decimal)


def decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except InvalidOperation:  # an exponent of 19 digits
        return Decimal(float(digits))


def schema_error(schema: dict[str, Any], text: str) -> str | None:
    validator = Draft202012Validator(exactly(json.dumps(schema)), format_checker=FORMAT_CHECKER)
    error = next(validator.iter_errors(exactly(text)), None)
    return error and error.message


def run_many(
    compiler: GrammarCompiler,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[int], StructuredOutputsParams],
    check: Callable[[StructuredOutputsParams, str], str | None],
    count: int,
) -> tuple[int, int]:
    """How many were refused and how many had no end within the walker's limit; all others are valid."""
    refused = unfinished = 0
    for seed in range(count):
        wanted = make(seed)
        refusal = compiler.problem(wanted)
        if refusal is not None:
            assert refusal.startswith("structured_outputs ") and "\n" not in refusal
            refused += 1
            continue
        grammar = compiler.compile(wanted)
        for again in range(2):
            text, finished = Walker(tokenizer, seed * 2 + again).walk(grammar.start())
            if not finished:
                unfinished += 1
                continue
            wrong = check(wanted, text)
            assert wrong is None, (seed, wanted, text, wrong)
            value, problem = parsed_value(wanted, text, "stop", True)
            assert problem is None and value is not None, (seed, text)
    return refused, unfinished


def test_random_schemas(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    def check(wanted: StructuredOutputsParams, text: str) -> str | None:
        assert isinstance(wanted.json, dict)
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
        if re.search(r"(?<![,:]) |[\t\r\n]", outside):
            return "whitespace"
        return schema_error(wanted.json, text)

    refused, unfinished = run_many(compiler, tokenizer, lambda seed: params(json=SchemaMaker(seed).make()), check, 600)
    print(refused, unfinished)
    assert refused <= 600 * 0.05
    assert unfinished <= 1200 * 0.03
