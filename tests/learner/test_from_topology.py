"""Every key of a topology that the learner is told of arrives where it belongs: each has a value of its own here."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from opd_async.config.topology import Topology
from opd_async.learner.config import CriticConfig, LearnerConfig, LossConfig, OptimConfig, ParallelConfig, TeacherConfig
from opd_async.learner.from_topology import learner_config

OPTIMIZER = {
    "lr": 0.0123,
    "beta1": 0.71,
    "beta2": 0.83,
    "eps": 3e-5,
    "weight_decay": 0.37,
    "clip_grad": 4.5,
    "warmup_steps": 7,
    "decay": "cosine",
    "min_lr_ratio": 0.29,
}
OPD = {
    "loss": "jsd_full",
    "jsd_beta": 0.31,
    "kl_coef": 0.57,
    "clip_ratio": 0.13,
    "signal_clamp": 6.5,
    "mismatch": "icepop",
    "mismatch_low": 0.41,
    "mismatch_high": 3.7,
    "gkd_lambda": 0.9,
    "divergence_clip": 0.77,
    "plain_kl_every": 6,
}


def checkpoint(folder: Path) -> Path:
    """Looks like Megatron's files."""
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "common.pt").touch()
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: checkpoint(tmp_path / name) for name in ("teacher", "student", "reference", "critic")}


def topology(folders: dict[str, Path], **sections: dict[str, Any]) -> Topology:
    whole: dict[str, Any] = {
        "name": "x",
        "seed": 91,
        "models": {"student": {"path": Path("s")}, "teacher": {"path": Path("t")}},
        "data": {"train": {"path": Path("p")}, "privileged_key": "solution", "contrast_prompt": "wrong"},
        "schedule": {"steps": 100},
        "opd": OPD | {"use_opd": True, "type": "megatron", "teacher_load": folders["teacher"], "teacher_offload": True},
        "advantage": {
            "estimator": "ppo",
            "gamma": 0.97,
            "lam": 0.88,
            "clip_low": 0.17,
            "clip_high": 0.23,
            "dual_clip": 5.0,
            "reference_kl_coef": 0.19,
            "reference_load": folders["reference"],
            "entropy_coef": 0.011,
            "critic": {
                "path": Path("c"),
                "load": folders["critic"],
                "lr": 0.0456,
                "value_clip": 0.61,
                "updates": 3,
                "only_steps": 11,
            },
        },
        "learner": {
            "load": folders["student"],
            "dtype": "bfloat16",
            "tensor_parallel": 2,
            "pipeline_parallel": 3,
            "context_parallel": 4,
            "expert_parallel": 5,
            "logprob_chunk_rows": 77,
            "recompute": True,
            "kernels": "liger",
            "optimizer": OPTIMIZER,
        },
        "supervisor": {"step_deadline_s": 321.0},
    }
    return Topology.model_validate(whole | sections)


def test_every_field_has_the_value_of_its_key(folders: dict[str, Path]) -> None:
    optim = OptimConfig(**(OPTIMIZER | {"total_steps": 89}))
    loss = dict(OPD)
    del loss["gkd_lambda"], loss["plain_kl_every"]
    wanted = LearnerConfig(
        model_path=Path("s"),
        dtype="bfloat16",
        parallel=ParallelConfig(tensor=2, pipeline=3, context=4, expert=5, timeout_s=321.0),
        optim=optim,
        loss=LossConfig(
            **(
                loss
                | {
                    "clip_ratio": 0.17,
                    "clip_high": 0.23,
                    "dual_clip": 5.0,
                    "given": True,
                    "reference_kl_coef": 0.19,
                    "entropy_coef": 0.011,
                }
            ),
        ),
        logprob_chunk_rows=77,
        recompute=True,
        kernels="liger",
        seed=91,
        teacher=TeacherConfig(model_path=Path("t"), load=folders["teacher"], offload=True),
        reference=TeacherConfig(model_path=Path("s"), load=folders["reference"], offload=True),
        critic=CriticConfig(
            model_path=Path("c"),
            load=folders["critic"],
            optim=dataclasses.replace(optim, lr=0.0456, total_steps=100),
            value_clip=0.61,
            updates=3,
            only_steps=11,
            gamma=0.97,
            lam=0.88,
        ),
        plain_kl_every=6,
        contrast=True,
        frequent_tokens=32,
        vocab=31,
    )
    found = learner_config(topology(folders), 31)
    assert found == wanted
    assert [f"{where}.{name}" for where, name in unvaried(found)] == [
        "LossConfig.ratio",  # see the next test
        "LossConfig.function",  # a hook, see test_own_loss.py
        *(["TeacherConfig.weights", "TeacherConfig.decay"] * 2),  # of a student that teaches itself, see below
    ]


def unvaried(config: Any) -> list[tuple[str, str]]:
    """Fields that still have their default: what is compared of them says nothing."""
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += unvaried(value)
        elif field.default is not dataclasses.MISSING and value == field.default:
            found.append((type(config).__name__, field.name))
    return found


@pytest.mark.parametrize(("estimator", "ratio"), [("gspo", "sequence"), ("cispo", "truncated"), ("grpo", "token")])
def test_the_ratio_is_that_of_the_estimator(folders: dict[str, Path], estimator: str, ratio: str) -> None:
    found = learner_config(topology(folders, advantage={"estimator": estimator}))
    assert (found.loss.ratio, found.critic, found.reference) == (ratio, None, None)
    assert found.optim.total_steps == 100
    assert (found.loss.clip_ratio, found.loss.clip_high) == (0.13, None)


def test_what_the_student_begins_with_is_what_others_begin_with(folders: dict[str, Path]) -> None:
    """Without weights of their own, critic and reference take the student's checkpoint; a critic may have a folder."""
    plain = {"estimator": "ppo", "reference_kl_coef": 0.5}
    found = learner_config(topology(folders, advantage=plain))
    assert found.critic is not None and found.reference is not None
    assert (found.critic.model_path, found.critic.load) == (Path("s"), folders["student"])
    assert (found.critic.optim.lr, found.critic.value_clip, found.critic.updates) == (0.0123, 0.2, 1)
    assert (found.reference.load, found.reference.offload) == (folders["student"], True)
    found = learner_config(topology(folders, advantage=plain | {"critic": {"path": Path("c")}}))
    assert found.critic is not None and (found.critic.model_path, found.critic.load) == (Path("c"), None)
    found = learner_config(topology(folders, advantage=plain, learner={}))
    assert found.critic is not None and found.reference is not None
    assert found.critic.load is found.reference.load is None


def test_a_teacher_is_in_the_learner_only_where_the_topology_says_so(folders: dict[str, Path]) -> None:
    inside = {"use_opd": True, "type": "megatron", "teacher_load": folders["teacher"]}
    found = learner_config(topology(folders, opd=inside, models={"student": {"path": Path("s")}})).teacher
    assert found == TeacherConfig(model_path=Path("s"), load=folders["teacher"], offload=False)
    for opd in (inside | {"type": "sglang"}, inside | {"use_opd": False}, inside | {"teacher_load": None}):
        found = learner_config(topology(folders, opd=opd))
        assert found.teacher is None and not found.contrast
    assert learner_config(topology(folders, opd=inside)).loss.given is False


@pytest.mark.parametrize("weights", ["frozen", "live", "ema"])
def test_the_student_teaches_itself_from_where_it_begins(folders: dict[str, Path], weights: str) -> None:
    alone = {"student": {"path": Path("s")}}
    own = {"type": "self", "self": {"weights": weights, "decay": 0.4}, "teacher_offload": True}
    expected = TeacherConfig(model_path=Path("s"), load=folders["student"], offload=True, weights=weights, decay=0.4)
    assert learner_config(topology(folders, opd=own, models=alone)).teacher == expected
    elsewhere = own | {"teacher_load": folders["teacher"]}
    found = learner_config(topology(folders, opd=elsewhere, models=alone))
    assert found.teacher == dataclasses.replace(expected, load=folders["teacher"])
    first = learner_config(topology(folders, opd=own, models=alone, learner={})).teacher
    assert first == dataclasses.replace(expected, load=None)
    engines = own | {"self": {"place": "engines"}}
    assert learner_config(topology(folders, opd=engines, models=alone)).teacher is None
    plain = topology(folders, data={"train": {"path": Path("p")}})
    assert learner_config(plain).frequent_tokens == 0
