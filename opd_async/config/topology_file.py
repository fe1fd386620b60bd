"""Read and write topology files.

    YAML -> data with lines -> --set overrides -> schema -> Topology

Everything that is wrong with a file is said at once, one line for each problem. Relative paths inside a topology are
relative to the current working directory of the command, not to the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from opd_async.config.schema_text import dotted, expected, found, keys_at, place_of, schema_at, unknown_key
from opd_async.config.section import FORMS
from opd_async.config.topology import Topology
from opd_async.config.yaml_source import Location, YamlDocument, parse_yaml
from opd_async.errors import InputError

_OVERRIDE = 0
"""Stands for a line number where the value came from `--set`."""
Problem = tuple[int | None, str]
"""Line (None: not known) and text."""


@dataclass(frozen=True, slots=True)
class TopologySource:
    """A topology as it was written: data with lines, what the schema says of it, and what can be checked further."""

    name: str
    """The file, or what stands for one in messages."""
    document: YamlDocument
    problems: tuple[Problem, ...] = ()
    """What the schema finds, with lines."""
    broken: frozenset[str] = frozenset()
    """Dotted keys that the problems are about."""
    topology: Topology | None = None
    """With placeholders or defaults for what is broken; None where nothing sensible is left."""

    def line_of(self, key: str) -> int | None:
        """The line of a dotted key, or of the nearest section around it; 0 for what `--set` gave, None if not known."""
        path: Location = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        return line_at(self.document, path)


def read_topology(path: Path, overrides: Sequence[str] = ()) -> TopologySource:
    """Read a topology file, apply `a.b=value` overrides (values are YAML; `a.0.b` indexes a list), check the schema.

    Raises `InputError` where there is no such file, or it is not YAML; what the schema finds is in the result.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such topology file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    document = parse_yaml(text, str(path))
    if document.data is None:
        document.data = {}
    return check_schema(str(path), document, overrides)


def check_schema(name: str, document: YamlDocument, overrides: Sequence[str] = ()) -> TopologySource:
    """Apply overrides to a document and check it against the schema."""
    problems: list[Problem] = [
        (document.lines.get(where), f"{dotted(where)}: {problem}") for where, problem in document.problems
    ]
    for override in overrides:
        problem = _apply(document, override)
        if problem:
            problems.append((_OVERRIDE, f"{override}: {problem}"))
    broken = {dotted(where) for where, _ in document.problems}
    topology, details = _validated(document.data)
    problems += [_explain(document, detail) for detail in details]
    broken |= {dotted(detail["loc"]) for detail in details}
    if details:
        topology = _mended(document.data, details)
    return TopologySource(name, document, tuple(problems), frozenset(broken), topology)


def load_topology(path: Path, overrides: Sequence[str] = ()) -> Topology:
    """Read a topology file, apply `a.b=value` overrides (values are YAML; `a.0.b` indexes a list), check the schema.

    Relative paths in it stay relative to the current working directory. Raises `InputError` that lists every unknown,
    missing, repeated or wrong key with its line, or says where the file is not YAML.
    """
    source = read_topology(path, overrides)
    if source.problems or source.topology is None:
        raise InputError(list_problems(source.name, source.problems))
    return source.topology


def build(target: Topology, sections: Mapping[str, Any]) -> None:
    """Make `target` a topology of these sections, given as models or as the plain data of a file.

    Raises `InputError` with the messages that a file would get.
    """
    text = json.dumps(sections, default=_plain)
    try:
        Topology.__pydantic_validator__.validate_json(text, strict=True, self_instance=target)
    except ValidationError:
        source = check_schema("Topology", YamlDocument(json.loads(text)))
        raise InputError(list_problems(source.name, source.problems)) from None


def refuse_section(section: type[BaseModel], error: ValidationError) -> None:
    """Raise `InputError` for a section built in code, each problem under its key in a topology.

    Returns where `section` is not a topology's: then the values are this program's own.
    """
    place = place_of(section.__name__)
    if place is not None:
        details = _leaves(error)
        moved = [ErrorDetails({**detail, "loc": (*place, *detail["loc"])}) for detail in details]
        raise InputError(
            list_problems(section.__name__, [_explain(YamlDocument({}), detail) for detail in moved])
        ) from None


def as_overrides(values: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """`{"schedule.steps": 20}` as `schedule.steps=20`; text stays what it is."""
    if not isinstance(values, Mapping):
        return list(values)
    return [f"{key}={json.dumps(value, default=_plain)}" for key, value in values.items()]


def _plain(value: Any) -> Any:
    """A value as a file would have it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, PurePath):
        return str(value)
    raise InputError(f"Topology: {value!r} is {type(value).__name__}, which no topology can hold; write plain data")


def _validated(data: Any) -> tuple[Topology | None, list[ErrorDetails]]:
    """The topology, or what is wrong with the data."""
    try:
        # Strict JSON mode: lists become tuples and text becomes paths, but no value changes its type.
        return Topology.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        return None, _leaves(error)


def _leaves(error: ValidationError) -> list[ErrorDetails]:
    """What is wrong; a list with a wrong item is also reported as too short, and the item says it better."""
    details = error.errors(include_url=False)
    for detail in details:
        detail["loc"] = tuple(part for part in detail["loc"] if part not in FORMS)
    holders = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [detail for detail in details if detail["loc"] not in holders]


_STAND_INS: dict[str, Any] = {
    "name": "unnamed",
    "path": "missing",
    "steps": 1,
    "schedule": {"steps": 1},
    "student": {"path": "missing"},
    "train": {"path": "missing"},
    "models": {"student": {"path": "missing"}},
    "data": {"train": {"path": "missing"}},
}
"""What stands in for a required key while the rest of a broken topology is checked."""
_ROUNDS = 8


def _mended(data: Any, details: list[ErrorDetails]) -> Topology | None:
    """The topology without its broken keys; None where that is no topology either."""
    data = json.loads(json.dumps(data))
    for _ in range(_ROUNDS):
        for detail in details:
            _mend(data, detail["loc"])
        topology, details = _validated(data)
        if topology is not None:
            return topology
    return None


def _mend(data: Any, path: Location) -> None:
    """Take a broken key out, or put a stand-in where there must be one. A list goes as a whole."""
    keys = list(path)
    numbers = [place for place, part in enumerate(keys) if isinstance(part, int)]
    keys = keys[: numbers[0]] if numbers else keys
    if not keys:
        return
    for part in keys[:-1]:
        if not isinstance(data, dict) or part not in data:
            return
        data = data[part]
    if isinstance(data, dict):
        data.pop(keys[-1], None)
        if (stand_in := _STAND_INS.get(str(keys[-1]))) is not None and str(keys[-1]) in keys_at(tuple(keys[:-1])):
            data[keys[-1]] = stand_in


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
    line = line_at(document, path)
    if detail["type"] == "extra_forbidden":
        text = unknown_key(path)
    elif detail["type"] == "missing":
        text = f"missing; write {expected(path)}"
    elif detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
    else:
        text = f"found {found(detail['input'])}; write {expected(path)}"
    return line, f"{dotted(path)}: {text}"


def line_at(document: YamlDocument, path: Location) -> int | None:
    """The line of the longest part of `path` that the document has; None where it has none of it."""
    return next((document.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in document.lines), None)


def list_problems(name: str, problems: Sequence[Problem]) -> str:
    """Every problem of a topology on a line of its own, by line; those that say the same of several keys are one."""

    def prefix(line: int | None) -> str:
        if line == _OVERRIDE:
            return "--set: "
        return f"line {line}: " if line else ""

    once: dict[str, list[Problem]] = {}
    for line, text in sorted(problems, key=lambda problem: problem[0] or 0):
        once.setdefault(_what(text), []).append((line, text))
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return "\n".join([f"{name}: {count}", *(f"  {prefix(found[0][0])}{_together(found)}" for found in once.values())])


def _what(text: str) -> str:
    """What a problem says, without the items of lists that it says it of."""
    key, colon, rest = text.partition(": ")
    return re.sub(r"\.\d+(?=\.|$)", ".*", key) + colon + rest


def _together(same: list[Problem]) -> str:
    """One text for problems that say the same, with their count."""
    text = same[0][1]
    if len(same) == 1:
        return text
    key, _, rest = text.partition(": ")
    return f"{key} and {len(same) - 1} more like it: {rest}"
