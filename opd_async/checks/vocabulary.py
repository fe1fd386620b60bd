"""Check that an id which the student can sample stands for the same token everywhere, and that every model has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from opd_async.config.topology import ModelSection, Topology
from opd_async.data.decoder_tensors import EMBEDDING
from opd_async.data.model_folder import ModelFacts, try_model
from opd_async.data.tokenizer import Tokenizer
from opd_async.data.vocabulary import Difference, allowance, describe, differences, read_tables
from opd_async.data.weight_files import stored_tensors
from opd_async.errors import InputError

STUDENT = "models.student.path"


def taking_part(topology: Topology) -> tuple[tuple[str, ModelSection], ...]:
    """List the models that take part, by key below `models`: the student first, then teachers.

    A teacher inside the learner needs no Hugging Face folder.
    """
    models = topology.models
    teachers = [(f"teachers.{name}", model) for name, model in models.teachers.items()]
    if models.teacher is not None:
        teachers.insert(0, ("teacher", models.teacher))
    return (("student", models.student), *(teachers if topology.opd.use_opd else ()))


def vocabulary_problems(topology: Topology) -> Iterator[str]:
    """List where tokenizers and tables do not fit each other; of folders that cannot be read, only what can be."""
    models = [(f"models.{side}.path", model.path) for side, model in taking_part(topology)]
    critic = topology.advantage.critic.path if topology.advantage.estimator.facts.critic else None
    models += [("advantage.critic.path", critic)] if critic is not None else []
    facts = {key: found for key, folder in models if (found := try_model(folder))}
    tokenizers: dict[str, Tokenizer] = {}
    for key, folder in models:
        if (folder / "tokenizer.json").is_file():
            try:
                tokenizers[key] = Tokenizer(folder, topology.data.chat_template if key == STUDENT else None)
            except InputError as error:
                # A missing template file is reported under data.chat_template already.
                if not str(error).startswith("data.chat_template"):
                    yield f"{key}: {error}"
    for key, folder in models[1:]:  # the learner looks at every tensor of the student
        yield from (f"{key}: {problem}" for problem in _table_problems(folder, facts.get(key)))
    if STUDENT not in facts:
        return
    own, shared, accepted = facts[STUDENT], read_tables(topology).shared, topology.models.allow_token_differences
    student = tokenizers.pop(STUDENT, None)
    if student and (unused := student.template.unused(sorted(topology.data.chat_template_kwargs))):
        yield (
            f"data.chat_template_kwargs: {', '.join(unused)}, which the student's chat template does not use; correct "
            "the name, or remove it"
        )
    if student and student.vocab_size > own.vocab_size:
        yield (
            f"{STUDENT}: tokenizer.json has ids up to {student.vocab_size - 1}, config.json has vocab_size "
            f"{own.vocab_size}; use the tokenizer that belongs to the model"
        )
    for key, other in tokenizers.items():
        if student and key in facts:
            rows = min(own.vocab_size, facts[key].vocab_size)
            yield from _differences(key, differences(student, other, rows, accepted))
    yield from _short_critic(facts.get("advantage.critic.path"), shared)
    yield from _end_problems(topology, own, shared)


def _table_problems(folder: Path, facts: ModelFacts | None) -> Iterator[str]:
    """Compare the rows that `config.json` promises with those of the embedding, where that has its usual name."""
    try:
        stored = stored_tensors(folder).get(EMBEDDING)
    except InputError:
        return  # reported with the folder
    if facts and stored and stored.shape[:1] != (facts.vocab_size,):
        yield (
            f"{folder}: {EMBEDDING} has {stored.shape[0]} rows, config.json has vocab_size {facts.vocab_size}; give "
            "the config that belongs to the weights"
        )


def _differences(key: str, found: Sequence[Difference]) -> Iterator[str]:
    """Name the ids with other tokens at one model that the topology does not allow."""
    if found:
        yield (
            f"{key}: tokens differ from the student's at {len(found)} ids: {describe(found)}; choose a model with "
            "the student's tokens, or, where these ids may be taken for what they are there, write "
            f"models.allow_token_differences: {allowance(found)}"
        )


def _short_critic(critic: ModelFacts | None, shared: int) -> Iterator[str]:
    """A critic reads every sampled id, but it does not say what may be sampled."""
    if critic and critic.vocab_size < shared:
        yield (
            f"advantage.critic.path: vocab_size {critic.vocab_size} in its config.json, but ids up to {shared - 1} are "
            f"sampled; choose a model with at least {shared} rows"
        )


def _end_problems(topology: Topology, student: ModelFacts, shared: int) -> Iterator[str]:
    """List ids that are to end a response and that are never sampled, because a table has no row for them."""
    outside = [token for token in topology.rollout.sampling.stop_token_ids if token >= shared]
    if outside:
        yield f"rollout.sampling.stop_token_ids: {outside} not in the vocabulary; write ids below {shared}"
    beyond = [token for token in student.eos_token_ids if shared <= token < student.vocab_size]
    if beyond:
        yield (
            f"{STUDENT}: its responses end with {beyond}, but a teacher's table has {shared} rows, so that it could "
            "not score them; choose a teacher with a row for every token of the student"
        )
