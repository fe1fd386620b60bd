"""Where the teacher is: slime's options over the file's keys, and every combination that cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import make_model, small_topology, topology_data, write_topology

from opd_async.checks.validation import validate
from opd_async.command import parse_arguments
from opd_async.config.learning import OpdType
from opd_async.config.losses import FULL_LOSSES, GIVEN_LOSSES, LOSSES, TOPK_LOSSES
from opd_async.config.slime_flags import opd_overrides
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.plan.plan import RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run.checkpoints import SHARDS, seal, step_folder


def launched(root: Path, *options: str, **opd: object) -> Topology:
    """What the launcher makes of options and a topology with these keys under `opd`."""
    path = write_topology(root, topology_data(root) | ({"opd": opd} if opd else {}))
    arguments = parse_arguments(["--topology", str(path), *options])
    return load_topology(path, [*arguments.set, *opd_overrides(arguments)])


def make_checkpoint(run: Path, step: int) -> Path:
    """A sealed checkpoint of a run, as far as names go."""
    folder = step_folder(run / "checkpoints", step)
    (folder / SHARDS).mkdir(parents=True)
    (folder / SHARDS / ".metadata").write_bytes(b"\0")
    seal(folder, step)
    return folder


def test_defaults_are_slimes_and_a_topology_without_the_keys_distils_from_engines(tmp_path: Path) -> None:
    opd = launched(tmp_path).opd
    assert (opd.use_opd, opd.type, opd.kl_coef) == (True, OpdType.SGLANG, 1.0)
    assert opd.teacher_load is None and opd.teacher_ckpt_step is None
    assert validate(small_topology(tmp_path)) == []


def test_options_win_over_the_file(tmp_path: Path) -> None:
    options = ["--use-opd", "--opd-type", "megatron", "--opd-kl-coef", "0.5"]
    options += ["--opd-teacher-load", "a: b # c", "--opd-teacher-ckpt-step", "7"]
    opd = launched(tmp_path, *options, type="sglang", kl_coef=2.0, use_opd=False).opd
    assert (opd.use_opd, opd.type, opd.kl_coef) == (True, OpdType.MEGATRON, 0.5)
    assert (opd.teacher_load, opd.teacher_ckpt_step) == (Path("a: b # c"), 7)
    untouched = launched(tmp_path, type="megatron", kl_coef=2.0, teacher_load="x").opd
    assert (untouched.type, untouched.kl_coef, untouched.teacher_load) == (OpdType.MEGATRON, 2.0, Path("x"))
    assert not launched(tmp_path, "--no-use-opd").opd.use_opd
    with pytest.raises(SystemExit):
        parse_arguments(["--topology", "x.yaml", "--opd-type", "fsdp"])


WRONG = [
    (["--use-opd"], "opd.type: missing although opd.use_opd is written; write sglang"),
    (["--opd-type", "megatron"], "opd.teacher_load: missing, but opd.type is megatron; write the folder"),
    (["--opd-type", "sglang", "--opd-teacher-load", "x"], "opd.teacher_load: given, but opd.type is sglang"),
    (["--no-use-opd", "--opd-teacher-load", "x"], "opd.teacher_load: given, but opd.use_opd is false; remove it"),
    (["--opd-type", "megatron", "--opd-teacher-load", "nowhere"], "opd.teacher_load: nowhere: no such folder; give"),
    (["--opd-teacher-ckpt-step", "3"], "opd.teacher_ckpt_step: a step of no checkpoint; remove it, or write"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG)
def test_wrong_combinations_are_named_before_anything_starts(tmp_path: Path, options: list[str], expected: str) -> None:
    found = [line for line in validate(launched(tmp_path, *options)) if line.startswith("opd.t")]
    assert len(found) == 1 and found[0].startswith(expected), found


def test_sampling_from_a_mixture_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = write_topology(tmp_path, topology_data(tmp_path) | {"opd": {"teacher_mix": 0.2}})
    (line,) = validate(load_topology(path, []))
    assert line.startswith("opd.teacher_mix: 0.2, but to sample from a mixture") and "write 0" in line


def test_a_teacher_on_engines_must_be_in_the_topology(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    del data["models"]["teacher"]
    (found,) = validate(load_topology(write_topology(tmp_path, data)))
    assert found.startswith("models.teacher: missing, but opd.type is sglang and somebody must score; write")


def test_the_megatron_teacher_is_looked_up_at_its_step(tmp_path: Path) -> None:
    run = tmp_path / "teacher-run"
    for step in (50, 100):
        make_checkpoint(run, step)
    (step_folder(run / "checkpoints", 150) / SHARDS).mkdir(parents=True)  # never sealed: a crash left it

    def found(*options: str) -> list[str]:
        return validate(launched(tmp_path, "--opd-type", "megatron", *options))

    load = ("--opd-teacher-load", str(run))
    assert found(*load) == found(*load, "--opd-teacher-ckpt-step", "50") == []
    assert found("--opd-teacher-load", str(step_folder(run / "checkpoints", 50))) == []
    for step in ("70", "150"):
        (line,) = found(*load, "--opd-teacher-ckpt-step", step)
        assert line.endswith(f"has no complete checkpoint at step {step}; those that it has: 50, 100")
    (tmp_path / "empty").mkdir()
    (line,) = found("--opd-teacher-load", str(tmp_path / "empty"))
    assert "holds no Megatron checkpoint (torch_dist)" in line
    (line,) = found("--opd-teacher-load", str(tmp_path / "empty"), "--opd-teacher-ckpt-step", "1")
    assert line.endswith("at step 1; those that it has: none")


def test_losses_go_with_where_the_teacher_is(tmp_path: Path) -> None:
    run = tmp_path / "teacher-run"
    make_checkpoint(run, 50)

    def found(loss: str, **keys: object) -> list[str]:
        path = write_topology(tmp_path, topology_data(tmp_path) | {"opd": {"loss": loss, "topk": 8, **keys}})
        return validate(load_topology(path, ["schedule.train_on=samples"]))

    inside = {"type": "megatron", "teacher_load": str(run)}
    for loss in sorted(set(LOSSES) - GIVEN_LOSSES):
        assert bool(found(loss)) is (loss in FULL_LOSSES)
        assert bool(found(loss, **inside)) is (loss in TOPK_LOSSES)
        assert [line[:20] for line in found(loss, use_opd=False)] == ["opd.use_opd: false, "]  # for want of a reward
    (line,) = found("jsd_full")
    assert line.startswith("opd.loss: jsd_full needs the teacher's whole distribution") and "write jsd_topk" in line
    (line,) = found("minillm_topk", **inside)
    assert line.endswith("write minillm_full")


def test_a_teacher_in_the_learner_is_split_like_the_student(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    make_checkpoint(tmp_path / "teacher-run", 50)
    data["models"]["teacher"] = {"path": str(make_model(tmp_path / "odd", num_hidden_layers=3))}
    data["opd"] = {"type": "megatron", "teacher_load": str(tmp_path / "teacher-run")}
    (line,) = validate(load_topology(write_topology(tmp_path, data), ["learner.pipeline_parallel=2"]))
    assert line == "learner.pipeline_parallel: 2 does not divide the teacher's 3 layers; write 1 or 3"


@pytest.mark.parametrize("options", [("--opd-type", "megatron"), ("--no-use-opd",)])
def test_no_teacher_engine_and_no_teacher_actor_without_need(tmp_path: Path, options: tuple[str, ...]) -> None:
    plan = make_plan(launched(tmp_path, *options))
    assert plan.of_kind(RoleKind.TEACHER_ENGINE) == plan.of_kind(RoleKind.TEACHER) == ()
    assert plan.teacher_engines == plan.chunks == ()
    assert len(plan.of_kind(RoleKind.STUDENT_ENGINE)) == 1
