"""`prompt.template`: Jinja over the columns of a row. Made by `prompts`, on the driver to be checked and on actors to be rendered.

Sandboxed (no access to Python's insides), strict (a name that is no column is refused before anything runs), and a null that would be
written out is the row's error: `{{ title or "untitled" }}` says what to write instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm import UserError
from nanovllm.utils.validation import suggest
from pipelines.row_values import RowError


class RowTemplate:
    """A template of prompts.

    Args:
        text: Jinja.
        columns: names of the input's columns.

    Attributes:
        columns: those that the template reads, in the order of the input.

    Raises:
        UserError: it is not Jinja, names no column at all, or something that is none.
    """

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, finalize=_no_null)
        environment.filters["tojson"] = _to_json
        for name in columns:  # a column may be named `range`
            environment.globals.pop(name, None)
        try:
            tree = environment.parse(text)
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:  # an unknown filter is one too
            raise UserError(f"prompt.template is not Jinja: {error.message} (line {error.lineno})") from None
        if list(meta.find_referenced_templates(tree)):
            raise UserError("prompt.template includes another template; write its text into this one")
        names = meta.find_undeclared_variables(tree)
        unknown = sorted(names - set(columns))
        if unknown:
            raise UserError(f"prompt.template uses {unknown[0]!r}, which is no column: {suggest(unknown[0], columns)}")
        self.columns = [name for name in columns if name in names]
        if not self.columns:
            raise UserError(
                f"prompt.template uses no column, so all prompts would be equal; write {{{{ {columns[0]} }}}} for a column's value"
            )

    def render(self, row: Mapping[str, object]) -> str:
        """The text for a row.

        Raises:
            RowError: a null would be written out, or the template fails on the row's values.
        """
        values = {name: row[name] for name in self.columns}
        for name, value in values.items():
            if isinstance(value, bytes):
                raise RowError(f"column {name!r} is not valid UTF-8")
        try:
            return self._template.render(values)
        except _NullError:
            nulls = ", ".join(repr(name) for name, value in values.items() if value is None) or "none of the columns"
            raise RowError(f"prompt.template would write a null (null here: {nulls})") from None
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(f"prompt.template fails on this row: {reason}") from None


class _NullError(Exception):
    """A null was about to be written out."""


def _no_null(value: Any) -> Any:
    if value is None:
        raise _NullError
    return value


def _to_json(value: Any, indent: int | None = None) -> str:
    """As in chat templates: Jinja's own filter writes for HTML, with `<` as an escape."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)
