"""Scalings of rotary angles: those that depend on the length of a call are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import make_model, small_topology

from opd_async.checks.validation import validate
from opd_async.data.rope import rope_problem, rope_types

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, []),
        ({"rope_scaling": None, "rope_theta": 1e4}, []),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, ["default"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear"]),
        ({"rope_scaling": {"rope_type": "llama3", "type": "other"}}, ["llama3"]),
        (
            {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}},
            ["dynamic", "default"],
        ),
        ({"text_config": {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}}, ["longrope"]),
    ],
)
def test_every_place_where_a_config_names_a_scaling_is_read(config: dict[str, Any], names: list[str]) -> None:
    assert list(rope_types(config)) == names
    problem = rope_problem(config)
    assert (problem is not None) is bool({"dynamic", "longrope"} & set(names))


@pytest.mark.parametrize("name", ["dynamic", "longrope", "su", "ntk", "something new"])
def test_what_is_not_known_to_be_fixed_is_refused(name: str) -> None:
    problem = rope_problem({"rope_scaling": {"rope_type": name}})
    assert problem is not None and problem.startswith(f"rope_type {name}, whose angles depend on the length of a call")


def test_a_model_for_embedded_engines_is_refused_before_the_start(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    make_model(topology.models.student.path, rope_scaling=DYNAMIC)
    assert [line for line in validate(topology) if "rope_type" in line and line.startswith("models.student.path: ")]
    assert topology.models.teacher is not None
    make_model(topology.models.student.path)
    make_model(topology.models.teacher.path, rope_parameters=DYNAMIC)
    (line,) = [line for line in validate(topology) if "rope_type" in line]
    assert line.startswith("models.teacher.path: rope_type dynamic, whose angles")
    make_model(topology.models.teacher.path, rope_parameters={"rope_type": "yarn", "factor": 2.0})
    assert not [line for line in validate(topology) if "rope_type" in line]
    elsewhere = ["engines.teacher.kind=external", "engines.teacher.urls=['http://127.0.0.1:9']"]
    make_model(topology.models.teacher.path, rope_parameters=DYNAMIC)
    assert not [line for line in validate(small_topology(tmp_path, *elsewhere)) if "rope_type" in line]
