"""Turns pydantic's reports into one line for the user. Used by `EngineConfig` and by the job configuration of `pipelines`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nanovllm.errors import UserError

M = TypeVar("M", bound=BaseModel)


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or all known words where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _fields_at(model: type[BaseModel], path: tuple[str, ...]) -> set[str]:
    """Names allowed at `path` inside `model`, following nested models."""
    for part in path:
        field = model.model_fields.get(part)
        nested = getattr(field, "annotation", None)
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return set()
        model = nested
    return set(model.model_fields)


def parse(model: type[M], data: Mapping[str, Any], what: str) -> M:
    """Validate `data` as `model`.

    Raises:
        UserError: with one line about the first problem; an unknown key names the nearest known one. `what` is the
            thing being read, for example "engine option" or "job config".
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = tuple(str(part) for part in first["loc"])
        where = ".".join(path)
        if first["type"] == "extra_forbidden":
            hint = suggest(path[-1], _fields_at(model, path[:-1]))
            raise UserError(f"unknown {what} {where!r}: {hint}") from None
        if first["type"] == "missing":
            raise UserError(f"{what} {where!r} is required and was not given") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        prefix = f"{what} {where}={first['input']!r}: " if where else f"{what}: "
        raise UserError(prefix + message) from None
