"""Every key of a topology with what it takes, its default, its unit and its meaning: a page, and a schema for editors.

    python -m opd_async.config.reference > docs/topology.md
    python -m opd_async.config.reference --json-schema > examples/topology.schema.json

Both are made from the schema that pydantic derives from `Topology`; tests keep the files equal to it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd_async.config.resuming import Change, may_change
from opd_async.config.schema_text import Schema, expected, schema_at
from opd_async.config.topology import Topology
from opd_async.config.yaml_source import Location

NAME = "<name>"
"""Stands for a name that the user chooses."""
FIRST = "0.1.0"
LATER: dict[str, str] = {}
"""Keys that came after the first version, with the version that brought them. None did: 0.1.0 is the only one."""
RESUMED = {
    Change.YES: "may change",
    Change.WITH_FLAG: "with `--change-lr`",
    Change.SAME_CONTENT: "may move",
    Change.NO: "",
}
"""What the page says of a key that has another value when a run is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a topology that holds a value, not a section."""

    path: str
    """Dotted."""
    takes: str
    """What may stand there, with its bounds, in words."""
    default: str
    """As it is written in YAML; empty where there is none."""
    unit: str
    meaning: str
    since: str
    """The version that brought it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One section of a topology, without the sections inside it."""

    path: str
    meaning: str
    keys: tuple[Key, ...]
    same_as: str | None = None
    """Path of an earlier section with the same keys; `keys` is empty then."""


def parts() -> list[Part]:
    """All sections, outermost first, each before those inside it."""
    root = Topology.model_json_schema()
    return list(_parts(root, root, (), {}))


def json_schema() -> Schema:
    """JSON Schema (draft 2020-12) of a topology, for editors: descriptions carry units."""
    schema: Schema = _for_editors(Topology.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "opd_async topology", **schema}


def json_schema_text() -> str:
    """`json_schema` as the text of examples/topology.schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def markdown() -> str:
    """The page docs/topology.md."""
    return "\n\n".join([_HEAD, *(_section(part) for part in parts())]) + "\n"


def _parts(root: Schema, schema: Schema, path: Location, seen: dict[str, str]) -> Iterator[Part]:
    fields: dict[str, Schema] = schema["properties"]
    inside = {name: _section_below(field, root) for name, field in fields.items()}
    keys = [_key((*path, name), field) for name, field in fields.items() if inside[name] is None]
    yield Part(path=_dotted(path), meaning=_text(schema), keys=tuple(keys))
    for name, section in inside.items():
        if section is None:
            continue
        place = (*path, name, NAME) if section.named else (*path, name)
        meaning = _text(fields[name]) or _text(section.schema)
        first = seen.setdefault(section.reference, _dotted(place))
        if first == _dotted(place):
            yield from _parts(root, section.schema | {"description": meaning}, place, seen)
        else:
            yield Part(path=_dotted(place), meaning=meaning, keys=(), same_as=first)


@dataclass(frozen=True, slots=True)
class _Below:
    """The sections that a key holds: one, or one for each name that the user chooses (`named`)."""

    reference: str
    schema: Schema
    named: bool


def _section_below(field: Schema, root: Schema) -> _Below | None:
    """The sections that a key holds, or None where it holds a value."""
    for option in (field, *field.get("anyOf", ())):
        values = option.get("patternProperties")
        reference = next(iter(values.values())).get("$ref") if values else option.get("$ref")
        found = root["$defs"][reference.rsplit("/", 1)[1]] if reference else {}
        if "properties" in found:
            return _Below(reference, found, bool(values))
    return None


def _key(path: Location, field: Schema) -> Key:
    where = tuple("teacher" if part == NAME else part for part in path)
    schema = schema_at(where)
    assert schema is not None, path
    unit = next((option["unit"] for option in (schema, *schema.get("anyOf", ())) if "unit" in option), "")
    default = field.get("default")
    text = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
    shown = text if "default" in field else ""
    return Key(
        path=(dotted := _dotted(path)),
        takes=expected(where),
        default=shown,
        unit=unit,
        meaning=_text(field),
        since=LATER.get(dotted, FIRST),
    )


def _text(schema: Schema) -> str:
    """The description on one line."""
    return " ".join(schema.get("description", "").split())


def _dotted(path: Location) -> str:
    return ".".join(str(part) for part in path)


def _section(part: Part) -> str:
    head = [f"## `{part.path}`" if part.path else "## The whole file", "", part.meaning]
    if part.same_as is not None:
        return "\n".join([*head, "", f"The keys are those of [`{part.same_as}`](#{_anchor(part.same_as)})."])
    if not part.keys:
        return "\n".join(head)
    table = ["| key | takes | default | unit | resume | since | meaning |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, "", *table, *(_row(key) for key in part.keys)])


def _row(key: Key) -> str:
    name = key.path.rsplit(".", 1)[-1]
    default = f"`{key.default}`" if key.default else "must be written"
    cells = (f"`{name}`", key.takes, default, key.unit, RESUMED[may_change(key.path)], key.since, key.meaning)
    return "".join(f"| {cell.replace('|', chr(92) + '|')} " if cell else "| " for cell in cells) + "|"


def _anchor(path: str) -> str:
    return "".join(letter for letter in path.lower() if letter.isalnum() or letter in "_-")


_SAME = {"oneOf": "anyOf"}
"""Forms of a key never overlap here, and `anyOf` is what every editor reads."""


def _for_editors(schema: Any) -> Any:
    """Without pydantic's titles, formats and units, which editors show or refuse; units end the descriptions."""
    if isinstance(schema, list):
        return [_for_editors(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        name: {key: _for_editors(value) for key, value in inner.items()}
        if name in ("properties", "$defs", "patternProperties")
        else _for_editors(inner)
        for name, inner in ((_SAME.get(name, name), inner) for name, inner in schema.items())
        if name not in ("title", "unit", "format")
    }
    units = [option["unit"] for option in (schema, *schema.get("anyOf", ())) if "unit" in option]
    if "description" in schema:
        made["description"] = " ".join([_text(schema), *(f"Unit: {unit}." for unit in units)])
    return made


_HEAD = """\
# Topology

Made by `python -m opd_async.config.reference` from the sections in `opd_async/config/`; a test keeps this page equal
to them.

Every key of a topology file. *Takes* has the type and its bounds. A key with a default may be left out, and so may a
section whose keys all have one. *Resume* says whether a run that is resumed may have another value there; a path that
*may move* must name the same content. *Since* is the version that brought the key. `--set` sets any key for one run:
`--set schedule.steps=20`. Combinations of keys are checked before a run starts; `--dry-run` checks them and starts
nothing.

Editors that know the first line of the examples, `# yaml-language-server: $schema=topology.schema.json`, complete and
check keys while you write. `python -m opd_async.config.reference --json-schema` prints that schema."""


def main() -> None:
    """Print the page, or the schema."""
    about = "Print every key of a topology, as the page docs/topology.md."
    parser = argparse.ArgumentParser(prog="python -m opd_async.config.reference", description=about)
    parser.add_argument("--json-schema", action="store_true", help="print JSON Schema for editors instead")
    print(json_schema_text() if parser.parse_args().json_schema else markdown(), end="")


if __name__ == "__main__":
    main()
