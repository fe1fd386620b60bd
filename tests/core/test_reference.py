"""Every key of a topology is described, and the page and the schema for editors say what the sections say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import LEAST

from opd_async.config.reference import FIRST, LATER, Key, json_schema, json_schema_text, markdown, parts
from opd_async.config.schema_text import expected
from opd_async.config.topology import Topology

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*.yaml"))
UNITS = {"_tokens": "tokens", "_s": "s", "_ms": "ms", "_mib": "MiB", "_steps": "steps"}


def keys() -> dict[str, Key]:
    return {key.path: key for part in parts() for key in part.keys}


def flat(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_page_is_that_of_the_sections() -> None:
    again = "run: python -m opd_async.config.reference > docs/topology.md"
    assert (ROOT / "docs/topology.md").read_text() == markdown(), again


def test_the_schema_for_editors_is_that_of_the_sections() -> None:
    again = "run: python -m opd_async.config.reference --json-schema > examples/topology.schema.json"
    assert (ROOT / "examples/topology.schema.json").read_text() == json_schema_text(), again


def test_every_key_and_section_has_a_description() -> None:
    assert [part.path for part in parts() if len(part.meaning) < 10] == []
    assert [path for path, key in keys().items() if len(key.meaning) < 10] == []


def test_keys_that_came_later_are_there_and_their_versions_are_in_the_changelog() -> None:
    assert LATER.keys() <= keys().keys(), "a key that is gone, or that was renamed"
    released = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {key.since for key in keys().values()} <= set(released)
    assert released[-1] == FIRST and not {*LATER.values()} & {FIRST}


def test_no_key_is_left_out() -> None:
    """Everything that a topology with all its sections is dumped as; sections with the same keys are listed once."""
    section = {"path": "x"}
    whole = LEAST | {"data": {"train": section, "held_out": section, "completions": section}}
    dumped = set(flat(Topology.model_validate(whole).model_dump(mode="json")))
    same = {part.path: part.same_as for part in parts() if part.same_as}
    listed = set(keys())
    for path, first in same.items():
        listed |= {f"{path}.{key.rsplit('.', 1)[1]}" for key in keys() if key.rpartition(".")[0] == first}
    assert dumped - {"models.teachers", "engines.teachers", "evaluation.sets"} <= listed


def test_defaults_and_bounds_are_those_of_the_code() -> None:
    found = keys()
    assert (found["schedule.max_staleness"].default, found["schedule.steps"].default) == ("1", "")
    assert found["opd.clip_ratio"].default == "0.2" and found["opd.signal_clamp"].default == "null"
    assert found["engines.student.devices"].default == '["cpu"]'
    for path, key in found.items():
        assert "<name>" in path or key.takes == expected(tuple(path.split(".")))
    assert found["learner.optimizer.min_lr_ratio"].takes == "a number, at least 0 and at most 1"


def test_names_with_a_unit_have_it() -> None:
    """A name that ends in a unit is a number in it, a rate apart; `every_steps` and its like may be null."""
    wrong = [
        path
        for path, key in keys().items()
        for ending, unit in UNITS.items()
        if path.endswith(ending) and not path.endswith("_per_s")
        if key.takes.startswith(("a number", "a whole number")) and key.unit != unit
    ]
    assert wrong == []
    assert keys()["evaluation.every_steps"].unit == "steps" and keys()["rollout.slots"].unit == ""


def test_the_page_says_what_a_resumed_run_may_change() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in markdown().splitlines() if line.startswith("| `")}
    assert "| may change |" in rows["steps"] and "| may change |" in rows["heartbeat_deadline_s"]
    assert "may change" not in rows["lr"] and "may change" not in rows["max_staleness"]


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema inside one, itself included; what a default or an example holds is none."""
    if isinstance(schema, dict):
        yield schema
        for name, inner in schema.items():
            if name in ("properties", "$defs", "patternProperties"):
                for value in inner.values():
                    yield from schemas(value)
            elif name not in ("default", "examples"):
                yield from schemas(inner)
    elif isinstance(schema, list):
        for item in schema:
            yield from schemas(item)


def test_the_schema_for_editors_has_nothing_that_they_do_not_know() -> None:
    known = {"$ref", "$defs", "type", "enum", "anyOf", "properties", "patternProperties", "additionalProperties"}
    known |= {"required", "description", "default", "examples", "items", "minItems", "pattern", "const"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    found = {name for schema in schemas(json_schema()) for name in schema}
    assert found - known == {"$schema", "title"}
    teacher = json_schema()["$defs"]["TeacherSection"]["properties"]
    assert teacher["batch_tokens"]["description"].endswith("Unit: tokens.")
    assert json.loads(json_schema_text()) == json_schema()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: str(file.name))
def test_examples_begin_with_the_line_that_editors_read(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix) and (file.parent / first.removeprefix(prefix)).is_file()
    assert yaml.safe_load(file.read_text()).keys() <= json_schema()["properties"].keys()
