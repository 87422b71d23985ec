"""Constrained outputs without a model: a walker that draws any allowed token, checked by validators that know no grammar."""

from __future__ import annotations

import json
import pickle
import random
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.engine.grammar import (
    MATCHERS_PER_THREAD,
    STATES_PER_MATCHER,
    Grammar,
    GrammarCompiler,
    GrammarState,
    grammar_problem,
)
from nanovllm.engine.reasoning import Constraint, ReasoningGate, ThinkTags
from nanovllm.engine.token_masks import allow_all, allow_only
from nanovllm.errors import UserError
from nanovllm.structured_outputs import StructuredOutputsParams, parsed_value
from tests.models import write_tokenizer

EOS = (2, 0)  # <|im_end|>, which is the tokenizer's, and <|endoftext|>
VOCAB = 330  # the tokenizer has 300
# Outside of strings; the default form has one space after each colon and comma.
BAD_WHITESPACE = re.compile(r"(?<![,:]) |[\t\r\n]")


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
        # What closes JSON soonest, and what the formats, patterns and regexes wait for.
        self.closers = [{tokenizer.encode(c)[0] for c in text} for text in ('}]"', "@.on0abA/\\:-DM", "")]

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
            wanted = self.rng.choices(self.closers, weights=(4, 2, 1))[0]
            others = [i for i in others if i in wanted] or others
        return self.rng.choice(others)


# --- random schemas, regexes and choices ---------------------------------------------------------------------------------

WORDS = [
    "a",
    "ab",
    "name",
    "price",
    "fox",
    "the dog",
    "größe",
    "日本",
    "🙂 yes",
    'say "hi"',
    "back\\slash",
    "a/b",
    "tab\t",
    "",
]
PATTERNS = [
    "^[a-z]{1,5}$",
    "^(ab|cd)+$",
    "^\\d{3}-\\d{4}$",
    "^[A-Z][a-z]*( [A-Z][a-z]*)?$",
    "^[^\\s]{2,4}$",
    "fo+",
    "^é?[à-ü]+$",
]
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
        kind = rng.choice(
            ["string", "length", "pattern", "format", "integer", "number", "const", "enum", "type", "types"]
        )
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
            schema[rng.choice(["minimum", "exclusiveMinimum"])] = (
                low if kind == "integer" else low + rng.choice([0, 0.25])
            )
        if rng.random() < 0.7:
            schema[rng.choice(["maximum", "exclusiveMaximum"])] = (
                high if kind == "integer" else high + rng.choice([0, 0.5])
            )
        if rng.random() < 0.15:
            schema["multipleOf"] = rng.choice([2, 3, 5]) if kind == "integer" else rng.choice([0.5, 0.25, 0.1])
        return schema


# Without \d and \w: Python and Rust know different versions of Unicode.
REGEX_LEAVES = [
    "a",
    "b",
    "[a-f]",
    "[0-9]",
    "[^x-z\\n]",
    "é",
    "🙂",
    "\\.",
    ".",
    "[A-Z0-9_]",
    "\\\\",
    '"',
    "/",
    "(?i:fox)",
]


def make_regex(rng: random.Random, depth: int = 2) -> str:
    """Repeats without a bound stand around single characters only: Python's `re` would take years for others."""
    if depth == 0:
        return rng.choice(REGEX_LEAVES) + rng.choice(["", "", "", "*", "+", "{2}", "{1,3}", "*?", "?"])
    parts = []
    for _ in range(rng.randint(1, 3)):
        part = make_regex(rng, depth - 1)
        if rng.random() < 0.4:
            part = f"(?:{part}|{make_regex(rng, depth - 1)})"
        if rng.random() < 0.3:
            part = f"(?:{part}){rng.choice(['?', '{2}', '{0,2}'])}"
        parts.append(part)
    text = "".join(parts)
    return f"^{text}$" if depth == 2 and rng.random() < 0.2 else text


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
            if value is None:
                assert problem and re.search(r"\d[eE].* is too large for a number", problem), (seed, text, problem)
    return refused, unfinished


def test_random_schemas(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    def check(wanted: StructuredOutputsParams, text: str) -> str | None:
        assert isinstance(wanted.json, dict)
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
        return "whitespace" if BAD_WHITESPACE.search(outside) else schema_error(wanted.json, text)

    refused, unfinished = run_many(compiler, tokenizer, lambda seed: params(json=SchemaMaker(seed).make()), check, 600)
    assert refused <= 600 * 0.04
    assert unfinished <= 1200 * 0.03


def test_random_schemas_with_whitespace_of_the_models_choice(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    def make(seed: int) -> StructuredOutputsParams:
        return params(json=SchemaMaker(seed).make(), disable_any_whitespace=False)

    seen = []

    def check(wanted: StructuredOutputsParams, text: str) -> str | None:
        assert isinstance(wanted.json, dict)
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
        seen.append(BAD_WHITESPACE.search(outside) is not None)
        return "whitespace" if re.search(r"\s{41}", outside) else schema_error(wanted.json, text)

    refused, unfinished = run_many(compiler, tokenizer, make, check, 100)
    assert refused <= 4
    assert unfinished <= 20
    assert any(seen)


def test_random_regexes(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    def check(wanted: StructuredOutputsParams, text: str) -> str | None:
        return None if re.fullmatch(wanted.regex or "", text) else "no match"

    refused, unfinished = run_many(
        compiler, tokenizer, lambda seed: params(regex=make_regex(random.Random(seed))), check, 250
    )
    assert refused <= 250 * 0.02
    assert unfinished <= 500 * 0.08


def test_random_choices(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    def check(wanted: StructuredOutputsParams, text: str) -> str | None:
        return None if text in (wanted.choice or ()) else "no choice"

    refused, unfinished = run_many(
        compiler, tokenizer, lambda seed: params(choice=make_choice(random.Random(seed))), check, 150
    )
    assert (refused, unfinished) == (0, 0)


# --- single features -----------------------------------------------------------------------------------------------------


def accepts(grammar: Grammar, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether `text` satisfies the grammar."""
    state = grammar.start()
    return all(state.accept(i) for i in tokenizer.encode(text)) and state.is_complete


def copy_of(state: GrammarState) -> GrammarState:
    return GrammarState(state.matcher.deep_copy(), state.family, EOS, state._free_words)


def states_of_walks(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, count: int) -> list[GrammarState]:
    """States all along some walks, the finished ones too."""
    states = []
    for seed in range(count):
        rng = random.Random(seed)
        kinds = [params(json=SchemaMaker(seed).make()), params(choice=make_choice(rng)), params(regex=make_regex(rng))]
        if compiler.problem(kinds[seed % 3]):
            continue
        state, walker = compiler.compile(kinds[seed % 3]).start(), Walker(tokenizer, seed)
        for length in range(50):
            states.append(copy_of(state))
            token = walker.choose(allowed(state), length)
            assert state.accept(token)
            if token in EOS:
                break
        states.append(state)
    return states


def test_forced_tokens_are_those_that_single_token_masks_force(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    lengths = []
    for state in states_of_walks(compiler, tokenizer, 60):
        forced, again = state.forced_tokens(), state.forced_tokens()
        assert forced == again, "looking does not consume"
        one_by_one = []
        while len(only := allowed(state)) == 1 and len(one_by_one) < 256:
            one_by_one += only
            assert state.accept(only[0])
        assert forced == one_by_one
        lengths.append(len(forced))
    assert len(lengths) > 500 and max(lengths) > 5 and lengths.count(0) > 100


def test_forced_text_of_a_schema(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    schema = {"type": "object", "properties": {"the": {"enum": ["quick", "fox"]}}, "required": ["the"]}
    state = compiler.compile(params(json={**schema, "additionalProperties": False})).start()
    assert tokenizer.decode(state.forced_tokens()) == '{"the": "'
    for token in [*state.forced_tokens(), *tokenizer.encode("f")]:
        assert state.accept(token)
    assert tokenizer.decode(state.forced_tokens()) == 'ox"}'
    for token in state.forced_tokens():
        assert state.accept(token)
    assert state.is_complete and state.is_stopped and not state.is_finished
    assert state.forced_tokens() == [] and sorted(allowed(state)) == sorted(EOS)


def test_a_long_constant_is_forced_in_pieces(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    state = compiler.compile(params(choice=["fox jumps over " * 100])).start()
    text: list[int] = []
    while forced := state.forced_tokens():
        assert len(forced) <= 256
        text += forced
        assert all(map(state.accept, forced))
    assert tokenizer.decode(text) == "fox jumps over " * 100 and state.is_stopped


def test_accept_refuses_what_the_mask_does_not_allow(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    refused = 0
    for number, state in enumerate(states_of_walks(compiler, tokenizer, 30)):
        before, forced = allowed(state), state.forced_tokens()
        for token in random.Random(number).sample(range(VOCAB), 60):
            if token in before:
                continue
            twin = copy_of(state)
            twin.is_finished = state.is_finished
            if twin.accept(token):  # the forced text, spelt otherwise
                assert forced and tokenizer.decode(forced).startswith(tokenizer.decode([token]))
                continue
            refused += 1
            assert (allowed(twin), twin.forced_tokens(), twin.problem) == (before, forced, None)
    assert refused > 5000


def test_every_end_token_ends_where_the_grammar_may_end_and_only_there(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = compiler.compile(params(choice=["a", "ab"]))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    for end in EOS:
        state = grammar.start()
        assert not state.accept(end) and not state.is_complete and set(allowed(state)).isdisjoint(EOS)
        assert state.accept(a) and state.is_complete and not state.is_stopped
        assert set(allowed(state)) == {b, *EOS}
        assert state.accept(end) and state.is_finished and state.is_stopped and state.is_complete
        assert set(allowed(state)) == set(EOS), "a finished sequence may only end again"
        assert not state.accept(b)
        longer = grammar.start()
        assert longer.accept(a) and longer.accept(b) and longer.is_stopped and longer.accept(end)


def test_end_tokens_are_the_models_not_the_tokenizers(tokenizer: PreTrainedTokenizerBase) -> None:
    a = tokenizer.encode("a")[0]
    for given, wanted in (([0], {0}), ([0, 1, 2], {0, 1, 2}), ([], {2})):
        state = GrammarCompiler(tokenizer, VOCAB, given).compile(params(choice=["a"])).start()
        assert state.accept(a)
        assert set(allowed(state)) == wanted
        assert not state.accept(({0, 1, 2, 3} - wanted).pop())


@pytest.mark.parametrize("vocab", [300, 301, 320, 321, 4096])
def test_ids_past_the_tokenizer_are_never_allowed(tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    compiler = GrammarCompiler(tokenizer, vocab, EOS)
    words = (vocab + 31) // 32
    for state in (compiler.compile(params(regex="(?s).*")).start(), compiler.compile(params(json_object=True)).start()):
        mask = np.full(words, -1, np.int32)
        state.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert bits[:300].any() and not bits[300:].any()
        mask[:] = -1
        state.fill_free_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert np.flatnonzero(bits == 0).tolist() == [0, 2, *range(300, words * 32)]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"cannot use this tokenizer: vocab size too small; 100 vs 300"):
        GrammarCompiler(tokenizer, 100, EOS)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 300])
def test_masks_by_hand(vocab: int) -> None:
    mask = np.full((vocab + 31) // 32 + 1, 77, np.int32)
    allow_all(mask, vocab)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == list(range(vocab))
    ids = sorted({0, vocab - 1, vocab // 2})
    allow_only(mask, ids)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == ids


@pytest.mark.parametrize("threads", [1, 2])
def test_filling_many_is_filling_each(tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS, threads=threads)
    states: list[Constraint] = list(states_of_walks(compiler, tokenizer, 12))
    tags = ThinkTags.of(tokenizer)
    grammar = compiler.compile(params(choice=["a", "ab"]))
    for prompt, inner in (("x", grammar.start()), ("</think>", grammar.start()), ("x", None)):
        states.append(ReasoningGate(tags, tokenizer.encode(prompt), inner, None, VOCAB, EOS))
    states.append(ReasoningGate(tags, [], grammar.start(), 0, VOCAB, EOS))
    # So many of one grammar that they are spread over several compiled forms.
    same = compiler.compile(params(regex="[a-z]{1,9}[0-9]+"))
    forms = MATCHERS_PER_THREAD * threads if threads > 1 else 1
    for number in range((forms + 1) * STATES_PER_MATCHER):
        states.append(state := same.start())
        for letter in "abcdefgh"[: number % 9]:
            assert state.accept(tokenizer.encode(letter)[0])
    assert (
        len({state.family for state in states if isinstance(state, GrammarState)} & {*map(id, same._matchers)}) == forms
    )
    random.Random(0).shuffle(states)
    out = np.full((len(states) + 3, compiler.mask_words), 0x5A5A5A5A, np.int32)
    compiler.fill_masks(states, out)
    for state, row in zip(states, out, strict=False):
        assert np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() == allowed(state)
    assert (out[len(states) :] == 0x5A5A5A5A).all(), "rows of nobody are left alone"


def test_who_asks_a_state_waits_for_its_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS, threads=2)
    grammar = compiler.compile(params(regex="[a-z ]{3,500}"))
    states = [grammar.start() for _ in range(3000)]
    filling = compiler.start_masks(states, np.zeros((len(states), compiler.mask_words), np.int32))
    assert filling is not None
    assert not states[-1].is_complete
    assert filling.done()


@pytest.mark.parametrize("threads", [1, 3])
def test_accepting_many_is_accepting_each(tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS, threads=threads)
    grammar, tags = compiler.compile(params(choice=["ab", "b"])), ThinkTags.of(tokenizer)
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    free = ReasoningGate(tags, [], None, None, VOCAB, EOS)
    sampled: list[tuple[Constraint, int]] = [(grammar.start(), a), (free, a), (grammar.start(), b)]
    sampled.append((ReasoningGate(tags, tokenizer.encode("</think>"), grammar.start(), None, VOCAB, EOS), b))
    ended = grammar.start()
    assert ended.accept(b)
    sampled.append((ended, EOS[0]))
    assert compiler.accept_all(sampled) == [True] * 5
    assert [state.is_stopped for state, _ in sampled] == [False, False, True, True, True]
    assert ended.is_finished
    fox = compiler.compile(params(choice=["fox"])).start()
    assert compiler.accept_all([(sampled[0][0], b), (fox, b)]) == [True, False]


def test_masks_of_a_wrong_shape_are_refused(compiler: GrammarCompiler) -> None:
    states = [compiler.compile(params(regex="a")).start()] * 2
    words = compiler.mask_words
    for wrong in (
        np.zeros((1, words), np.int32),
        np.zeros((2, words + 1), np.int32),
        np.zeros((2, words), np.int64),
        np.zeros((4, words), np.int32)[::2],
        np.zeros(words, np.int32),
    ):
        with pytest.raises(ValueError, match="masks"):
            compiler.fill_masks(states, wrong)


def test_a_state_is_independent_of_the_others(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    grammar = compiler.compile(params(choice=["fox", "fog"]))
    first, second = grammar.start(), grammar.start()
    assert all(map(first.accept, tokenizer.encode("fox")))
    assert first.is_complete and not second.is_complete and second.forced_tokens() == grammar.start().forced_tokens()


@pytest.mark.parametrize(
    "text", ["é", "日本", "🙂", '"', "\\", "/", "\n\t", "\x01", "a b", "'", "|", "start: a", "//", "\u2028", "e\u0301"]
)
def test_any_text_can_be_a_choice(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    state = compiler.compile(params(choice=[text])).start()
    assert tokenizer.decode(state.forced_tokens()) == text
    grammar = compiler.compile(params(choice=[text, text + text]))
    assert accepts(grammar, tokenizer, text) and accepts(grammar, tokenizer, text * 2)
    assert not accepts(grammar, tokenizer, text * 3)


def test_the_text_of_a_special_token_is_refused(compiler: GrammarCompiler) -> None:
    for fields in ({"choice": ["ok", "x<|im_end|>"]}, {"json": {"const": "<|im_start|>"}}, {"regex": r"a<\|im_end\|>"}):
        assert "special token '<|im_" in (compiler.problem(params(**fields)) or "")


@pytest.mark.parametrize(
    ("key", "other"), [("x", '"\\u0078"'), ("é", '"\\u00e9"'), ("a/b", '"a\\/b"'), ('q"', '"q\\u0022"')]
)
def test_no_name_has_a_second_spelling(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, key: str, other: str
) -> None:
    """An additional property that reads as a declared one would take its place."""
    schema = {"type": "object", "properties": {key: {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    grammar = compiler.compile(params(json=schema))
    assert accepts(grammar, tokenizer, json.dumps({key: 1, "y": "z"}, ensure_ascii=False))
    assert not accepts(grammar, tokenizer, f'{{{other}: "z"}}')


def test_whitespace(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    schema = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}}
    default = compiler.compile(params(json=schema))
    free = compiler.compile(params(json=schema, disable_any_whitespace=False))
    value = [{"a": None}, {"a": None}]
    assert accepts(default, tokenizer, json.dumps(value))
    assert not accepts(default, tokenizer, json.dumps(value, separators=(",", ":")))
    assert not accepts(default, tokenizer, json.dumps(value, indent=2))
    for indent in (None, 0, 2, 8):
        assert accepts(free, tokenizer, json.dumps(value, indent=indent))
    assert accepts(free, tokenizer, '[{"a":null}]') and accepts(free, tokenizer, "[" + " " * 40 + "]")
    assert not accepts(free, tokenizer, "[" + " " * 41 + "]")
    assert not accepts(free, tokenizer, "[] ") and not accepts(free, tokenizer, " []")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "has none; it must have exactly one of json, regex"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice; it must"),
        ({"regex": ""}, "regex='': must be a string"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"a\b"}, "not supported"),
        ({"regex": r"a[^\s\S]"}, "no finite text"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"choice": []}, "must be a list of strings that is not empty"),
        ({"choice": "abc"}, "must be a list of strings"),
        ({"choice": ["a", ""]}, "choice holds ''"),
        ({"choice": ["a", 1]}, "choice holds 1"),
        ({"choice": ["a", "b", "a"]}, "choice holds 'a' twice"),
        ({"choice": ["\ud800"]}, "lone surrogate"),
        ({"json_object": 1}, "json_object=1"),
        ({"json": 5}, "must be a JSON schema"),
        ({"json": "{"}, "is no JSON"),
        ({"json": "[]"}, "must be a JSON schema, which is an object"),
        ({"json": {"const": float("nan")}}, "is no JSON"),
        ({"json": {"x": object()}}, "is no JSON"),
        ({"json": {"const": "\ud800"}}, "lone surrogate"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"json": {"x-guidance": {"lenient": True}, "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"if": {}, "then": {}}}, '"if", "then"'),
        ({"json": {"dependencies": {}}}, "dependencies"),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "oneOf"),
        ({"json": {"type": "string", "format": "iri"}}, "Unknown format: iri"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"json": {"$ref": "#/$defs/x"}}, "'/$defs/x' does not exist"),
        ({"json": {"$ref": "http://127.0.0.1/x"}}, "not present in a registry"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
        ({"json": {"typ": "string"}}, "unknown keyword 'typ' at $: did you mean 'type'?"),
        ({"json": {"properties": {"a": {"minlength": 1}}}}, "'minlength' at $.properties.a: did you mean 'minLength'?"),
        ({"json": {"anyOf": [{"$defs": {"b": {"require": []}}}]}}, "'require' at $.anyOf[0].$defs.b"),
        ({"json": {"items": {"minProperties": 1}}}, "minProperties=1 at $.items can only be kept"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        ({"grammar": 'a: "b"'}, "start"),
    ],
)
def test_refusals(compiler: GrammarCompiler, fields: dict[str, Any], reason: str) -> None:
    wanted = params(**fields)
    for problem in (compiler.problem(wanted), compiler.problem(wanted)):  # the second is from the cache
        assert problem is not None and "\n" not in problem and len(problem) < 400
        assert reason in problem
    if "finite" not in reason:  # that needs a tokenizer
        assert reason in (grammar_problem(wanted) or "")
    with pytest.raises(UserError):
        compiler.compile(wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"properties": {"typ": {"type": "null"}, "require": {}}, "enumerate": 1, "x-order": 2, "example": 3}},
        {"json": {"const": {"typ": 1}, "default": {"typ": 1}}},
        {"json": '{"type": "object", "properties": {"a": true, "b": {"type": "null"}}}'},
        {"json": {"type": "object", "minProperties": 1, "required": ["a"]}},
        {"json_object": True},
        {"json_object": True, "disable_any_whitespace": False},
        {"grammar": 'start: "a" start "b" | "c"'},
    ],
)
def test_these_are_fine(compiler: GrammarCompiler, fields: dict[str, Any]) -> None:
    assert compiler.problem(params(**fields)) is None
    assert grammar_problem(params(**fields)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
        {"json": {"type": "object", "properties": {"a": {"const": "\x01"}}, "required": ["a"]}},
        {"grammar": 'start: "a" start'},
    ],
)
def test_grammars_without_a_finite_text_are_refused(compiler: GrammarCompiler, fields: dict[str, Any]) -> None:
    assert "no finite text satisfies it" in (compiler.problem(params(**fields)) or "")


def test_an_empty_output_is_no_grammar(compiler: GrammarCompiler) -> None:
    assert "nothing but an empty output" in (compiler.problem(params(grammar='start: ""')) or "")


def test_a_dead_end_further_on_is_the_sequences_problem(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A control character cannot be written as JSON without the escapes that are not allowed."""
    schema = {"anyOf": [{"type": "boolean"}, {"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2}]}
    schema["anyOf"][1]["items"] = {"const": "\x01"}  # type: ignore[index]
    state = compiler.compile(params(json=schema)).start()
    assert all(map(state.accept, tokenizer.encode("[null, ")))
    assert set(allowed(state)) == set(EOS), "it can do nothing but end"
    assert state.problem and "\n" not in state.problem
    assert not state.is_complete and not state.is_stopped and state.forced_tokens() == []
    assert state.accept(EOS[0]) and state.is_finished and not state.is_complete


def test_lark_grammar(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    grammar = compiler.compile(params(grammar='start: sum\nsum: N | sum "+" N\nN: /[0-9]{1,3}/'))
    assert accepts(grammar, tokenizer, "1+22+333") and not accepts(grammar, tokenizer, "1+")
    for seed in range(20):
        text, finished = Walker(tokenizer, seed).walk(grammar.start())
        assert not finished or re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text)


# --- parameters, cache and parsed values ---------------------------------------------------------------------------------


def test_coerce() -> None:
    wanted = params(choice=["a", "b"])
    assert StructuredOutputsParams.coerce(wanted) is wanted
    row = {"choice": ["a", "b"], "json": None, "regex": None, "disable_any_whitespace": None}
    assert StructuredOutputsParams.coerce(row) == wanted
    with pytest.raises(UserError, match="unknown key 'choices' in structured_outputs: did you mean 'choice'"):
        StructuredOutputsParams.coerce({"choices": ["a"]})
    with pytest.raises(UserError, match=r"structured_outputs=\['a'\]: must be a mapping"):
        StructuredOutputsParams.coerce(["a"])


def test_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    turned = {"type": "object", "properties": {"a": {}, "b": {}}}
    assert params(json=schema).key == params(json=json.dumps(schema, indent=3)).key
    different = [
        params(json=schema),
        params(json=turned),  # properties are generated in their order
        params(json=schema, disable_any_whitespace=False),
        params(regex="a"),
        params(grammar="a"),
        params(choice=["a"]),
        params(choice=("a", "b")),
        params(json_object=True),
    ]
    assert len({one.key for one in different}) == len(different)
    assert params(choice=["a", "b"]).key == params(choice=("a", "b"), json_object=False).key
    copy = pickle.loads(pickle.dumps(different[0]))
    assert copy == different[0] and copy.key == different[0].key
    assert set(asdict(copy)) == {"json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace"}


def test_the_cache_keeps_the_last_used(tokenizer: PreTrainedTokenizerBase) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS, cache_size=3)
    first = compiler.compile(params(regex="a0"))
    for number in range(1, 10):
        compiler.compile(params(regex=f"a{number}"))
        assert compiler.problem(params(regex=f"(({number}")), "refusals are kept too"
        assert compiler.compile(params(regex="a0")) is first, "used last, so kept"
        assert len(compiler._cache) <= 3
    assert len(compiler._cache) == 3
    again = compiler.compile(params(regex="a1"))
    assert compiler.compile(params(regex="a1")) is again


def test_threads_compile_and_start_side_by_side(tokenizer: PreTrainedTokenizerBase) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS, cache_size=8)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            text = f"fox {rng.randrange(16)}"
            state = compiler.compile(params(choice=[text])).start()
            ids = []
            while forced := state.forced_tokens():
                ids += forced
                if not all(map(state.accept, forced)):
                    wrong.append(text)
                    break
            if tokenizer.decode(ids) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(compiler._cache) <= 8


def test_a_missing_llguidance_names_the_remedy(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match="pip install llguidance"):
        GrammarCompiler(tokenizer, VOCAB, EOS)
    with pytest.raises(UserError, match="pip install llguidance"):
        grammar_problem(params(regex="a"))


CUT = "the output was cut by max_tokens before it was complete"
SCHEMA = {"json": {"type": "object"}}


@pytest.mark.parametrize(
    ("fields", "text", "reason", "complete", "value", "problem"),
    [
        (SCHEMA, '{"a": 1, "b": [1, "x y"]}', "stop", True, '{"a":1,"b":[1,"x y"]}', None),
        (SCHEMA, ' {\n"a" :\t1.50 }\n', "stop", None, '{"a":1.50}', None),
        (SCHEMA, '{"b": 12345678901234567890.10, "a": -0}', "stop", True, '{"b":12345678901234567890.10,"a":-0}', None),
        (SCHEMA, '{"a\\u00e9 \\" \\n": "\\/"}', "stop", True, '{"aé \\" \\n":"/"}', None),
        (SCHEMA, '{"a": "\\ud800"}', "stop", True, '{"a":"\\ud800"}', None),
        (SCHEMA, '{"a": ' + "9" * 5000 + "}", "stop", True, '{"a":' + "9" * 5000 + "}", None),
        (SCHEMA, '{"a": 1', "length", None, None, CUT),
        (SCHEMA, '{"a": 1', "stop", None, None, "the output is no JSON: "),
        (SCHEMA, '{"a": NaN}', "stop", None, None, "the output is no JSON: NaN is not"),
        (SCHEMA, '{"a": 1e999}', "stop", True, None, "the output is no JSON: '1e999' is too large"),
        (SCHEMA, '{"a": 1}', "length", True, '{"a":1}', None),
        (SCHEMA, "12", "length", False, None, CUT),
        (SCHEMA, "12", "stop", False, None, "the output ended before it was complete"),
        (SCHEMA, "", "error", None, None, "the request has no output"),
        ({"json_object": True}, "[1]", "stop", None, None, "the output is no JSON object"),
        ({"json_object": True}, "{}", "stop", None, "{}", None),
        ({"choice": ["a", "ab"]}, "ab", "stop", True, "ab", None),
        ({"choice": ["a", "ab"]}, " ab\n", "stop", None, "ab", None),
        ({"choice": [" a", "b"]}, " a", "stop", None, " a", None),
        ({"choice": ["abc"]}, "ab", "length", False, None, CUT),
        ({"choice": ["abc"]}, "ab", "length", None, None, CUT),
        ({"choice": ["abc"]}, "ab", "stop", None, None, "the output 'ab' is none of the choices"),
        ({"regex": "a+ "}, "aa ", "stop", True, "aa ", None),
        ({"regex": "a+b"}, "aa", "length", None, None, CUT),
        ({"regex": "a+b"}, "aa", "stop", False, None, "the output ended before it was complete"),
        ({"regex": r"\p{L}+"}, "éa", "stop", None, "éa", None),
        ({"grammar": 'start: "a"'}, "a", "stop", True, "a", None),
        ({"grammar": 'start: "ab"'}, "a", "length", False, None, CUT),
    ],
)
def test_parsed_value(
    fields: dict[str, Any], text: str, reason: Any, complete: bool | None, value: str | None, problem: str | None
) -> None:
    got, why = parsed_value(params(**fields), text, reason, complete)
    assert got == value
    assert (why is None) == (problem is None)
    assert why is None or why.startswith(problem or "")
