"""From the topology to the loss: who learns from what, and through which clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_async.config.topology import Topology
from opd_async.learner.config import LossConfig
from opd_async.learner.from_topology import critic_config, learner_config, loss_config, reference_config


def topology(**sections: dict[str, Any]) -> Topology:
    least = {
        "name": "x",
        "models": {"student": {"path": Path("s")}},
        "data": {"train": {"path": Path("p")}},
        "schedule": {"steps": 1},
    }
    return Topology.model_validate(least | sections)


def config(**sections: dict[str, Any]) -> LossConfig:
    return loss_config(topology(**sections))


def test_distillation_alone_is_the_default() -> None:
    assert config() == LossConfig()
    assert config(opd={"loss": "jsd_topk", "kl_coef": 0.5, "clip_ratio": None}).loss == "jsd_topk"


def test_without_a_teacher_no_loss_is_left_that_would_need_one() -> None:
    assert config(opd={"use_opd": False, "loss": "forward_kl_topk"}).loss == "reverse_kl"


@pytest.mark.parametrize(
    ("estimator", "ratio"),
    [
        ("none", "token"),
        ("grpo", "token"),
        ("gspo", "sequence"),
        ("cispo", "truncated"),
        ("reinforce_plus_plus", "token"),
        ("ppo", "token"),
    ],
)
def test_the_estimator_chooses_the_ratio(estimator: str, ratio: str) -> None:
    assert config(advantage={"estimator": estimator}).ratio == ratio


def test_the_clip_of_the_advantage_wins_over_that_of_the_distillation() -> None:
    found = config(advantage={"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": 3.0, "entropy_coef": 0.01})
    assert (found.clip_ratio, found.clip_high, found.dual_clip, found.entropy_coef) == (3e-4, 4e-4, 3.0, 0.01)
    assert (config().clip_ratio, config().clip_high) == (0.2, None)
    found = config(opd={"clip_ratio": None}, advantage={"clip_high": 0.28})
    assert (found.clip_ratio, found.clip_high) == (None, 0.28)


def test_the_reference_is_what_the_student_begins_with() -> None:
    assert reference_config(topology()) is None
    found = reference_config(topology(advantage={"reference_kl_coef": 0.1}))
    assert found is not None and (found.model_path, found.load) == (Path("s"), None)
    assert config(advantage={"reference_kl_coef": 0.1}).reference_kl_coef == 0.1


def test_the_critic_is_what_the_student_begins_with_and_has_the_same_optimizer() -> None:
    assert critic_config(topology(advantage={"estimator": "grpo"})) is None
    schedule, optimizer = {"steps": 100}, {"optimizer": {"lr": 1e-4, "warmup_steps": 3}}
    ppo = {"estimator": "ppo", "gamma": 0.9, "lam": 0.8, "critic": {"only_steps": 10}}
    whole = learner_config(topology(advantage=ppo, schedule=schedule, learner=optimizer))
    found = whole.critic
    assert found is not None and (found.model_path, found.load) == (Path("s"), None)
    assert (found.gamma, found.lam, found.value_clip, found.updates, found.only_steps) == (0.9, 0.8, 0.2, 1, 10)
    assert (found.optim.lr, found.optim.warmup_steps, found.optim.total_steps) == (1e-4, 3, 100)
    assert whole.optim.total_steps == 90  # the student's schedule begins when it does
    other = critic_config(topology(advantage=ppo | {"critic": {"lr": 1e-3, "path": "c"}}, learner=optimizer))
    assert other is not None and (other.optim.lr, other.optim.warmup_steps, other.model_path) == (1e-3, 3, Path("c"))
