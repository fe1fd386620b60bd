"""Check a topology and the files that it names, and report every finding at once, with its line.

    file -> schema -> sizes -> checks of models, devices, ports, rewards -> prompts, completions -> sizes -> the result
               |                                                     |                        |
               +--------------------- findings ----------------------+------------------------+---> one InputError

A key that the schema refuses does not stop the other checks. They see the key's default in its place, and their
findings about this key are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from opd_async.checks.data_sets import with_data_here
from opd_async.checks.findings import longest_of, what_was_chosen, what_was_read
from opd_async.checks.models import with_models_here
from opd_async.checks.reward import require_labels
from opd_async.checks.teacher import teacher_limits
from opd_async.checks.validation import validate, warnings
from opd_async.cluster.allocation import with_allocation
from opd_async.config.topology import PromptsSection, Topology
from opd_async.config.topology_file import TopologySource, list_problems, load_topology, read_topology
from opd_async.data.completions import CompletionSet, load_completions
from opd_async.data.messages import ChatOptions
from opd_async.data.model_folder import read_model
from opd_async.data.own_prompts import KEY, SECTION, OwnPrompts
from opd_async.data.prompts import PromptSet, Reading, TeacherChoice, load_prompts
from opd_async.data.rows import named
from opd_async.data.teacher_prompts import TeacherPrompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.data.vocabulary import read_tables
from opd_async.errors import InputError
from opd_async.forecast.sizes import fitted
from opd_async.hooks import HookError
from opd_async.run.inputs import Inputs

Say = Callable[[str], None]
"""Print a line."""
_ANY_LENGTH = 2**31
_LENGTH_KEYS = ("engines.student.context_tokens", "max_response_tokens")
_Found = TypeVar("_Found")


def examine(path: Path, overrides: Collection[str], say: Say, *, details: bool = False) -> tuple[Topology, Inputs]:
    """Read and check a topology file; returns the topology and the data that it names. `say` gets the warnings.

    In the topology that is returned every size that was `auto` is chosen. `say` also hears how many prompts were
    skipped; with `details` it hears what was read, and each size that was chosen with its reason. Raises `InputError`,
    which lists every finding about the schema, the models, the data and this machine, each with its line.
    """
    return examine_source(read_topology(path, list(overrides)), say, details=details)


def examine_source(source: TopologySource, say: Say, *, details: bool = False) -> tuple[Topology, Inputs]:
    """Check a topology file that has been read already. Returns and raises as `examine`."""
    if source.topology is None:
        raise InputError(list_problems(source.name, source.problems))
    named, missing = with_models_here(with_allocation(source.topology), say)
    named, not_had = with_data_here(named, say)
    missing += not_had
    broken = source.broken | {_key(text) for text in missing}
    first, _ = fitted(named)  # before the prompts' lengths are known
    found = [*missing, *(text for text in validate(first) if not _is_about(text, broken))]
    reader = _Reader(first, found, broken)
    inputs = reader.read()
    problems = [*source.problems, *((source.line_of(_key(text)), text) for text in reader.problems)]
    if problems or inputs is None:
        raise InputError(list_problems(source.name, problems))
    topology, chosen = fitted(named, longest_of(named, inputs))
    for line in (*(f"warning: {warning}" for warning in warnings(topology)), *reader.notes):
        say(line)
    if details:
        for line in (*what_was_read(topology, inputs), *what_was_chosen(chosen)):
            say(line)
    return topology, inputs


def ready_to_plan(path: Path, overrides: Collection[str], say: Say) -> tuple[Topology, int | None]:
    """Read a topology of which only the models' shapes are needed; returns it, and the mean tokens of a prompt.

    The mean is None where prompts or tokenizer cannot be read, which `say` hears. Raises `InputError` as
    `load_topology`.
    """
    topology, missing = with_models_here(with_allocation(load_topology(path, list(overrides))), say, weights=False)
    if missing:
        raise InputError("\n".join(missing))
    try:
        here, problems = with_data_here(topology, say)
        if problems:
            raise InputError(problems[0])
        inputs = read_inputs(fitted(here)[0], say)
    except InputError as error:
        say(f"prompts are not read ({str(error).splitlines()[0]}); --prompt-tokens says their mean length")
        return fitted(topology)[0], None
    lengths = inputs.prompts.lengths()
    return fitted(topology, longest_of(here, inputs))[0], None if lengths is None else round(float(lengths.mean()))


def read_inputs(topology: Topology, say: Say = print) -> Inputs:
    """Read prompts, completions and tokenizer of a valid topology; `InputError` names everything that is broken."""
    reader = _Reader(topology, [])
    inputs = reader.read()
    if inputs is None or reader.problems:
        raise InputError("\n".join(reader.problems))
    for note in reader.notes:
        say(note)
    return inputs


def _key(finding: str) -> str:
    """Return the dotted key that a finding begins with."""
    return re.split(r"[,:]", finding, maxsplit=1)[0]


def _is_about(finding: str, broken: Collection[str]) -> bool:
    """Tell whether a finding rests on a key that the schema has refused."""
    names = set(re.findall(r"[a-z]\w*(?:\.\w+)+|^\w+(?=:)", finding))
    return any(name == key or name.startswith(f"{key}.") for key in broken for name in names)


class _Reader:
    """Reads the files that a topology names; goes on after every fault and collects all of them."""

    def __init__(self, topology: Topology, problems: list[str], broken: Collection[str] = ()) -> None:
        """Go on from the `problems` found so far, which are not said twice; `broken` keys have no value."""
        self._topology = topology
        self._broken = broken
        self._chats = ChatOptions.of(topology.data)
        self.problems = problems
        self.notes: list[str] = []

    def read(self) -> Inputs | None:
        """Read everything; None where something is wrong."""
        topology = self._topology
        tokenizer = self._try("models.student.path", self._tokenizer)
        tables = self._try("models.student.path", lambda: read_tables(topology))
        if tokenizer is None or tables is None:
            return None
        rows = tables.shared if tables.shared < tokenizer.vocab_size else None
        plain = TeacherChoice(tuple(topology.teachers) or ("",), topology.data.teacher_key, rows=rows)
        try:
            made = topology.data, tokenizer, teacher_limits(topology, topology.rollout.sampling.max_response_tokens)
            prompts, contrast = TeacherPrompts.of(*made), TeacherPrompts.of_contrast(*made)
        except InputError as error:
            self.problems.append(str(error))
            return None
        choice = replace(plain, prompts=prompts, contrast=contrast)
        train = self._train(tokenizer, choice)
        held_out = self._held_out(tokenizer, plain)
        completions = self._try("data.completions.path", lambda: self._completions(tokenizer, choice))
        if train is None or completions is None or self.problems:
            return None
        return Inputs(train, held_out, tokenizer, completions)

    def _try(self, key: str, read: Callable[[], _Found]) -> _Found | None:
        """Call `read`. Where it raises `InputError`, return None and add a problem, unless its key has one."""
        try:
            return read()
        except InputError as error:
            text = str(error) if str(error).startswith("data.") else f"{key}: {error}"
            if not any(_key(problem) == _key(text) for problem in self.problems) and not _is_about(text, self._broken):
                self.problems.append(text)
            return None

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._topology.models.student.path, self._topology.data.chat_template)

    def _train(self, tokenizer: Tokenizer, choice: TeacherChoice) -> PromptSet | None:
        """The prompts to train on, from a file or a function; None where they cannot be had."""
        topology = self._topology
        section, path, limit = topology.data.train, topology.data.function, topology.max_prompt_tokens
        if section is not None:
            return self._prompts("data.train", section, tokenizer, limit, choice, self._reward())
        if path is None or any(_key(problem) == KEY for problem in self.problems):
            return None
        labelled = self._reward() is not None

        def first() -> PromptSet:
            try:
                reading = Reading(SECTION, tokenizer, choice, self._chats)
                prompts = OwnPrompts(path, reading, limit, labelled=labelled)
                prompts[0]  # what is wrong with every row is known before the start
            except HookError as error:
                raise InputError(str(error).replace(", and go on with --resume", "")) from None
            return PromptSet(prompts, 0, longest_read=None if topology.data.informs_teachers else 0)

        return self._try(KEY, first)

    def _reward(self) -> str | None:
        """The reward that compares responses with labels, in words; None where none does."""
        kind = self._topology.reward.kind
        return f"reward.kind {kind}" if kind.facts.label else None

    def _held_out(self, tokenizer: Tokenizer, plain: TeacherChoice) -> dict[str, PromptSet]:
        """The prompts of every evaluation set that can be used, by name. A teacher that judges reads its own."""
        found: dict[str, PromptSet] = {}
        topology = self._topology
        for name, one in topology.evaluation_sets.items():
            rules = {"answer": f"{one.where('judge')} answer", "reward": self._reward(), "teacher": None}
            choice = plain
            if one.judge == "teacher" and one.teacher_prompt:
                limits = teacher_limits(topology, one.max_response_tokens)
                choice = replace(plain, prompts=TeacherPrompts.of(topology.data, tokenizer, limits))
            prompts = self._prompts(one.key, one.data, tokenizer, one.max_prompt_tokens, choice, rules[one.judge])
            if prompts is not None:
                found[name] = prompts
        return found

    def _prompts(
        self,
        key: str,
        section: PromptsSection,
        tokenizer: Tokenizer,
        limit: int,
        choice: TeacherChoice,
        rule: str | None,
    ) -> PromptSet | None:
        """Read the prompts of a file; None where it cannot be used, also where an earlier problem says so.

        `rule` is what compares responses with labels, in words.
        """
        if any(name in problem for problem in self.problems for name in _LENGTH_KEYS):
            limit = _ANY_LENGTH
        prompts = self._try(f"{key}.path", lambda: load_prompts(section, tokenizer, limit, choice, self._chats))
        if prompts is None:
            return None
        if rule is not None:
            self._try(f"{key}.label_key", lambda: require_labels(prompts, section, rule))
        if prompts.skipped_too_long:
            skipped = f"skipped {prompts.skipped_too_long} prompts longer than {limit} tokens"
            self.notes.append(f"{named(section.path)}: {skipped}")
        if prompts.read_plainly:
            plainly = f"{prompts.read_plainly} of {len(prompts.prompts)} prompts have no text for their teacher"
            self.notes.append(f"{named(section.path)}: {plainly}, who reads the student's prompt there")
        return prompts

    def _completions(self, tokenizer: Tokenizer, choice: TeacherChoice) -> CompletionSet:
        """Read the responses that a data set gives; none where the topology names no such file."""
        topology, section = self._topology, self._topology.data.completions
        if section is None:
            return CompletionSet()
        limits = topology.max_prompt_tokens, topology.rollout.sampling.max_response_tokens
        ends = read_model(topology.models.student.path).eos_token_ids
        found = load_completions(section, tokenizer, limits, ends, choice, self._chats)
        if found.skipped_too_long:
            skipped = f"skipped {found.skipped_too_long} rows longer than {limits[0]} + {limits[1]} tokens"
            self.notes.append(f"{named(section.path)}: {skipped}")
        return found
