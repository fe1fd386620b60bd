"""Choose the sizes that a topology leaves to the program: caches, slots, chunks, batches, buckets.

    topology + config.json of its models + longest prompts + memory of this host -> sizes, each with its reason

Before prompts are read their lengths are not known: sizes are then those of the longest prompts that the models allow,
and are chosen again afterwards. Every rule is a pure function of what is named in its reason, so that a resumed run
chooses the same. Numbers that a user wrote are never changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd_async.config.section import Auto
from opd_async.config.topology import EngineSection, Topology, TrainOn
from opd_async.data.model_folder import read_model
from opd_async.errors import InputError
from opd_async.forecast.cost_model import BF16, Decoder, read_decoder
from opd_async.forecast.memory import activation_bytes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 1 << 20
PROMPT_ALLOWANCE = 2048
"""Tokens that a prompt of a function may have, since nobody knows the longest one before it is leased."""
SLOTS = (8, 256)
"""Fewest and most responses at once on one student engine."""
CHUNKS = (32, 512)
"""Shortest and longest chunk: 16 make the longest response, where they are not too short to be worth a message."""
STREAM_INTERVAL = 32
SCORED = (512, 4096)
"""Fewest and most new tokens in one scoring batch."""
LOGITS_BYTES = 256 * MIB
"""Of float32 logits that a teacher on a CPU may hold at once."""
MICRO_BATCH = 16384
BUCKETS_MIB = (16, 256)
BUCKETS = 8
"""Buckets that a model is cut into where their size allows it, so that sending and loading overlap."""
ENGINE_SHARE = 0.5
"""Of a host's memory, for weights and caches of all engines on its CPUs."""
LEARNER_SHARE = 0.25
"""Of a host's memory, for the activations of all learner ranks on its CPUs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One size that was chosen: its key in the topology, the number, and why."""

    key: str
    value: int
    why: str


@dataclass(frozen=True, slots=True)
class Longest:
    """Tokens of the longest prompts that will be used; `train` is None where they come from a function."""

    train: int | None
    held_out: tuple[int, int] = (0, 0)
    """Of the evaluation set that needs most: its longest prompt, and its longest response."""
    teachers: int | None = 0
    """Of the prompts that teachers read in place of the student's; 0 where there are none, None where a function makes
    them."""


def host_memory() -> int:
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fitted(topology: Topology, longest: Longest | None = None, memory: int = 0) -> tuple[Topology, tuple[Choice, ...]]:
    """Choose every size that is `auto`. `longest` is None before prompts are read; `memory` is `host_memory()` if 0.

    Returns the topology with numbers in the place of `auto`, and the choices in the order of the topology. Where a
    model's config.json cannot be read it returns the topology as it is: the checks say why.
    """
    try:
        models = {side: read_decoder(model.path) for side, model, _ in topology.engine_sides}
        rooms = {side: read_model(model.path).max_tokens for side, model, _ in topology.engine_sides}
    except InputError:
        return topology, ()
    fitter = _Fitter(topology, models, rooms, memory or host_memory())
    fitter.choose(longest)
    return fitter.topology, tuple(fitter.choices)


def _power_below(value: float) -> int:
    """The largest power of two that is at most `value`; 1 below 2."""
    return 1 << max(0, int(value).bit_length() - 1)


def _within(value: float, bounds: tuple[int, int]) -> int:
    return int(min(max(value, bounds[0]), bounds[1]))


class _Fitter:
    """Goes through the sizes in the order in which they depend on each other."""

    def __init__(self, topology: Topology, models: dict[str, Decoder], rooms: dict[str, int], memory: int) -> None:
        self.topology = topology
        self.choices: list[Choice] = []
        self._models, self._rooms, self._memory = models, rooms, memory

    def choose(self, longest: Longest | None) -> None:
        """Choose every size that is `auto`."""
        self._contexts(longest)
        self._rollout()
        for side in self._models:
            self._engine(side)
        self._teacher()
        self._learner()

    def _set(self, key: str, value: int, why: str) -> None:
        """Put a number in the place of `auto`; leave a number that the user wrote."""
        if isinstance(_at(self.topology, key), Auto):
            self.topology = _with(self.topology, key.split("."), value)
            self.choices.append(Choice(key, value, why))

    @property
    def _both(self) -> bool:
        """Whether the student's engines are the teacher's too."""
        return self.topology.opd.on_student_engines

    def _sections(self) -> dict[str, EngineSection]:
        return {side: section for side, _, section in self.topology.engine_sides}

    def _contexts(self, longest: Longest | None) -> None:
        """Longest prompt and response together: of the student, and as much for every teacher."""
        topology, sections = self.topology, self._sections()
        response = topology.rollout.sampling.max_response_tokens
        written = [size for one in sections.values() for size in (one.kv_tokens, one.context_tokens)]
        written = [size for size in written if not isinstance(size, Auto)]
        most = min([*self._rooms.values(), *written])
        if longest is None:
            need, why = most, "the most that the models have positions for"
        elif longest.train is None:
            need, why = response + PROMPT_ALLOWANCE, f"{response} of response, {PROMPT_ALLOWANCE} for prompts"
        else:
            need = max(longest.train + response, sum(longest.held_out))
            why = f"the longest prompt ({max(longest.train, longest.held_out[0])}) and the longest response"
        if self._both and longest is not None:
            read = need + PROMPT_ALLOWANCE if longest.teachers is None else longest.teachers + response
            if read > need:
                need, why = read, "the longest prompt that only the teacher reads, and the longest response"
        self._set("engines.student.context_tokens", min(need, most), why)
        student = self.topology.engines.student.context_tokens
        read = 0 if longest is None else student + PROMPT_ALLOWANCE
        if longest is not None and longest.teachers is not None:
            read = longest.teachers + response
        for side in list(self._models)[1:]:
            own = sections[side].kv_tokens
            room = self._rooms[side] if isinstance(own, Auto) else min(own, self._rooms[side])
            size = max(student, min(read, room))
            why = "as the student's" if size == student else "the longest prompt of its own and the longest response"
            self._set(f"engines.{side}.context_tokens", size, why)

    def _rollout(self) -> None:
        """Responses at once, so that about one step's tokens are under way; chunks, and events of the stream."""
        topology = self.topology
        schedule, rollout, student = topology.schedule, topology.rollout, topology.engines.student
        response = rollout.sampling.max_response_tokens
        if schedule.train_on is TrainOn.SAMPLES:
            wanted, why = float(schedule.samples_per_step), f"the {schedule.samples_per_step} responses of a step"
        else:
            wanted = schedule.tokens_per_step / (response / 2)
            why = f"{schedule.tokens_per_step} tokens a step in responses of half of {response}"
        most = SLOTS[1] * student.replicas
        if not isinstance(student.max_running, Auto):
            most = min(most, student.max_running * student.replicas // (1 + self._both))
        slots = _within(wanted, (min(SLOTS[0] * student.replicas, most), most))
        group = rollout.group_size
        self._set("rollout.slots", max(slots - slots % group, group), why)
        chunk = _within(_power_below(response / 16), CHUNKS)
        self._set("rollout.chunk_tokens", chunk, f"sixteen in {response}, from {CHUNKS[0]} to {CHUNKS[1]}")
        most_tokens = min(STREAM_INTERVAL, self.topology.rollout.chunk_tokens)
        self._set("rollout.stream_interval", most_tokens, f"{STREAM_INTERVAL}, or a chunk")

    def _engine(self, side: str) -> None:
        """Requests at once and room in the cache of one engine."""
        section, slots = self._sections()[side], self.topology.rollout.slots
        own = -(-slots // section.replicas)
        twice, and_scored = (2, ", and as many that are scored") if side == "student" and self._both else (1, "")
        self._set(f"engines.{side}.max_running", twice * own, f"{slots} slots on {section.replicas}{and_scored}")
        need, context = own * section.context_tokens, section.context_tokens
        room = self._cache_room(side, section)
        words = f"{own} samples of {context} tokens"
        if twice > 1:
            reads = 2 + (self.topology.data.contrast_prompt is not None)
            need, words = reads * need, f"{words}, each also behind what the teacher reads"
        if side != "student" and self.topology.data.contrast_prompt is not None:
            need, words = 2 * need, f"{words}, each behind two prompts"
        if room is not None and room < need:
            need, words = max(room, context), f"{words} are more than memory has room for"
        self._set(f"engines.{side}.kv_tokens", need, words)

    def _cache_room(self, side: str, section: EngineSection) -> int | None:
        """Tokens that fit into this engine's part of the host's memory; None where it runs on no CPU of this host."""
        if not section.started or section.devices[0] != "cpu":
            return None
        engines = sum(one.replicas for one in self._sections().values() if one.started and one.devices[0] == "cpu")
        model, width = self._models[side], BYTES[section.dtype]
        free = self._memory * ENGINE_SHARE / engines - model.weights * width
        return max(0, int(free / (model.kv_bytes / BF16 * width)))

    def _teacher(self) -> None:
        """New tokens that a teacher scores at once: their logits must fit on a CPU."""
        teachers = [(side, section) for side, section in self._sections().items() if self._both or side != "student"]
        on_cpu = [side for side, section in teachers if section.started and section.devices[0] == "cpu"]
        vocab = max((self._models[side].vocab for side in on_cpu), default=0)
        most = _power_below(LOGITS_BYTES / (4 * vocab)) if vocab else SCORED[1]
        why = f"logits of {vocab} ids in {LOGITS_BYTES // MIB} MiB" if vocab else "an accelerator is full at this"
        self._set("teacher.batch_tokens", _within(most, SCORED), f"{why}, from {SCORED[0]} to {SCORED[1]}")

    def _learner(self) -> None:
        """Tokens of a micro-batch, by the memory of their activations; buckets by the weights."""
        topology, model = self.topology, self._models["student"]
        section, context = topology.learner, topology.engines.student.context_tokens
        size, why = MICRO_BATCH, f"{MICRO_BATCH}, or one sample"
        if section.devices[0] == "cpu":
            allowed = self._memory * LEARNER_SHARE / section.ranks
            wide = BYTES[section.dtype] / BF16
            sized = (size for size in _halves(MICRO_BATCH) if wide * activation_bytes(model, section, size) <= allowed)
            size, why = next(sized, context), "activations in a quarter of this host's memory, or one sample"
        self._set("learner.micro_batch_tokens", max(size, context), why)
        weights = model.weights * BYTES[section.dtype]
        mib = _within(_power_below(weights / MIB / BUCKETS), BUCKETS_MIB)
        why = f"an eighth of {weights / MIB:.0f} MiB of weights, from {BUCKETS_MIB[0]} to {BUCKETS_MIB[1]}"
        self._set("learner.bucket_mib", mib, why)


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        yield size
        size //= 2


def _at(value: Any, key: str) -> Any:
    """What stands at a dotted key. An engine section of a teacher that is not written has the defaults."""
    for part in key.split("."):
        value = value.get(part, EngineSection()) if isinstance(value, dict) else getattr(value, part)
    return value


def _with(value: Any, path: list[str], number: int) -> Any:
    """A copy of sections in which `number` stands at `path`."""
    if not path:
        return number
    name, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, name: _with(value.get(name, EngineSection()), rest, number)}
    return value.model_copy(update={name: _with(getattr(value, name), rest, number)})
