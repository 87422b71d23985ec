"""Mistakes in a JSON schema that no compiler reports, because the standard says that unknown keywords are read over."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

# Keywords whose value is a schema, a list of schemas, or schemas by name.
_ONE = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties"),
    *("propertyNames", "not", "if", "then", "else", "contentSchema"),
)
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_KEYWORDS = {
    *(*_ONE, *_SEVERAL, *_BY_NAME),
    *("$schema", "$id", "id", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
    *("$vocabulary", "$comment", "type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum"),
    *("exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxContains"),
    *("minContains", "maxProperties", "minProperties", "required", "dependentRequired", "dependencies", "format"),
    *("contentEncoding", "contentMediaType", "title", "description", "default", "deprecated", "readOnly", "writeOnly"),
    *("examples", "example", "nullable", "discriminator", "externalDocs", "xml"),  # the last five: OpenAPI
}


def schema_mistake(schema: Mapping[str, Any]) -> str | None:
    """The first mistake in one line with its place, or None: a misspelt keyword, or a count that cannot be kept.

    A key that is near to no keyword is taken for an annotation, as the standard has it.
    """
    for path, part in _parts(schema):
        for name in part:
            near = [] if name in _KEYWORDS else difflib.get_close_matches(str(name), _KEYWORDS, n=1, cutoff=0.8)
            if near:
                return f"unknown keyword {name!r} at {path}: did you mean {near[0]!r}?"
        fewest, required = part.get("minProperties"), part.get("required")
        # Further properties may be generated twice under one name, of which a reader keeps one.
        certain = len(required) if isinstance(required, list) else 0
        if isinstance(fewest, int) and fewest > certain and part.get("additionalProperties") is not False:
            return (
                f"minProperties={fewest} at {path} can only be kept with additionalProperties=false, "
                f"or where so many are required"
            )
    return None


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schema and all schemas in it, with their places. Values of `enum`, `const` and the like are none."""
    stack: list[tuple[str, Any]] = [("$", schema)]
    while stack:
        path, part = stack.pop()
        if not isinstance(part, Mapping):  # true and false are schemas, too
            continue
        yield path, part
        stack += [(f"{path}.{key}", part[key]) for key in _ONE if key in part]
        for key in _SEVERAL:
            if isinstance(part.get(key), list):
                stack += [(f"{path}.{key}[{i}]", one) for i, one in enumerate(part[key])]
        for key in _BY_NAME:
            if isinstance(part.get(key), Mapping):
                stack += [(f"{path}.{key}.{name}", one) for name, one in part[key].items()]
