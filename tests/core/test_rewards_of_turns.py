"""What turns of an episode have earned, laid on tokens by the intake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import small_topology
from taken_samples import taken

from opd_async.actors.intake.steps import Taken, give_advantages
from opd_async.config.topology import Topology


def ppo(root: Path) -> Topology:
    """A run whose learner makes the advantages."""
    return small_topology(root, "advantage.estimator=ppo", "schedule.train_on=samples", "reward.kind=exact_match")


def laid_out(one: Taken, topology: Topology) -> list[float]:
    """What is earned with each trained token."""
    give_advantages([one], topology)
    assert one.segment is not None and one.segment.rewards is not None
    return one.segment.rewards.tolist()


def test_a_turns_reward_is_at_its_last_token_and_the_rest_at_the_end(tmp_path: Path) -> None:
    topology, one = ppo(tmp_path), taken(3, 0, 6)._replace(reward=1.0)
    assert laid_out(one, topology) == [0, 0, 0, 0, 0, 1]
    assert laid_out(one._replace(turns=((2, 0.25), (4, 0.5))), topology) == [0, 0.25, 0, 0.5, 0, 0.25]
    assert laid_out(one._replace(turns=((6, 3.0),)), topology) == [0, 0, 0, 0, 0, 1]
    assert np.isnan(laid_out(one._replace(reward=None), topology)).all()
    assert one.segment is not None
    # positions 2 and 3 were given: a turn that ends before them ends at position 2
    spans = replace(one.segment, positions=np.array([0, 1, 4, 5], np.int32), behaviour_logprobs=np.zeros(4, np.float32))
    assert laid_out(one._replace(segment=spans, turns=((2, 0.25), (5, 0.5))), topology) == [0, 0.25, 0.5, 0.25]
    # nobody was there: what cannot be is not lost
    assert laid_out(one._replace(segment=spans, turns=((0, 0.5), (99, 0.25))), topology) == [0.5, 0, 0, 0.5]


def test_estimators_of_the_intake_see_the_sum(tmp_path: Path) -> None:
    topology = small_topology(
        tmp_path, "advantage.estimator=grpo", "schedule.train_on=samples", "rollout.group_size=2", "reward.kind=math"
    )
    good, bad = taken(2, 0, 2)._replace(reward=1.0, turns=((1, 0.75),)), taken(3, 0, 3)._replace(reward=0.0)
    give_advantages([good, bad], topology)
    assert good.segment is not None and good.segment.rewards is None
    assert good.segment.advantages is not None and good.segment.advantages.tolist() == pytest.approx(
        [0.7071, 0.7071], abs=1e-3
    )
