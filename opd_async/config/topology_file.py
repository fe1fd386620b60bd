"""Read and write topology files.

    YAML -> data with lines -> --set overrides -> schema -> Topology

Everything that is wrong with a file is said at once, one line for each problem. Relative paths inside a topology are
relative to the current working directory of the command, not to the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from opd_async.config.schema_text import dotted, expected, found, schema_at, unknown_key
from opd_async.config.topology import Topology
from opd_async.config.yaml_source import Location, YamlDocument, parse_yaml
from opd_async.errors import InputError

_OVERRIDE = 0
"""Stands for a line number where the value came from `--set`."""
Problem = tuple[int | None, str]
"""Line (None: not known) and text."""


def load_topology(path: Path, overrides: Sequence[str] = ()) -> Topology:
    """Read a topology file, apply `a.b=value` overrides (values are YAML; `a.0.b` indexes a list), check the schema.

    Relative paths in it stay relative to the current working directory. Raises `InputError` that lists every unknown,
    missing, repeated or wrong key with its line, or says where the file is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such topology file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    document = parse_yaml(text, str(path))
    problems: list[Problem] = [
        (document.lines.get(where), f"{dotted(where)}: {problem}") for where, problem in document.problems
    ]
    if document.data is None:
        document.data = {}
    for override in overrides:
        problem = _apply(document, override)
        if problem:
            problems.append((_OVERRIDE, f"{override}: {problem}"))
    try:
        # Strict JSON mode: lists become tuples and text becomes paths, but no value changes its type.
        topology = Topology.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A list with a wrong item is also reported as too short: the item says it better.
        holders = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
        problems.extend(_explain(document, detail) for detail in details if detail["loc"] not in holders)
    else:
        if not problems:
            return topology
    raise InputError(_report(path, problems))


def dump_topology(topology: Topology) -> str:
    """The topology as YAML, every default written out; `load_topology` reads it back equal."""
    return yaml.dump(topology.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    # PyYAML would round through its own format; repr is the shortest text that reads back equal.
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Dumper.add_representer(float, _float)


def _apply(document: YamlDocument, override: str) -> str | None:
    """Set one override in the document; the problem in words if it cannot be done."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return "write --set path.to.key=value"
    path: Location = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
    for depth in range(1, len(path) + 1):
        if schema_at(path[:depth]) is None:
            return f"{dotted(path[:depth])}: {_no_such_path(path[:depth])}"
    try:
        value = parse_yaml(text, "value").data
    except InputError as error:
        return str(error)
    return _store(document, path, value)


def _no_such_path(path: Location) -> str:
    if isinstance(path[-1], int):
        return f"{dotted(path[:-1])} is not a list"
    return unknown_key(path)


def _store(document: YamlDocument, path: Location, value: Any) -> str | None:
    """Put `value` at `path`, making sections on the way; the problem in words if a list is too short or in the way."""
    if not isinstance(document.data, dict):
        return "the file is not a mapping of sections"
    holder: Any = document.data
    for depth, part in enumerate(path):
        here = dotted(path[:depth])
        if isinstance(part, int) and not (isinstance(holder, list) and part < len(holder)):
            length = len(holder) if isinstance(holder, list) else 0
            return f"{here} has {length} items in the file; set the whole list instead: {here}=[...]"
        if isinstance(part, str) and not isinstance(holder, dict):
            return f"{here} is {found(holder)} in the file, not a section"
        if depth == len(path) - 1:
            break
        following = holder[part] if isinstance(part, int) else holder.get(part)
        if following is None and isinstance(path[depth + 1], str):
            following = holder[part] = {}
        holder = following
    holder[path[-1]] = value
    for known in [known for known in document.lines if known[: len(path)] == path]:
        document.lines[known] = _OVERRIDE
    document.lines[path] = _OVERRIDE
    return None


def _explain(document: YamlDocument, detail: ErrorDetails) -> Problem:
    """One line for one violation of the schema."""
    path = detail["loc"]
    line = next((document.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in document.lines), None)
    if detail["type"] == "extra_forbidden":
        text = unknown_key(path)
    elif detail["type"] == "missing":
        text = f"missing; write {expected(path)}"
    else:
        text = f"found {found(detail['input'])}; write {expected(path)}"
    return line, f"{dotted(path)}: {text}"


def _report(path: Path, problems: list[Problem]) -> str:
    def prefix(line: int | None) -> str:
        if line == _OVERRIDE:
            return "--set: "
        return f"line {line}: " if line else ""

    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    lines = [f"  {prefix(line)}{text}" for line, text in sorted(problems, key=lambda problem: problem[0] or 0)]
    return "\n".join([f"{path}: {count}", *lines])
