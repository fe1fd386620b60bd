"""Check that the learner's ranks can hold the models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opd_async.config.topology import LearnerSection, ModelSection, Topology
from opd_async.data.decoder import read_shape
from opd_async.data.decoder_tensors import HEAD, decoder_tensors
from opd_async.data.model_folder import ModelFacts, try_model
from opd_async.data.weight_files import file_problems, tensor_problems
from opd_async.errors import InputError
from opd_async.run.checkpoints import shards


def learner_problems(topology: Topology) -> Iterator[str]:
    """List every value of the section `learner` that does not fit the models; opens the headers of weights only."""
    learner, context = topology.learner, topology.engines.student.context_tokens
    if learner.micro_batch_tokens < context:
        yield (
            f"learner.micro_batch_tokens: {learner.micro_batch_tokens} cannot hold one sample of "
            f"engines.student.context_tokens {context}; write at least {context}"
        )
    if learner.data_parallel % (intakes := topology.intake.replicas):
        yield (
            f"intake.replicas: {intakes} does not divide learner.data_parallel {learner.data_parallel}, whose ranks "
            f"they share out; write {_divisors(learner.data_parallel)}"
        )
    if learner.load is not None:
        try:
            shards(learner.load, thorough=True)
        except InputError as error:
            yield f"learner.load: {error}"
    models = [("student", topology.models.student)]
    if topology.opd.in_learner and topology.models.teacher is not None:
        models.append(("teacher", topology.models.teacher))
    if topology.advantage.estimator.facts.critic and (critic := topology.advantage.critic.path) is not None:
        models.append(("critic", ModelSection(path=critic)))
    known = [(side, facts) for side, model in models if (facts := try_model(model.path))]
    for side, facts in known:
        yield from _split_problems(side, facts, learner)
    for side, model in models:
        if try_model(model.path) and not file_problems(model.path):  # else that is reported already
            key = "advantage.critic.path" if side == "critic" else f"models.{side}.path"
            yield from (f"{key}: {problem}" for problem in _decoder_problems(model.path, side))
    if learner.expert_parallel > 1 and known:
        yield from _expert_problems([(side, facts.experts) for side, facts in known if facts.has_experts], learner)


def _decoder_problems(folder: Path, side: str) -> list[str]:
    """List why the learner would not load the model: by config, or by weights (a teacher's come from elsewhere)."""
    try:
        shape = read_shape(folder)
    except InputError as error:
        return [str(error)]
    if side == "teacher":
        return []
    return tensor_problems(folder, decoder_tensors(shape), {HEAD} if shape.tied or side == "critic" else ())


def _expert_problems(experts: list[tuple[str, int]], learner: LearnerSection) -> Iterator[str]:
    """List what does not fit the experts; `experts` has their number for each model that is a mixture of experts."""
    size, sharing = learner.expert_parallel, learner.ranks // learner.pipeline_parallel
    if not experts:
        yield f"learner.expert_parallel: {size}, but no model in the learner is a mixture of experts; write 1"
    for side, count in experts:
        if count % size:
            fitting = _divisors(count)
            yield f"learner.expert_parallel: {size} does not divide the {side}'s {count} experts; write {fitting}"
    if experts and sharing % size:
        yield (
            f"learner.expert_parallel: {size} does not divide the {sharing} ranks of a pipeline stage, which share the "
            f"experts out; write {_divisors(sharing)}"
        )


def _split_problems(side: str, facts: ModelFacts, learner: LearnerSection) -> Iterator[str]:
    """List the sizes of a model that do not divide by the parallel sizes."""
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
    """Write the first divisors for a message, as in `1, 2, 4 or 8`."""
    divisors = [str(size) for size in range(1, number + 1) if number % size == 0][:6]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]]) if len(divisors) > 1 else divisors[0]
