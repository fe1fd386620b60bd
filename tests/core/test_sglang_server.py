"""SGLang servers in a topology: which versions, which commands, which mistakes are named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from small_runs import small_topology

from opd_async.checks.validation import validate
from opd_async.engines.nccl import nccl_difference
from opd_async.engines.sglang import SUPPORTED, version_problem
from opd_async.plan.plan import RoleKind
from opd_async.plan.resolve import make_plan


def environment(folder: Path, version: str | None, **others: str) -> Path:
    """A Python that finds an SGLang of that version, or none, and these other packages."""
    packages = folder / "packages"
    wanted = {name.replace("_", "-"): each for name, each in {"sglang": version, **others}.items() if each is not None}
    for name, each in wanted.items():
        metadata = packages / f"{name}-{each}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {each}\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" -S "$@"\n')
    os.chmod(python, 0o755)  # noqa: PTH101
    return python


@pytest.mark.parametrize("version", [*SUPPORTED, "0.5.15.post1", "0.5.20+cu130", "0.5.23.post2+cu130"])
def test_supported_versions(tmp_path: Path, version: str) -> None:
    assert version_problem(environment(tmp_path, version)) is None


def test_unusable_environments(tmp_path: Path) -> None:
    for name in ("old", "none", "candidate"):
        (tmp_path / name).mkdir()
    assert version_problem(environment(tmp_path / "old", "0.5.9")) == (
        f"{tmp_path}/old/python has sglang 0.5.9; supported are 0.5.15, 0.5.20, 0.5.23"
    )
    candidate = environment(tmp_path / "candidate", "0.5.23rc1")
    assert "has sglang 0.5.23rc1; supported are" in str(version_problem(candidate))
    assert "has no sglang installed; make the environment with `make sglang`" in str(
        version_problem(environment(tmp_path / "none", None))
    )
    assert "cannot be run (No such file or directory)" in str(version_problem(tmp_path / "nowhere"))


def test_the_plan_starts_servers(tmp_path: Path) -> None:
    python = environment(tmp_path, "0.5.23")
    topology = small_topology(
        tmp_path,
        "engines.student.kind=sglang",
        f"engines.student.python={python}",
        "engines.student.args=[--page-size, '1']",
        "engines.student.api_key=s3cret",
        "engines.student.replicas=2",
    )
    assert validate(topology) == []
    plan = make_plan(topology)
    role = plan.role(RoleKind.STUDENT_ENGINE, 1)
    assert role.command[:3] == (str(python), "-m", "sglang.launch_server")
    assert role.command[-2:] == ("--page-size", "1")
    options = dict(zip(role.command[3:-1:2], role.command[4::2], strict=False))
    assert options["--port"] == str(role.ports["http"]) == plan.student_engines[1].rsplit(":", 1)[1]
    assert options["--random-seed"] == str(topology.seed + 1)
    assert options["--context-length"] == str(topology.engines.student.context_tokens + 8)
    assert options["--config"] == str(plan.run_folder / "keys" / "student-engine-1.yaml")
    assert not any("s3cret" in word for word in role.command)
    assert "--device" in role.command and "--incremental-streaming-output" in role.command
    assert role.env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert role.ports["metrics"] == role.ports["http"]
    assert plan.role(RoleKind.TEACHER_ENGINE, 0).env == {}


def test_only_one_version_is_told_a_port_that_it_checks_but_does_not_use(tmp_path: Path) -> None:
    for version in ("0.5.15", "0.5.15.post1", "0.5.20"):
        (tmp_path / version).mkdir()
        python = environment(tmp_path / version, version)
        settings = ["engines.student.kind=sglang", f"engines.student.python={python}"]
        role = make_plan(small_topology(tmp_path / version, *settings)).role(RoleKind.STUDENT_ENGINE, 0)
        assert ("SGLANG_GRPC_PORT" in role.env) is version.startswith("0.5.15")


def test_on_a_gpu_sglang_chooses_for_itself(tmp_path: Path) -> None:
    python = environment(tmp_path, "0.5.23")
    settings = ["engines.student.kind=sglang", f"engines.student.python={python}", "engines.student.devices=[cuda:3]"]
    role = make_plan(small_topology(tmp_path, *settings)).role(RoleKind.STUDENT_ENGINE, 0)
    assert not {"--device", "--attention-backend", "--disable-cuda-graph"} & set(role.command)
    assert role.env["CUDA_VISIBLE_DEVICES"] == "3" and "SGLANG_USE_CPU_ENGINE" not in role.env


def test_several_devices_for_a_replica(tmp_path: Path) -> None:
    python = environment(tmp_path, "0.5.23")
    settings = ["engines.student.kind=sglang", f"engines.student.python={python}", "engines.student.tensor_parallel=2"]
    devices = ["engines.student.devices=[cuda:3, cuda:4, cuda:5, cuda:6]", "learner.devices=[cuda:0]"]
    topology = small_topology(tmp_path, *settings, "engines.student.replicas=2", *devices)
    assert validate(topology) == []
    role = make_plan(topology).role(RoleKind.STUDENT_ENGINE, 1)
    assert role.env["CUDA_VISIBLE_DEVICES"] == "5,6" and role.devices == ("cuda:5", "cuda:6")
    assert role.command[role.command.index("--tp-size") + 1] == "2"
    role = make_plan(small_topology(tmp_path, *settings)).role(RoleKind.STUDENT_ENGINE, 0)
    assert len(role.env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2
    devices = ["engines.student.devices=[cuda:3, cuda:4, cuda:5]", "learner.devices=[cuda:0]"]
    problems = validate(small_topology(tmp_path, *settings, *devices))
    assert problems == ["engines.student.devices: 3 devices for 1 replicas; write 2 for each, or one for all"]


def test_devices_that_no_broadcast_can_join(tmp_path: Path) -> None:
    python = environment(tmp_path, "0.5.23")
    settings = ["engines.student.kind=sglang", f"engines.student.python={python}"]

    def problems(*changes: str) -> list[str]:
        found = validate(small_topology(tmp_path, *settings, *changes))
        return [problem.removeprefix("learner.weight_transport: broadcast, but ") for problem in found]

    on_gpu = "learner.devices=[cuda:0]"
    assert problems(on_gpu) == [
        "learner rank 0 is on cuda:0 and a student engine on cpu, between which there is no broadcast; write disk, or "
        "devices of one kind"
    ]
    assert problems("engines.student.devices=[cuda:1]")[0].startswith("learner rank 0 is on cpu and a student engine")
    assert problems(on_gpu, "engines.student.devices=[cuda:1]") == []
    assert problems(on_gpu, "learner.weight_transport=disk") == []
    one = [on_gpu, "engines.student.devices=[cuda:0]", "shared_devices=[cuda:0]"]
    assert problems(*one) == [
        "cuda:0 belongs to learner rank 0 and a student engine, and NCCL takes one member of a group from each device; "
        "write tensor"
    ]
    two = [on_gpu, "engines.student.replicas=2", "engines.student.devices=[cuda:1]", "shared_devices=[cuda:1]"]
    assert problems(*two)[0].startswith("cuda:1 belongs to two student engines, and NCCL")
    stages = [on_gpu, "engines.student.devices=[cuda:1]"]
    assert problems(*stages, "engines.student.args=[--pp-size, '1']") == []
    for given in ("[--pp-size, '2']", "[--pipeline-parallel-size=2]"):
        assert problems(*stages, f"engines.student.args={given}") == [
            "engines.student.args: 2 pipeline stages, whose processes SGLang numbers alike in a weight group; write "
            "tensor_parallel instead, or learner.weight_transport: disk"
        ]


def test_two_versions_of_nccl_are_named(tmp_path: Path) -> None:
    ours = environment(tmp_path / "a", None, torch="2.13.0", nvidia_nccl_cu13="2.29.1")
    theirs = environment(tmp_path / "b", "0.5.15", torch="2.11.0", nvidia_nccl_cu12="2.28.9")
    assert nccl_difference(ours, theirs) == (
        f"NCCL 2.29.1 (torch 2.13.0) in {ours} and 2.28.9 (torch 2.11.0) in {theirs}"
    )
    same = environment(tmp_path / "c", "0.5.23", torch="2.13.0", nvidia_nccl_cu13="2.29.1")
    assert nccl_difference(ours, same) is None
    on_cpu = environment(tmp_path / "d", "0.5.23", torch="2.13.0+cpu")
    assert nccl_difference(ours, on_cpu) is None, "torch for CPUs has none"
    assert nccl_difference(ours, tmp_path / "nowhere") is None


def test_the_learners_gpu_may_be_shared_with_engines_that_read_its_memory(tmp_path: Path) -> None:
    python = environment(tmp_path, "0.5.23")
    settings = [
        *("engines.student.kind=sglang", f"engines.student.python={python}"),
        *("learner.devices=[cuda:0]", "learner.weight_transport=tensor"),
    ]
    assert validate(small_topology(tmp_path, *settings, "engines.student.devices=[cuda:0]")) == []
    assert [problem.split(",")[0] for problem in validate(small_topology(tmp_path, *settings))] == [
        "learner.weight_transport: tensor"
    ]
    shared = ["engines.student.devices=[cuda:0]", "engines.teacher.devices=[cuda:0]"]
    assert len(validate(small_topology(tmp_path, *settings, *shared))) == 1
    assert validate(small_topology(tmp_path, *settings, *shared, "shared_devices=[cuda:0]")) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["engines.student.kind=sglang"], "engines.student.python: missing; write the Python that has SGLang"),
        (["engines.student.python=x"], "only for kind sglang, this is embedded; remove them"),
        (["engines.teacher.args=[--tp, '2']"], "only for kind sglang, this is embedded; remove them"),
        (["engines.student.kind=sglang", "engines.student.python=/nowhere/python"], "make the environment with"),
        (["engines.student.kind=sglang", "engines.student.urls=[http://127.0.0.1:1]"], "starts sglang engines itself"),
    ],
)
def test_mistakes(tmp_path: Path, overrides: list[str], problem: str) -> None:
    assert any(problem in found for found in validate(small_topology(tmp_path, *overrides)))
