"""YAML text to plain data that remembers where each key stands, with no surprises on the way.

YAML 1.2 scalars: `1e-6` is a number, `on`, `010` and `12:30` are not a boolean, an octal and a sexagesimal.
Only mappings, sequences, strings, numbers, booleans and null exist; a key written twice is reported.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from opd_async.errors import InputError

MAX_VALUES = 100_000
"""A topology has a few hundred; ten lines of aliases to aliases are enough for ten billion."""
Location = tuple[str | int, ...]
_CORE_TAGS = ("map", "seq", "str", "bool", "float", "null")


class _CoreLoader(yaml.SafeLoader):
    """The safe loader, cut down to the types of a topology."""


_tag = "tag:yaml.org,2002:{}".format
_CoreLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in {_tag(name) for name in _CORE_TAGS}
}
_CoreLoader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
):
    _CoreLoader.add_implicit_resolver(_tag(_name), re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node), 10)


_CoreLoader.add_constructor(_tag("int"), _construct_int)


@dataclass(slots=True)
class YamlDocument:
    """The data of one document; `lines` maps the path of a key or list item to its 1-based line."""

    data: Any
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[tuple[Location, str]] = field(default_factory=list)
    """Keys written twice: the path, and what is wrong."""
    values: int = 0
    """Values so far, each as often as aliases repeat it."""


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parse one YAML document.

    Raises `InputError` with `name`, line and column when the text is not YAML, or holds a type other than the above.
    """
    loader = None
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        document = YamlDocument(None)
        if node is not None:
            _record(node, (), document, frozenset(), name)
            document.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown position"
        raise InputError(f"{name}: {where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character U+{int(error.character):04X}"
        raise InputError(f"{name}: line {line}: {what} is not allowed in YAML; remove it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    return document


def _record(node: yaml.Node, path: Location, document: YamlDocument, parents: frozenset[int], name: str) -> None:
    """Note the line of every key below `node`, and every key that a mapping holds twice."""
    if id(node) in parents:
        raise InputError(f"{name}: line {node.start_mark.line + 1}: an alias refers to what contains it; write it out")
    document.values += 1
    if document.values > MAX_VALUES:
        raise InputError(
            f"{name}: line {node.start_mark.line + 1}: its aliases stand for more than {MAX_VALUES:,} values in all; "
            "write out what is meant"
        )
    inside = parents | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            _record(item, (*path, index), document, inside, name)
    if isinstance(node, yaml.MappingNode):
        first: dict[Hashable, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            text = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            here = (*path, text)
            if text in first and key.tag != _tag("merge"):
                problem = f"written again on line {line}, first on line {first[text]}; keep one of them"
                document.problems.append((here, problem))
            first.setdefault(text, line)
            document.lines.setdefault(here, line)
            _record(value, here, document, inside, name)
