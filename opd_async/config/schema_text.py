"""What the topology's schema says about a path, in words for a person.

Works on the JSON schema that pydantic derives from `Topology`, so that no wording repeats a bound of the schema.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from opd_async.config.topology import Topology
from opd_async.config.yaml_source import Location

Schema = dict[str, Any]


@cache
def _root() -> Schema:
    return Topology.model_json_schema()


def _resolve(schema: Schema) -> Schema:
    """Follow a reference, and drop the null of an optional value."""
    while True:
        if "$ref" in schema:
            schema = _root()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        elif "anyOf" in schema:
            schema = next(option for option in schema["anyOf"] if option.get("type") != "null")
        else:
            return schema


def schema_at(path: Location) -> Schema | None:
    """The schema of a path, None where the topology has no such path."""
    schema: Schema | None = _root()
    for part in path:
        resolved = _resolve(schema or {})
        if isinstance(part, int):
            items = (form["items"] for form in resolved.get("oneOf", [resolved]) if "items" in form)
            schema = next(items, None)
        else:
            schema = _value_at(resolved, part)
        if schema is None:
            return None
    return schema


def _value_at(schema: Schema, key: str) -> Schema | None:
    """The schema of a section's key; of a user's own name where the section is a mapping of names."""
    named: Schema | None = schema.get("properties", {}).get(key)
    fitting = (value for pattern, value in schema.get("patternProperties", {}).items() if re.search(pattern, key))
    free: Schema | None = {} if schema.get("additionalProperties") is True else None  # any name, any value
    return named or next(fitting, free)


def keys_at(path: Location) -> tuple[str, ...]:
    """The keys of the section at `path`; empty where there is none."""
    schema = schema_at(path)
    return tuple(_resolve(schema).get("properties", ())) if schema else ()


def place_of(section: str) -> Location | None:
    """Where the topology has the section of this class, its first place; None where it has none."""
    return next((path for path in _all_keys(()) if _resolve(schema_at(path) or {}).get("title") == section), None)


def dotted(path: Location) -> str:
    """`engines.student.devices.0`; `(the whole file)` for the root."""
    return ".".join(str(part) for part in path) or "(the whole file)"


def expected(path: Location) -> str:
    """What may stand at `path`: `a whole number of at least 1, or null`."""
    schema = schema_at(path)
    if schema is None:
        return "nothing"
    optional = any(option.get("type") == "null" for option in schema.get("anyOf", ()))
    words = [f", or {option['const']}" for option in schema.get("anyOf", ()) if "const" in option]
    return _describe(schema) + "".join(words) + (", or null" if optional else "")


def _describe(schema: Schema) -> str:
    schema = _resolve(schema)
    if "oneOf" in schema:
        return ", or ".join(_describe(form) for form in schema["oneOf"])
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    match schema.get("type"):
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "boolean":
            return "true or false"
        case "array":
            some = "a list of one or more, each " if schema.get("minItems") else "a list, each item "
            return some + _describe(schema["items"])
        case "object" if schema.get("additionalProperties") is True:
            return "a mapping of names to values"
        case "object" if "properties" not in schema:
            return "names, each with " + _describe(next(iter(schema.get("patternProperties", {"": {}}).values())))
        case "object":
            return "a section with the keys " + ", ".join(schema.get("properties", ()))
    if "examples" in schema:
        return "text such as " + " or ".join(schema["examples"])
    if schema.get("format") == "path":
        return "a path"
    return "text" + (f" that matches {schema['pattern']}" if "pattern" in schema else "")


def _bounds(schema: Schema) -> str:
    words = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    parts = [f"{word} {schema[key]:g}" for key, word in words if key in schema]
    return f", {' and '.join(parts)}" if parts else ""


def found(value: object) -> str:
    """A value as a person would write it in the file, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(path: Location) -> str:
    """Why the last part of `path` is refused, with the nearest key that exists."""
    parent, key = path[:-1], str(path[-1])
    siblings = keys_at(parent)
    close = difflib.get_close_matches(key, siblings, n=1)
    if close:
        return f"unknown key; did you mean {close[0]}?"
    elsewhere = [dotted(known) for known in _all_keys(()) if known[-1] == key]
    if elsewhere:
        return f"unknown key here; did you mean {' or '.join(elsewhere[:3])}?"
    return (
        f"unknown key; the keys here are {', '.join(siblings)}" if siblings else "unknown key; nothing goes below this"
    )


def _all_keys(path: Location) -> Iterator[Location]:
    for key in keys_at(path):
        yield (*path, key)
        yield from _all_keys((*path, key))
