"""What a constrained output must look like: vLLM's `StructuredOutputsParams`, one of `json`, `regex`, `choice`, `grammar` and
`json_object`. Plain data, checked like `SamplingParams` before a request is added; it imports no grammar library, so that it
can be read and refused on a machine that has none.

JSON is written as `json.dumps` writes it, on one line with one space after each colon and comma: `{"a": 1, "b": [1, 2]}`.
vLLM lets the model put any whitespace between any two tokens of JSON; small models then write newlines until `max_tokens`,
and no piece of the text is ever forced. `disable_any_whitespace=False` asks for vLLM's freedom, up to 40 whitespace
characters at a place.
"""

from __future__ import annotations

import json as jsonlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from nanovllm.errors import UserError
from nanovllm.outputs import FinishReason
from nanovllm.utils.json_schema import schema_mistake
from nanovllm.utils.validation import suggest

KINDS = ("json", "regex", "choice", "grammar", "json_object")

# What may stand in a compact JSON text: strings as they are, everything else without whitespace.
_JSON_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s"]+')


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form an output must have; exactly one of the first five is set.

    Attributes:
        json: a JSON schema, as a dict or as JSON text.
        regex: a regular expression (Rust's syntax: no look-around, no back-references) that the whole output matches.
        choice: strings, of which the output is one.
        grammar: a context-free grammar as Lark text, with a rule `start`.
        json_object: True: any JSON object.
        disable_any_whitespace: JSON has one space after each colon and comma and no other whitespace between its tokens;
            False lets the model choose whitespace, at most 40 characters at a place. (vLLM has the same name, and False
            for its default.)
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = True

    @classmethod
    def coerce(cls, value: object) -> StructuredOutputsParams:
        """`value` itself, or made from a mapping: a dict in a program, a section of a job file, a struct of a row.

        Keys that are None count as not given: a struct column has every key in every row.

        Raises:
            UserError: not a mapping, or an unknown key, with the name that was probably meant.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"structured_outputs={value!r}: must be a mapping with one of {', '.join(KINDS)}")
        known = [one.name for one in fields(cls)]
        for name in value:
            if name not in known:
                raise UserError(f"unknown key {str(name)!r} in structured_outputs: {suggest(str(name), known)}")
        return cls(**{name: given for name, given in value.items() if given is not None})

    @property
    def kind(self) -> str:
        """Which of the five is set. Only where `problem()` is None."""
        return next(name for name in KINDS if self._given(name))

    @property
    def schema(self) -> str | None:
        """The JSON schema as compact text for `json` and `json_object`, else None. Only where `problem()` is None.

        The order of keys is kept: properties are generated in it.
        """
        if self.kind == "json_object":
            return '{"type":"object"}'
        if self.kind == "json":
            return _schema_text(self.json)
        return None

    # Kept, like the problem: a schema takes a tenth of a millisecond to read, and rows that share it need not.
    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for parameters that allow the same texts, and hashable. Only where `problem()` is None."""
        kind, schema = self.kind, self.schema
        if schema is not None:
            return ("json", schema, self.disable_any_whitespace)
        value = getattr(self, kind)
        return (kind, value if isinstance(value, str) else tuple(value))

    def problem(self) -> str | None:
        """What is wrong in one line, or None. A schema, regex or grammar is compiled by `GrammarCompiler.problem` only."""
        return self._problem

    @cached_property
    def _problem(self) -> str | None:
        given = [name for name in KINDS if self._given(name)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            return f"structured_outputs has {found}; it must have exactly one of {', '.join(KINDS)}"
        if not isinstance(self.disable_any_whitespace, bool):
            return f"disable_any_whitespace={self.disable_any_whitespace!r}: must be true or false"
        kind = given[0]
        if kind == "json":
            return self._json_problem()
        if kind == "choice":
            return self._choice_problem()
        if kind == "json_object":
            return None if self.json_object is True else f"json_object={self.json_object!r}: must be true or left out"
        text = getattr(self, kind)
        if not isinstance(text, str) or not text:
            return f"{kind}={text!r}: must be a string that is not empty"
        return _encoding_problem(kind, text)

    def _given(self, name: str) -> bool:
        # `json_object: false` says the same as leaving it out.
        value = getattr(self, name)
        return value is not None and not (name == "json_object" and value is False)

    def _json_problem(self) -> str | None:
        if not isinstance(self.json, (Mapping, str)):
            return f"json={_short(self.json)}: must be a JSON schema, as a mapping or as JSON text"
        try:
            text = _schema_text(self.json)
        except (ValueError, TypeError, RecursionError) as error:
            return f"json={_short(self.json)}: is no JSON: {error}"
        if not text.startswith("{"):
            return f"json={_short(self.json)}: must be a JSON schema, which is an object"
        mistake = schema_mistake(jsonlib.loads(text))
        return f"json: {mistake}" if mistake else _encoding_problem("json", text)

    def _choice_problem(self) -> str | None:
        choice = self.choice
        if isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
            return f"choice={_short(choice)}: must be a list of strings that is not empty"
        for text in choice:
            if not isinstance(text, str) or not text:
                return f"choice holds {_short(text)}; every choice must be a string that is not empty"
            problem = _encoding_problem("choice", text)
            if problem:
                return problem
        if len(set(choice)) < len(choice):
            twice = next(text for at, text in enumerate(choice) if text in choice[:at])
            return f"choice holds {_short(twice)} twice"
        return None


def parsed_value(
    params: StructuredOutputsParams, text: str, finish_reason: FinishReason | None, complete: bool | None = None
) -> tuple[str | None, str | None]:
    """What the output says, for a `parsed` column, and what is wrong with it: one of the two is None.

    Args:
        params: with no `problem()`.
        text: the output without its reasoning and without the end-of-sequence token. Whitespace around it does not count,
            but for `regex` and `grammar`, where it may belong to the text.
        finish_reason: of the output.
        complete: whether the grammar may end after the text (`GrammarState.is_complete`); None where that is not known:
            JSON must then be readable, and a text of `regex` or `grammar` that was cut counts as incomplete.

    Returns:
        `(value, None)`: compact JSON text for `json` and `json_object` (keys in the order of the output, numbers digit by
        digit as generated, strings with as few escapes as can be), else the text itself. `(None, problem)`: cut by
        `max_tokens`, ended by a stop string in its middle, or not valid.
    """
    kind = params.kind
    cut = "the output was cut by max_tokens before it was complete"
    if finish_reason == "error":
        return None, "the request has no output"
    if complete is False:
        return None, cut if finish_reason == "length" else "the output ended before it was complete"
    if kind in ("json", "json_object"):
        try:
            value = _compact_json(text)
        except (ValueError, RecursionError) as error:
            return None, cut if finish_reason == "length" else f"the output is no JSON: {error}"
        if kind == "json_object" and not value.startswith("{"):
            return None, "the output is no JSON object"
        return value, None
    if kind == "choice":
        for choice in params.choice or ():
            if choice in (text, text.strip()):
                return choice, None
        return None, cut if finish_reason == "length" else f"the output {_short(text)} is none of the choices"
    if complete is None and finish_reason == "length":
        return None, cut
    return text, None


def _schema_text(schema: Mapping[str, Any] | str | None) -> str:
    value = jsonlib.loads(schema) if isinstance(schema, str) else schema
    return jsonlib.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _encoding_problem(name: str, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{name} holds a lone surrogate, which is no text: {_short(text)}"
    return None


def _compact_json(text: str) -> str:
    """JSON text without whitespace between its tokens; numbers are not read, for no type of Python holds all of them."""
    jsonlib.loads(text, parse_int=str, parse_float=_finite, parse_constant=_no_constant)
    return "".join(_compact_string(piece) if piece[0] == '"' else piece for piece in _JSON_PIECE.findall(text))


def _compact_string(literal: str) -> str:
    compact = jsonlib.dumps(jsonlib.loads(literal), ensure_ascii=False)
    # Half a surrogate pair can be escaped in JSON, and stored nowhere.
    return compact if _encoding_problem("", compact) is None else literal


def _finite(digits: str) -> None:
    # 1e999 is JSON, and reads as infinity, which is not.
    if math.isinf(float(digits)):
        raise ValueError(f"{_short(digits)} is too large for a number")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
