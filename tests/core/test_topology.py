"""Topology files: everything that is wrong is said at once, in a person's words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_runs import small_topology, topology_data, write_topology

from opd_async.config.section import Auto, Section
from opd_async.config.topology import ModelSection, SamplingSection, ScheduleSection, TrainOn
from opd_async.config.topology_file import dump_topology, load_topology
from opd_async.config.yaml_source import parse_yaml
from opd_async.errors import InputError
from opd_async.telemetry.report import Evaluation


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_topology(path, overrides)
    return str(caught.value)


def test_the_quickstart_loads_and_round_trips(tmp_path: Path) -> None:
    topology = load_topology(Path("examples/quickstart.yaml"))
    assert topology.learner.optimizer.lr == 2e-3
    assert topology.schedule.train_on is TrainOn.TOKENS
    path = tmp_path / "again.yaml"
    path.write_text(dump_topology(topology))
    again = load_topology(path)
    assert again == topology
    assert isinstance(topology.rollout.slots, Auto)
    assert isinstance(again.rollout.slots, Auto)


def test_numbers_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    assert parse_yaml("[1e-6, 010, 12:30, on, 0.5, -3, ~, true, 2024-01-01, .5, 1.]", "x").data == [
        *[1e-6, 10, "12:30", "on", 0.5, -3, None, True, "2024-01-01", 0.5, 1.0]
    ]


@settings(max_examples=50, deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(0, 2**53), st.text("ab%': #\n-é", max_size=12))
def test_dumped_values_load_back_equal(number: float, seed: int, text: str) -> None:
    topology = load_topology(Path("examples/quickstart.yaml"))
    optimizer = topology.learner.optimizer.model_copy(update={"lr": number})
    learner = topology.learner.model_copy(update={"optimizer": optimizer})
    evaluation = topology.evaluation.model_copy(update={"answer_pattern": text})
    changed = topology.model_copy(update={"seed": seed, "learner": learner, "evaluation": evaluation})
    document = parse_yaml(dump_topology(changed), "dump")
    assert type(topology).model_validate(document.data) == changed


def test_unknown_keys_get_a_suggestion_and_a_line(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    data["schedule"]["max_stalenes"] = 1
    data["lr"] = 1.0
    data["network"] = {"zzz": 1}
    text = message(write_topology(tmp_path, data))
    assert "schedule.max_stalenes: unknown key; did you mean max_staleness?" in text
    assert "lr: unknown key here; did you mean learner.optimizer.lr or advantage.critic.lr?" in text
    assert "network.zzz: unknown key; the keys here are bind, base_port" in text
    line = (tmp_path / "topology.yaml").read_text().splitlines().index("  max_stalenes: 1") + 1
    assert f"line {line}: schedule.max_stalenes" in text
    assert "3 problems" in text


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", "true", "seed: found true; write a whole number, at least 0"),
        ("schedule.steps", "1.5", "schedule.steps: found 1.5; write a whole number, at least 1"),
        ("schedule.steps", "'7'", 'schedule.steps: found "7"; write a whole number, at least 1'),
        ("schedule.train_on", "token", 'found "token"; write one of tokens, samples'),
        ("opd.clip_ratio", ".nan", "found NaN; write a number, above 0 and below 1, or null"),
        ("learner.optimizer.lr", "fast", 'found "fast"; write a number, above 0'),
        ("models.student.path", "3", "models.student.path: found 3; write a path"),
        (
            "engines.student.devices",
            "[gpu]",
            'engines.student.devices.0: found "gpu"; write text such as cpu or cuda:0',
        ),
        ("engines.student.devices", "[]", "write a list of one or more, each text such as cpu or cuda:0"),
        ("engines.teacher.urls", "[ftp://x]", "write text such as http://127.0.0.1:30000"),
        ("rollout", "3", "rollout: found 3; write a section with the keys replicas, slots,"),
        ("name", "a b", 'name: found "a b"; write text that matches'),
    ],
)
def test_wrong_values_say_what_to_write(tmp_path: Path, path: str, value: str, expected: str) -> None:
    text = message(write_topology(tmp_path, topology_data(tmp_path)), f"{path}={value}")
    assert expected in text and "1 problem" in text and "  --set: " in text


def test_missing_keys_and_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    text = message(path)
    for key in ("name", "models", "data", "schedule"):
        assert f"{key}: missing; write " in text
    path.write_text("- a\n")
    assert 'found ["a"]; write a section with the keys name, seed' in message(path)
    assert "no such topology file" in message(tmp_path / "nowhere.yaml")


def test_malformed_yaml_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, where in (
        ("name: x\nschedule: {steps: 1\nmodels: 3\n", "line 3, column 7"),
        ("a:\n\t- b\n", "line 2, column 1"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4"),
        ("a: *nowhere\n", "line 1, column 4"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1"),
    ):
        path.write_text(text)
        assert f"{path}: {where}: not valid YAML" in message(path)
    path.write_text("a: &a [*a]\n")
    assert "line 1: an alias refers to what contains it" in message(path)
    path.write_bytes(b"name: \xff\n")
    assert "cannot be read" in message(path)


@pytest.mark.parametrize("more", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_of_aliases_are_refused_at_once(tmp_path: Path, more: str) -> None:
    lines = ["a0: &a0 {x: 1}" if more.startswith("{") else "a0: &a0 [1]"]
    for level in range(1, 10):
        lines.append(f"a{level}: &a{level} {more.format(', '.join([f'*a{level - 1}'] * 10))}")
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    text = message(path)
    assert f"{path}: line 1: its aliases stand for more than 100,000 values in all; write out what is meant" in text


def test_repeated_keys_are_errors(tmp_path: Path) -> None:
    path = write_topology(tmp_path, topology_data(tmp_path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "name: other", "checkpoint: {keep: 1, keep: 2}"]))
    text = message(path)
    assert f"name: written again on line {len(lines) + 1}, first on line 1; keep one of them" in text
    assert "checkpoint.keep: written again" in text


def test_overrides(tmp_path: Path) -> None:
    topology = small_topology(
        tmp_path,
        "schedule.steps=3",
        "learner.optimizer.lr=1e-4",
        "engines.student.devices=[cpu, 'cuda:0']",
        "engines.student.devices.1=cuda:1",
        "opd.clip_ratio=null",
        "data.held_out.path=x.jsonl",
    )
    assert topology.schedule.steps == 3
    assert topology.learner.optimizer.lr == 1e-4
    assert topology.engines.student.devices == ("cpu", "cuda:1")
    assert topology.opd.clip_ratio is None
    assert topology.data.held_out is not None and topology.data.held_out.path == Path("x.jsonl")


def test_wrong_overrides_are_all_reported(tmp_path: Path) -> None:
    path = write_topology(tmp_path, topology_data(tmp_path))
    overrides = ["rollout.slot=3", "x", "engines.student.devices.0=cpu", "seed.a=1", "seed.0=1", "seed={", "schedul=1"]
    text = message(path, *overrides)
    assert "7 problems" in text
    assert "rollout.slot: unknown key; did you mean slots?" in text
    assert "x: write --set path.to.key=value" in text
    assert "engines.student.devices has 0 items in the file; set the whole list instead" in text
    assert "seed.a: unknown key" in text and "seed is not a list" in text
    assert "seed={: value: line 1, column 2: not valid YAML" in text
    assert "did you mean schedule?" in text


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data.setdefault(key, {})
        data[path[-1]] = value

    return edit


WRONG_EDITS = {
    "schedule.steps: found 0": _set("schedule", "steps", value=0),
    "schedule.stepz: unknown key": _set("schedule", "stepz", value=1),
    "seed: found -1": _set("seed", value=-1),
    'name: found ""': _set("name", value=""),
    "colour: unknown key": _set("colour", value="red"),
    "models.student.path: found 3": _set("models", "student", "path", value=3),
    "models.teacher.path: missing": _set("models", "teacher", value={}),
    "rollout.slots: found null": _set("rollout", "slots", value=None),
    "rollout.sampling.top_p: found 2": _set("rollout", "sampling", "top_p", value=2),
    "learner.optimizer.beta1: found 1": _set("learner", "optimizer", "beta1", value=1),
    "learner.devices.1: found": _set("learner", "devices", value=["cpu", {"a": 1}]),
    "opd: found": _set("opd", value=["x"]),
    "network.base_port: found 99999": _set("network", "base_port", value=99999),
    "data.train.path: missing": _set("data", "train", value={}),
}


@settings(max_examples=60, deadline=None)
@given(chosen=st.sets(st.sampled_from(sorted(WRONG_EDITS)), min_size=1))
def test_every_wrong_edit_is_reported(chosen: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "edits"
    if not root.exists():
        root.mkdir()
        topology_data(root)
    data = copy.deepcopy(_edited_base(root))
    for name in chosen:
        WRONG_EDITS[name](data)
    text = message(write_topology(root, data))
    assert all(name in text for name in chosen)
    assert len(text.splitlines()) == 1 + len(chosen)


_BASE: dict[str, Any] = {}


def _edited_base(root: Path) -> dict[str, Any]:
    if not _BASE:
        _BASE.update(topology_data(root))
    return _BASE


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ScheduleSection(steps=0, tokens_per_step=64, max_stalenes=1),
            "ScheduleSection: 2 problems\n"
            "  schedule.steps: found 0; write a whole number, at least 1\n"
            "  schedule.max_stalenes: unknown key; did you mean max_staleness?",
        ),
        (
            lambda: SamplingSection(max_response_tokens="many"),
            "SamplingSection: 1 problem\n"
            '  rollout.sampling.max_response_tokens: found "many"; write a whole number, at least 1',
        ),
        (lambda: ModelSection(), "ModelSection: 1 problem\n  models.student.path: missing; write a path"),
    ],
)
def test_a_section_built_alone_in_code_is_refused_in_the_words_of_a_file(
    build: Callable[[], Section], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        build()
    assert str(refused.value) == message and refused.value.__cause__ is None
    assert SamplingSection(max_response_tokens=5).max_response_tokens == 5


def test_what_is_no_section_of_a_topology_is_a_defect_of_this_program() -> None:
    with pytest.raises(ValidationError):
        Evaluation()
