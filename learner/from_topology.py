"""From a topology to what the learner is told."""

from __future__ import annotations

import dataclasses

from opd_async.config.topology import Topology
from opd_async.learner.config import CriticConfig, LearnerConfig, LossConfig, OptimConfig, ParallelConfig, TeacherConfig
from opd_async.run.checkpoints import shards


def learner_config(topology: Topology) -> LearnerConfig:
    """The learner's part of a topology."""
    section, critic = topology.learner, critic_config(topology)
    return LearnerConfig(
        topology.models.student.path,
        section.dtype,
        ParallelConfig(
            section.tensor_parallel,
            section.pipeline_parallel,
            section.context_parallel,
            section.expert_parallel,
            topology.supervisor.step_deadline_s,
        ),
        optim_config(topology, topology.schedule.steps - (critic.only_steps if critic is not None else 0)),
        loss_config(topology),
        section.logprob_chunk_rows,
        section.recompute,
        topology.seed,
        teacher_config(topology),
        reference_config(topology),
        critic,
    )


def optim_config(topology: Topology, steps: int) -> OptimConfig:
    """The optimizer of a model that is trained for so many steps."""
    optimizer = topology.learner.optimizer
    return OptimConfig(
        optimizer.lr,
        optimizer.beta1,
        optimizer.beta2,
        optimizer.eps,
        optimizer.weight_decay,
        optimizer.clip_grad,
        optimizer.warmup_steps,
        steps,
        optimizer.decay,
        optimizer.min_lr_ratio,
    )


def loss_config(topology: Topology) -> LossConfig:
    """What the student learns from, and through which ratio."""
    opd, advantage = topology.opd, topology.advantage
    return LossConfig(
        opd.loss if opd.use_opd else "reverse_kl",  # which is nothing but the estimator's part without a teacher
        opd.jsd_beta,
        opd.kl_coef,
        advantage.clip_low if advantage.clip_low is not None else opd.clip_ratio,
        opd.signal_clamp,
        opd.mismatch,
        ratio=advantage.estimator.facts.ratio,
        clip_high=advantage.clip_high,
        dual_clip=advantage.dual_clip,
        reference_kl_coef=advantage.reference_kl_coef,
        entropy_coef=advantage.entropy_coef,
    )


def teacher_config(topology: Topology) -> TeacherConfig | None:
    """The teacher inside the learner, where the topology has one. Without `models.teacher`, of the student's shape."""
    opd, models = topology.opd, topology.models
    if not opd.in_learner or opd.teacher_load is None:
        return None
    shape_of = models.teacher or models.student
    return TeacherConfig(shape_of.path, shards(opd.teacher_load, opd.teacher_ckpt_step), opd.teacher_offload)


def reference_config(topology: Topology) -> TeacherConfig | None:
    """The reference model, where the topology has one: a checkpoint, or what the student begins with."""
    advantage = topology.advantage
    if not advantage.reference_kl_coef:
        return None
    load = advantage.reference_load or topology.learner.load
    # it is needed once in a step: between steps its weights make room
    return TeacherConfig(topology.models.student.path, None if load is None else shards(load), offload=True)


def critic_config(topology: Topology) -> CriticConfig | None:
    """The critic, where the estimator needs one: a checkpoint, a folder, or what the student begins with."""
    advantage, critic = topology.advantage, topology.advantage.critic
    if not advantage.estimator.facts.critic:
        return None
    optim = optim_config(topology, topology.schedule.steps)
    load = critic.load or (topology.learner.load if critic.path is None else None)
    return CriticConfig(
        critic.path or topology.models.student.path,
        None if load is None else shards(load),
        optim if critic.lr is None else dataclasses.replace(optim, lr=critic.lr),
        critic.value_clip,
        critic.updates,
        critic.only_steps,
        advantage.gamma,
        advantage.lam,
    )
