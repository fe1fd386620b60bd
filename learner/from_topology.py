"""From a topology to what the learner is told."""

from __future__ import annotations

import dataclasses

from opd_async.config.topology import Topology
from opd_async.learner.config import CriticConfig, LearnerConfig, LossConfig, OptimConfig, ParallelConfig, TeacherConfig
from opd_async.run.checkpoints import shards

FREQUENT = 32
"""So many of the most frequent tokens stand for style, which a hint changes before anything else."""


def learner_config(topology: Topology, vocab: int | None = None) -> LearnerConfig:
    """The learner's part of a topology; `vocab` is that of the plan: ids below it are sampled (None: all)."""
    section, critic, teacher = topology.learner, critic_config(topology), teacher_config(topology)
    return LearnerConfig(
        model_path=topology.models.student.path,
        dtype=section.dtype,
        parallel=parallel_config(topology),
        optim=optim_config(topology, topology.schedule.steps - (critic.only_steps if critic is not None else 0)),
        loss=loss_config(topology),
        logprob_chunk_rows=section.logprob_chunk_rows,
        recompute=section.recompute,
        kernels=section.kernels,
        seed=topology.seed,
        vocab=vocab,
        teacher=teacher,
        reference=reference_config(topology),
        plain_kl_every=topology.opd.plain_kl_every,
        contrast=teacher is not None and topology.data.contrast_prompt is not None,
        frequent_tokens=FREQUENT if topology.opd.use_opd and topology.data.informs_teachers else 0,
        critic=critic,
    )


def parallel_config(topology: Topology) -> ParallelConfig:
    """How the learner's models are split over its ranks."""
    section = topology.learner
    return ParallelConfig(
        tensor=section.tensor_parallel,
        pipeline=section.pipeline_parallel,
        context=section.context_parallel,
        expert=section.expert_parallel,
        timeout_s=topology.supervisor.step_deadline_s,
    )


def optim_config(topology: Topology, steps: int) -> OptimConfig:
    """The optimizer of a model that is trained for so many steps."""
    optimizer = topology.learner.optimizer
    return OptimConfig(
        lr=optimizer.lr,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        warmup_steps=optimizer.warmup_steps,
        total_steps=steps,
        decay=optimizer.decay,
        min_lr_ratio=optimizer.min_lr_ratio,
    )


def loss_config(topology: Topology) -> LossConfig:
    """What the student learns from, and through which ratio."""
    opd, advantage = topology.opd, topology.advantage
    return LossConfig(
        loss=opd.loss if opd.use_opd else "reverse_kl",  # which is nothing but the estimator's part without a teacher
        jsd_beta=opd.jsd_beta,
        kl_coef=opd.kl_coef,
        divergence_clip=opd.divergence_clip,
        clip_ratio=advantage.clip_low if advantage.clip_low is not None else opd.clip_ratio,
        signal_clamp=opd.signal_clamp,
        mismatch=opd.mismatch,
        mismatch_low=opd.mismatch_low,
        mismatch_high=opd.mismatch_high,
        given=opd.gkd_lambda < 1.0,
        ratio=advantage.estimator.facts.ratio,
        clip_high=advantage.clip_high,
        dual_clip=advantage.dual_clip,
        reference_kl_coef=advantage.reference_kl_coef,
        entropy_coef=advantage.entropy_coef,
        function=opd.function,
    )


def teacher_config(topology: Topology) -> TeacherConfig | None:
    """The teacher inside the learner, where the topology has one. Without `models.teacher`, of the student's shape."""
    opd, models = topology.opd, topology.models
    if opd.of_itself and opd.in_learner:
        load = opd.teacher_load or topology.learner.load
        return TeacherConfig(
            model_path=models.student.path,
            load=None if load is None else shards(load, opd.teacher_ckpt_step if opd.teacher_load else None),
            offload=opd.teacher_offload,
            weights=opd.self.weights,
            decay=opd.self.decay,
        )
    if not opd.in_learner or opd.teacher_load is None:
        return None
    shape_of = models.teacher or models.student
    load = shards(opd.teacher_load, opd.teacher_ckpt_step)
    return TeacherConfig(model_path=shape_of.path, load=load, offload=opd.teacher_offload)


def reference_config(topology: Topology) -> TeacherConfig | None:
    """The reference model, where the topology has one: a checkpoint, or what the student begins with."""
    advantage = topology.advantage
    if not advantage.reference_kl_coef:
        return None
    load = advantage.reference_load or topology.learner.load
    # it is needed once in a step: between steps its weights make room
    shape_of = topology.models.student
    return TeacherConfig(model_path=shape_of.path, load=None if load is None else shards(load), offload=True)


def critic_config(topology: Topology) -> CriticConfig | None:
    """The critic, where the estimator needs one: a checkpoint, a folder, or what the student begins with."""
    advantage, critic = topology.advantage, topology.advantage.critic
    if not advantage.estimator.facts.critic:
        return None
    optim = optim_config(topology, topology.schedule.steps)
    load = critic.load or (topology.learner.load if critic.path is None else None)
    return CriticConfig(
        model_path=critic.path or topology.models.student.path,
        load=None if load is None else shards(load),
        optim=optim if critic.lr is None else dataclasses.replace(optim, lr=critic.lr),
        value_clip=critic.value_clip,
        updates=critic.updates,
        only_steps=critic.only_steps,
        gamma=advantage.gamma,
        lam=advantage.lam,
    )
