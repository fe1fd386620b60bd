"""Check that an advantage estimator gets what it needs: rewards, whole responses, whole groups."""

from __future__ import annotations

from collections.abc import Iterator

from opd_async.config.estimators import Estimator
from opd_async.config.learning import CriticSection
from opd_async.config.losses import FULL_LOSSES
from opd_async.config.rewards import RewardKind
from opd_async.config.topology import Topology, TrainOn
from opd_async.data.model_folder import folder_problems
from opd_async.errors import InputError
from opd_async.run.checkpoints import shards

WIDE_SEQUENCE_CLIP = 0.01
"""A clip of GSPO's ratio that is wider hardly ever acts."""


def advantage_problems(topology: Topology) -> Iterator[str]:
    """List every reason why the student could not learn from its rewards as `advantage` says."""
    section, estimator = topology.advantage, topology.advantage.estimator
    yield from _reference_problems(topology)
    yield from _critic_problems(topology)
    if topology.learner.loss_mean == "responses" and topology.schedule.train_on is TrainOn.TOKENS:
        yield "learner.loss_mean: responses, but steps take parts of them (schedule.train_on: tokens); write tokens"
    if not estimator.facts.rewards:
        if not topology.opd.use_opd:
            yield (
                "opd.use_opd: false, and advantage.estimator is none: there is nothing to learn from; write an "
                "estimator and a reward, or use_opd: true"
            )
        return
    if topology.reward.kind is RewardKind.NONE:
        yield f"advantage.estimator: {estimator} needs rewards, and there are none; write reward.kind"
    if topology.schedule.train_on is TrainOn.TOKENS:
        yield f"schedule.train_on: tokens, but {_why_samples(estimator)}; write samples"
    if estimator.facts.groups and topology.rollout.group_size == 1:
        yield (
            f"rollout.group_size: 1, but {estimator} compares the responses to one prompt with one another: with one "
            "sample per prompt every advantage is zero; write 2 or more, or the estimator reinforce_plus_plus or ppo"
        )
    if section.gamma != 1.0 and not estimator.facts.discounts:
        yield f"advantage.gamma: {section.gamma:g}, but {estimator} does not discount; write 1"
    if section.dual_clip is not None and estimator.facts.ratio == "truncated":
        yield f"advantage.dual_clip: {estimator} truncates the ratio on both sides already; write null"
    if topology.opd.mismatch == "tis" and estimator.facts.ratio != "token":
        yield f"opd.mismatch: tis truncates a token's ratio, and {estimator} does not use it; write none or icepop"
    if section.entropy_coef and topology.opd.use_opd and topology.opd.loss in FULL_LOSSES:
        yield f"advantage.entropy_coef: not with opd.loss {topology.opd.loss}; write 0, or another loss"


def _reference_problems(topology: Topology) -> Iterator[str]:
    section = topology.advantage
    if section.reference_load is None:
        return
    if not section.reference_kl_coef:
        yield "advantage.reference_load: given, but advantage.reference_kl_coef is 0; remove it, or write a coefficient"
    try:
        shards(section.reference_load, thorough=True)
    except InputError as error:
        yield f"advantage.reference_load: {error}"


def _critic_problems(topology: Topology) -> Iterator[str]:
    section, critic = topology.advantage, topology.advantage.critic
    if not section.estimator.facts.critic:
        if critic != CriticSection():  # a run's saved topology has every key
            yield f"advantage.critic: given, but {section.estimator} has no critic; remove it, or write estimator: ppo"
        if section.lam != 1.0:
            yield f"advantage.lam: {section.lam:g}, but {section.estimator} has no critic; write 1, or estimator: ppo"
        return
    if critic.load is not None:
        try:
            shards(critic.load, thorough=True)
        except InputError as error:
            yield f"advantage.critic.load: {error}"
    if critic.path is None:
        return
    yield from (f"advantage.critic.path: {problem}" for problem in folder_problems(critic.path))


def _why_samples(estimator: Estimator) -> str:
    if estimator.facts.critic:
        return (
            f"{estimator} weighs a token by what followed it until the reward, which is known when its response ended"
        )
    if estimator.facts.groups:
        return (
            f"{estimator} weighs a token by the rewards of its whole group, which are known when every response of the "
            "group has ended"
        )
    return f"{estimator} weighs a token by the reward of its response, which is known when that has ended"


def advantage_warnings(topology: Topology) -> Iterator[str]:
    """List the settings that an estimator allows but that are probably a mistake."""
    section = topology.advantage
    clip = section.clip_low if section.clip_low is not None else topology.opd.clip_ratio
    if section.estimator.facts.ratio == "sequence" and clip is not None and clip > WIDE_SEQUENCE_CLIP:
        yield (
            f"advantage.clip_low: {clip:g}, but {section.estimator}'s ratio is a geometric mean over a response and "
            "hardly leaves 1; write 3.0e-4, and clip_high: 4.0e-4"
        )
    critic = section.critic
    if section.estimator.facts.critic and critic.only_steps >= topology.schedule.steps:
        yield (
            f"advantage.critic.only_steps: {critic.only_steps} of {topology.schedule.steps} steps, so the student is "
            f"never trained; write less than {topology.schedule.steps}"
        )
    if critic.value_clip not in (None, CriticSection().value_clip) and critic.updates == 1:
        yield (
            f"advantage.critic.value_clip: {critic.value_clip:g}, but with one update per step no value has moved "
            "since the step began; write advantage.critic.updates: 2 or more, or null"
        )
    unused = not section.estimator.facts.rewards and not any(
        one.judge == "reward" for one in topology.evaluation_sets.values()
    )
    if topology.reward.kind is not RewardKind.NONE and unused:
        yield "reward.kind: rewards are computed and reported, and nothing learns from them; write advantage.estimator"
