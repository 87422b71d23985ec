"""Writes `pipelines/REFERENCE.md`, every setting of a job with its default, from the models that check them.

python -m pipelines.reference
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from nanovllm import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams
from pipelines.job import JobConfig

REFERENCE = Path(__file__).parent / "REFERENCE.md"
HEAD = """# Every setting of a job

Written by `python -m pipelines.reference`; do not edit. Settings stand in a job file (`--config`), or on the command line as
`section.key=value`. `--print-config` shows them all as a job would use them.
"""
# Fields that a job sets in another place.
ELSEWHERE = {("engine", "model"), ("sampling", "seed")}


class Setting(NamedTuple):
    """One row of the reference."""

    name: str
    kind: str
    default: str
    description: str


class Section(NamedTuple):
    """One table of the reference, and what stands above it."""

    name: str
    about: str
    settings: list[Setting]


def sections() -> list[Section]:
    """All sections of a job: the top level first, those nested in a field of another after it."""
    return list(_of_model("", JobConfig))


def markdown() -> str:
    """The text of `REFERENCE.md`."""
    parts = [HEAD]
    for section in sections():
        parts.append(f"## {f'`{section.name}`' if section.name else 'Top level'}\n\n{section.about}\n")
        rows = [
            (f"`{s.name}`", _cell(s.kind), s.default and f"`{s.default}`", _cell(s.description))
            for s in section.settings
        ]
        table = [("setting", "type", "default", ""), ("---",) * 4, *rows]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")
    return "\n".join(parts)


def _of_model(path: str, model: type[BaseModel]) -> Iterator[Section]:
    settings, nested = [], []
    for name, field in model.model_fields.items():
        if (path, name) in ELSEWHERE:
            continue
        inner = _nested(field.annotation)
        if inner is not None:
            nested.append((f"{path}.{name}" if path else name, inner))
            continue
        default = field.get_default(call_default_factory=True)
        shown = "" if default is PydanticUndefined else _value(default)
        kind = ", ".join([_kind(field.annotation), *_bounds(field.metadata)])
        settings.append(Setting(_join(path, field.alias or name), kind, shown, field.description or ""))
    if settings or not path:
        yield Section(path, _about(model), settings)
    for inner_path, inner in nested:
        yield from _of_dataclass(inner_path, inner) if dataclasses.is_dataclass(inner) else _of_model(inner_path, inner)


def _of_dataclass(path: str, kind: type) -> Iterator[Section]:
    described = attributes(kind)
    hints = typing.get_type_hints(kind)
    settings = [
        Setting(_join(path, field.name), _kind(hints[field.name]), _value(field.default), described.get(field.name, ""))
        for field in dataclasses.fields(kind)
        if (path, field.name) not in ELSEWHERE
    ]
    yield Section(path, _about(kind), settings)
    if kind is SamplingParams:
        yield from _of_dataclass(f"{path}.structured_outputs", StructuredOutputsParams)


def attributes(kind: type) -> dict[str, str]:
    """What the `Attributes:` of a class's docstring say, by name; names before one colon share what follows it."""
    _, _, text = inspect.getdoc(kind).partition("Attributes:\n")  # type: ignore[union-attr]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + text.split("\n\n")[0]):
        names, colon, description = entry.partition(": ")
        if colon:
            found.update((name.strip(), _sentence(description)) for name in names.split(","))
    return found


def _nested(annotation: Any) -> type | None:
    """The model or dataclass that a section of settings is checked by; None for a setting."""
    is_class = isinstance(annotation, type)
    return annotation if is_class and (issubclass(annotation, BaseModel) or annotation is SamplingParams) else None


def _about(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].partition(". ")[0].replace("\n", " ").rstrip(".") + "."


def _bounds(metadata: Sequence[object]) -> Iterator[str]:
    """What a number must keep to, in words."""
    for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        for bound in metadata:
            if (value := getattr(bound, name, None)) is not None:
                yield f"{words} {'2^63' if value == 2**63 else value}"


def _kind(annotation: Any) -> str:
    """A type as a writer of YAML knows it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(each) for each in arguments if each is not types.NoneType))
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if annotation is tuple or origin is tuple:
        return f"[{', '.join(_kind(each) for each in arguments)}]"
    if origin in (list, Sequence):
        return f"list of {_kind(arguments[0])}s"
    if origin in (dict, Mapping) or annotation is StructuredOutputsParams:
        return "mapping"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", types.NoneType: "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if yaml.safe_load(value) == value else json.dumps(value)  # `off` is a boolean of YAML
    return str(value).lower() if isinstance(value, bool) else str(value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", ".)")) else ".")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


if __name__ == "__main__":
    REFERENCE.write_text(markdown(), encoding="utf-8")
    print(f"wrote {REFERENCE}")
