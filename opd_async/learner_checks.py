"""Whether the learner's ranks can hold the models: checked before anything starts, each finding with what to write."""

from __future__ import annotations

from collections.abc import Iterator

from opd_async.checkpoints import shards
from opd_async.errors import InputError
from opd_async.model_folder import ModelFacts, try_model
from opd_async.topology import LearnerSection, Topology


def learner_problems(topology: Topology) -> Iterator[str]:
    """Everything in the section `learner` that does not fit the models; opens no weights."""
    learner, context = topology.learner, topology.engines.student.context_tokens
    if learner.micro_batch_tokens < context:
        yield (
            f"learner.micro_batch_tokens: {learner.micro_batch_tokens} cannot hold one sample of "
            f"engines.student.context_tokens {context}; write at least {context}"
        )
    if learner.load is not None:
        try:
            shards(learner.load)
        except InputError as error:
            yield f"learner.load: {error}"
    models = [("student", topology.models.student)]
    if topology.opd.in_learner and topology.models.teacher is not None:
        models.append(("teacher", topology.models.teacher))
    for side, model in models:
        if facts := try_model(model.path):
            yield from _split_problems(side, facts, learner)


def _split_problems(side: str, facts: ModelFacts, learner: LearnerSection) -> Iterator[str]:
    """Sizes of a model that do not divide by the parallel sizes."""
    tensor, pipeline = learner.tensor_parallel, learner.pipeline_parallel
    if facts.heads % tensor:
        yield (
            f"learner.tensor_parallel: {tensor} does not divide the {side}'s {facts.heads} attention heads; "
            f"write {_divisors(facts.heads)}"
        )
    elif facts.kv_heads % tensor:
        yield (
            f"learner.tensor_parallel: {tensor} does not divide the {side}'s {facts.kv_heads} key-value heads; "
            f"write {_divisors(facts.kv_heads)}"
        )
    if facts.layers % pipeline:
        yield (
            f"learner.pipeline_parallel: {pipeline} does not divide the {side}'s {facts.layers} layers; "
            f"write {_divisors(facts.layers)}"
        )


def _divisors(number: int) -> str:
    """The first divisors, for a message: `1, 2, 4 or 8`."""
    divisors = [str(size) for size in range(1, number + 1) if number % size == 0][:6]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]]) if len(divisors) > 1 else divisors[0]
