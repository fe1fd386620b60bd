"""Say what was read of a topology's files, and which sizes were chosen: what `opd check` prints for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from opd_async.config.topology import Topology
from opd_async.data.end_tokens import end_ids
from opd_async.data.hub import named_model
from opd_async.data.model_folder import read_model
from opd_async.data.prompts import PromptSet
from opd_async.data.rows import named
from opd_async.data.tokenizer import Tokenizer
from opd_async.forecast.sizes import Choice, Longest
from opd_async.run.inputs import Inputs

SHOWN = 600
"""Characters of a rendered prompt; longer ones lose their middle."""


def longest_of(topology: Topology, inputs: Inputs) -> Longest:
    """Tokens of the longest prompts that a run will use, those with given responses included."""
    train = _longest(inputs.prompts)
    given = max((len(one.prompt.token_ids) for one in inputs.completions.completions), default=0)
    sets = topology.evaluation_sets
    judged = [(_longest(prompts) or 0, sets[name].max_response_tokens) for name, prompts in inputs.held_out.items()]
    held_out = max(judged, key=sum, default=(0, 0))
    return Longest(None if train is None else max(train, given), held_out, _longest_read(topology, inputs))


def _longest_read(topology: Topology, inputs: Inputs) -> int | None:
    """Tokens of the longest prompt that only a teacher reads; None where a function makes them.

    Of an evaluation set, with what its responses are longer than those of training.
    """
    prompts = [one.prompt for one in inputs.completions.completions]
    given = [ids for prompt in prompts for ids in (prompt.teacher_ids, prompt.contrast_ids)]
    longest = max((len(ids) for ids in given if ids is not None), default=0)
    sets, room = topology.evaluation_sets, topology.rollout.sampling.max_response_tokens
    for name, held_out in inputs.held_out.items():
        if held_out.longest_read:
            longest = max(longest, held_out.longest_read + sets[name].max_response_tokens - room)
    read = inputs.prompts.longest_read
    return None if read is None else max(read, longest)


def _longest(prompts: PromptSet) -> int | None:
    lengths = prompts.lengths()
    return None if lengths is None else int(lengths.max())


def what_was_read(topology: Topology, inputs: Inputs) -> Iterator[str]:
    """Lines about the models, the prompts, the tokens that end a response, and one prompt as both sides read it."""
    yield from _models(topology)
    data = topology.data
    source = f"{data.function}" if data.train is None else named(data.train.path)
    yield f"data.train: {source}: {_in_numbers(inputs.prompts)}"
    for name, one in topology.evaluation_sets.items():
        yield f"{one.key}: {named(one.data.path)}: {_in_numbers(inputs.held_out[name])}; judge {one.judge}"
    if given := inputs.completions.completions:
        yield f"data.completions: {len(given)} given responses, {inputs.completions.skipped_too_long} too long"
    ends = [*end_ids(topology.models.student.path), *topology.rollout.sampling.stop_token_ids]
    tokens = ", ".join(f"{token} {inputs.tokenizer.decode([token], skip_special=False)!r}" for token in ends)
    yield f"a response ends with: {tokens or 'nothing but its limit'}"
    first = inputs.prompts.prompts[0]
    who = "student and teacher read it" if first.teacher_ids is None else "the student reads it"
    yield f"the first prompt, {len(first.token_ids)} tokens, as {who}:"
    yield f"    {_rendered(first.token_ids.tolist(), inputs.tokenizer)!r}"
    for words, ids in (("as its teacher reads it", first.teacher_ids), ("and beside it", first.contrast_ids)):
        if ids is not None:
            yield f"{words}, {len(ids)} tokens:"
            yield f"    {_rendered(ids.tolist(), inputs.tokenizer)!r}"


def _models(topology: Topology) -> Iterator[str]:
    models = topology.models
    named_ones = {"student": models.student, "teacher": models.teacher}
    named_ones |= {f"teachers.{name}": one for name, one in models.teachers.items()}
    for key, one in named_ones.items():
        if one is not None:
            facts = read_model(one.path)
            size = f"{facts.layers} layers, {facts.vocab_size} ids, texts of up to {facts.max_tokens} tokens"
            yield f"models.{key}: {named_model(one.path)}: {size}"


def _in_numbers(prompts: PromptSet) -> str:
    """How many prompts, how long they are, and how many are left out."""
    lengths = prompts.lengths()
    if lengths is None:
        return "read as they are leased"
    median, high = (int(value) for value in np.percentile(lengths, (50, 99), method="higher"))
    spread = f"median {median}, p99 {high}, longest {int(lengths.max())} tokens"
    return f"{len(lengths)} prompts, {spread}; {prompts.skipped_too_long} skipped as too long"


def _rendered(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(token_ids, skip_special=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def what_was_chosen(choices: Sequence[Choice]) -> Iterator[str]:
    """Lines about the sizes that were `auto`, with their reasons; they can be pasted into a topology."""
    if choices:
        yield "sizes that were left open (auto):"
    width = max((len(f"{choice.key}: {choice.value}") for choice in choices), default=0)
    for choice in choices:
        yield f"    {f'{choice.key}: {choice.value}':<{width}}  # {choice.why}"
