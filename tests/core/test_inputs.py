"""Everything that is wrong with a run's input, in one answer: schema, models and data, each with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import small_topology, topology_data, write_lines, write_topology

from opd_async.checks.inputs import examine
from opd_async.config.topology import Topology
from opd_async.config.topology_file import list_problems
from opd_async.errors import InputError


def refused(file: Path, *overrides: str) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(InputError) as caught:
        examine(file, overrides, lambda line: None)
    return str(caught.value).splitlines()


def line_of(file: Path, key: str) -> int:
    """The line on which a key stands first."""
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if line.strip() == f"{key}:")


def test_schema_models_and_data_are_one_round(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    data["schedule"]["stepps"] = 3
    data["models"]["teacher"]["path"] = "no-such-model"
    data["rollout"]["slots"] = 1000
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab"}, "{", {"text": "ab"})
    file = write_topology(tmp_path, data)
    count, *lines = refused(file)
    assert count == f"{file}: 4 problems"
    text = file.read_text().splitlines()
    for key, words in {
        "stepps": "schedule.stepps: unknown key; did you mean steps?",
        "path": "models.teacher.path: no-such-model is no folder",
        "slots": "rollout.slots: 1000, but the student engines run 16 requests",
    }.items():
        (found,) = [line for line in lines if words.split(":")[0] in line and line.startswith("  line ")]
        number = int(found.split()[1].rstrip(":"))
        assert text[number - 1].strip().startswith(f"{key}:"), found
        assert words.split(":")[0] in found
    (rows,) = [line for line in lines if "data.train.path" in line]
    assert "2 broken rows" in rows
    assert [line.strip() for line in lines if ".jsonl:2: not valid JSON" in line or ".jsonl:3: no key 'prompt'" in line]


def test_what_rests_on_a_refused_key_is_not_said(tmp_path: Path) -> None:
    """Its default is in its place, of which nobody has written anything."""
    data = topology_data(tmp_path)
    data["engines"]["student"]["context_tokens"] = "many"
    data["data"]["train"] = {}
    file = write_topology(tmp_path, data)
    lines = refused(file)
    assert lines[0] == f"{file}: 2 problems", lines
    assert 'engines.student.context_tokens: found "many"; write a whole number, at least 1' in "\n".join(lines)
    assert "data.train.path: missing; write a path" in "\n".join(lines)


def test_what_set_has_given_is_said_so(tmp_path: Path) -> None:
    file = write_topology(tmp_path, topology_data(tmp_path))
    lines = refused(file, "rollout.slots=1000", "seed=-1")
    assert [line for line in lines if line.startswith("  --set: rollout.slots: 1000, but the student engines")]
    assert [line for line in lines if line.startswith("  --set: seed: found -1; write a whole number, at least 0")]


def test_repeated_findings_are_one_line_with_their_count() -> None:
    problems = [(4, f"engines.student.urls.{item}: found 3; write text") for item in range(3)]
    assert list_problems("x.yaml", [*problems, (2, "seed: found -1; write more")]).splitlines() == [
        "x.yaml: 4 problems",
        "  line 2: seed: found -1; write more",
        "  line 4: engines.student.urls.0 and 2 more like it: found 3; write text",
    ]


def test_a_right_topology_comes_with_its_inputs(tmp_path: Path) -> None:
    said: list[str] = []
    write = topology_data(tmp_path)
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab"}, {"prompt": "abcdefghij" * 4})
    topology, inputs = examine(write_topology(tmp_path, write), ["schedule.steps=20"], said.append)
    assert topology.schedule.steps == 20 and [len(prompt.token_ids) for prompt in inputs.prompts.prompts] == [3]
    assert said == [f"{tmp_path / 'train.jsonl'}: skipped 1 prompts longer than 32 tokens"]


# --- topologies in code ----------------------------------------------------------------------------------------------


def in_words(make: Any) -> str:
    with pytest.raises(InputError) as caught:
        make()
    return str(caught.value)


def test_a_topology_in_code_is_that_of_the_file(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    assert Topology(**topology_data(tmp_path)) == topology
    of_sections = {name: getattr(topology, name) for name in Topology.model_fields}
    assert Topology(**of_sections) == topology
    file = write_topology(tmp_path, topology_data(tmp_path))
    given = {"schedule.steps": 3, "run_dir": tmp_path / "elsewhere", "learner.devices": ["cpu"]}
    changed = Topology.load(file, given)
    assert (changed.schedule.steps, changed.run_dir) == (3, tmp_path / "elsewhere")
    assert Topology.load(str(file), ["schedule.steps=3", f"run_dir={tmp_path / 'elsewhere'}"]) == changed


def test_a_topology_in_code_gets_the_messages_of_a_file(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    data["schedule"] = {"steps": "ten", "stepps": 10}
    del data["models"]
    file = write_topology(tmp_path, data)
    with pytest.raises(InputError) as of_file:
        Topology.load(file)
    lines = [line.split(": ", 1)[1] for line in str(of_file.value).splitlines()[1:] if line.startswith("  line")]
    said = in_words(lambda: Topology(**yaml.safe_load(file.read_text())))
    assert said.startswith("Topology: 3 problems\n") and lines
    assert all(f"  {line}" in said.splitlines() for line in lines)
    assert "schedule.stps: unknown key; did you mean steps?" in in_words(
        lambda: Topology.load(file, {"schedule.stps": 1})
    )
    assert "is object, which no topology can hold" in in_words(lambda: Topology(**data | {"seed": object()}))
