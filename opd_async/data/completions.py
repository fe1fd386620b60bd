"""Responses that a data set gives, mixed with those that the student generates: GKD's lambda (2306.13649).

    sample n -> Mix -> None: the student generates                 a share `opd.gkd_lambda` of the samples
                    -> a Completion: prompt and response are given

The mix is a pure function of the sample's number and the seed, so that a resumed run mixes as the first one did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_async.config.topology import CompletionsSection, PromptsSection
from opd_async.data.messages import NO_OPTIONS, ChatOptions
from opd_async.data.prompts import Prompt, TeacherChoice, load_prompts
from opd_async.data.rows import RowError, named
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.scheduling.leases import PromptOrder
from opd_async.transport.step_batch import Int32Array


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its response int32[n], the token that ends it included."""

    prompt: Prompt
    response: Int32Array


@dataclass(frozen=True, slots=True)
class CompletionSet:
    """The usable rows of a file, and the number of rows that were longer than allowed."""

    completions: tuple[Completion, ...] = ()
    skipped_too_long: int = 0


class Mix:
    """Chooses which samples are given, and which completion each of these is."""

    def __init__(self, completions: Sequence[Completion], share: float, seed: int, shuffle: bool) -> None:
        """Generate a `share` (0 to 1) of the samples, evenly spread; the others cycle through `completions`."""
        self._completions = completions
        self._share = share
        self._order = PromptOrder(max(1, len(completions)), 1, seed, shuffle)

    def of(self, sample_id: int) -> Completion | None:
        """Return the completion of sample `sample_id`; None if the student generates it."""
        before, after = math.floor(sample_id * self._share), math.floor((sample_id + 1) * self._share)
        if after > before or not self._completions:
            return None
        return self._completions[self._order.prompt_of(sample_id - before)]


def load_completions(
    section: CompletionsSection,
    tokenizer: Tokenizer,
    limits: tuple[int, int],
    end_ids: tuple[int, ...],
    teachers: TeacherChoice,
    chats: ChatOptions = NO_OPTIONS,
) -> CompletionSet:
    """Read and tokenize prompts with responses; `limits` are the most tokens of a prompt and of a response.

    A response that does not end with one of `end_ids` is given the tokenizer's own end, or else the first of them.
    Raises `InputError` as `load_prompts` does, for a row without a response, and when nothing is short enough.
    """
    source = PromptsSection(
        path=section.path,
        prompt_key=section.prompt_key,
        label_key=section.completion_key,
        metadata_key=section.metadata_key,
        tools_key=section.tools_key,
    )
    prompts = load_prompts(source, tokenizer, limits[0], teachers, chats, answers=True)
    where = named(section.path)
    if empty := [prompt.prompt_id for prompt in prompts.prompts if not prompt.label]:
        raise InputError(
            f"{where}: {len(empty)} rows have no text under {section.completion_key!r}, the first is row "
            f"{empty[0] + 1}; write the response, or set completion_key"
        )
    end = tokenizer.end_id if tokenizer.end_id in end_ids else min(end_ids, default=None)
    encoded = tokenizer.encode_batch([prompt.label for prompt in prompts.prompts], add_special_tokens=False)
    found = []
    for prompt, ids in zip(prompts.prompts, encoded, strict=True):
        whole = ids if end is None or (ids and ids[-1] in end_ids) else [*ids, end]
        try:
            teachers.check("the response", whole)
        except RowError as error:
            raise InputError(f"{where}: row {prompt.prompt_id + 1}: {error}") from None
        if len(whole) <= limits[1]:
            found.append(Completion(prompt, np.asarray(whole, np.int32)))
    if not found:
        raise InputError(
            f"{where}: no response has at most {limits[1]} tokens; raise rollout.sampling.max_response_tokens"
        )
    return CompletionSet(tuple(found), prompts.skipped_too_long + len(prompts.prompts) - len(found))
