"""`--plan`: what a topology will do on given devices, before anything is bought or started.

    topology + config.json of both models + device, link, lengths -> Workload -> forecast, memory, best split -> text

Nothing is loaded or started, and no device need be there. Costs are those of `cost_model.py`: data sheets
and stated efficiencies, not measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opd_async.config.topology import EngineSection, StepRule, Topology, TrainOn
from opd_async.errors import InputError
from opd_async.forecast.cost_model import (
    Decoder,
    decode_cost,
    engine_cache_tokens,
    prefill_cost,
    read_decoder,
    sync_seconds,
    train_cost,
)
from opd_async.forecast.devices import TERA, Device, Link
from opd_async.forecast.lengths import Capped, Lengths, typical
from opd_async.forecast.memory import Memory, engine_memory, learner_memory
from opd_async.forecast.steps import Forecast, forecast
from opd_async.forecast.workload import Devices, Workload, mean_context
from opd_async.scheduling.leases import UNDER_WAY

GIB = 1 << 30
ALIKE = 0.995
"""Forecasts this close to the fastest say nothing about which is faster."""
TRIED = 3
"""Splits that look best by their rates and are then forecast."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a topology is planned for."""

    device: Device
    link: Link
    lengths: Lengths
    prompt_tokens: int
    """Mean of a prompt."""


class Models:
    """Shapes of a topology's models, and what a device of each role has to hold of them."""

    def __init__(self, topology: Topology, site: Site) -> None:
        critic = topology.advantage.critic.path
        self.topology = topology
        self.site = dataclasses.replace(site, device=site.device.part(self.devices.total))
        self.lengths = Capped(site.lengths, topology.rollout.sampling.max_response_tokens)
        self.prompt_tokens = min(site.prompt_tokens, topology.max_prompt_tokens)
        self.student: Decoder = read_decoder(topology.models.student.path)
        self.teachers = [read_decoder(model.path) for _, model, _ in topology.engine_sides[1:]]
        self.critic: Decoder | None = None
        if topology.advantage.estimator.facts.critic:
            self.critic = read_decoder(critic) if critic is not None else self.student

    @property
    def devices(self) -> Devices:
        """Devices of each role as the topology has them."""
        engines, sides = self.topology.engines.student, self.topology.engine_sides[1:]
        return Devices(
            engines.replicas * engines.tensor_parallel,
            sum(section.replicas * section.tensor_parallel for _, _, section in sides),
            self.topology.learner.ranks,
        )

    def memory(self, devices: Devices) -> list[Memory]:
        """What a device of each role has to hold."""
        topology, device = self.topology, self.site.device
        student, section = topology.engines.student, topology.learner
        per_engine = topology.rollout.slots / (devices.rollout // student.tensor_parallel)
        under_way = per_engine * mean_context(self.lengths, self.prompt_tokens)
        ranks = section.tensor_parallel * section.pipeline_parallel * section.context_parallel
        learner = section.model_copy(update={"data_parallel": max(1, devices.learner // ranks)})
        longest = int(typical(self.lengths).max()) + self.prompt_tokens
        engines = [
            engine_memory("student engine", self.student, device, student.tensor_parallel, under_way, student.dtype)
        ]
        for (side, _, own), model in zip(topology.engine_sides[1:], self.teachers, strict=True):
            cached = self.cache_tokens(model, own)
            engines.append(engine_memory(f"{side} engine", model, device, own.tensor_parallel, cached, own.dtype))
        return [*engines, learner_memory(self.student, device, learner, longest, self.critic)]

    def cache_tokens(self, model: Decoder, section: EngineSection) -> int:
        """Of one engine: what fits, and no more than an engine is told to keep that the run starts."""
        fits = engine_cache_tokens(model, self.site.device, section.tensor_parallel, section.dtype)
        return min(fits, section.kv_tokens) if section.started else fits


def uncovered(topology: Topology) -> str | None:
    """Why the steps of a topology cannot be forecast; None if they can."""
    schedule = topology.schedule
    if schedule.train_on is not TrainOn.TOKENS:
        return "covers schedule.train_on tokens"
    if schedule.max_staleness == 0 and schedule.step_rule is not StepRule.FILLED:
        return "covers schedule.max_staleness 0 with schedule.rule filled only"
    if len(topology.engine_sides) != 2:
        return "covers one teacher on engines of its own, in models.teacher"
    return None


class Forecaster(Models):
    """The figures of one topology on one site. Raises `InputError` for topologies that it does not cover."""

    def __init__(self, topology: Topology, site: Site) -> None:
        if reason := uncovered(topology):
            raise InputError(f"--plan: {reason}")
        super().__init__(topology, site)
        (side,) = topology.teachers.values()
        self._section = side.engines
        (self.teacher,) = self.teachers

    def workload(self, devices: Devices) -> Workload:
        """The topology's workload with the roles on `devices`."""
        topology, site = self.topology, self.site
        tp_student, tp_teacher = topology.engines.student.tensor_parallel, self._section.tensor_parallel
        mean, dtype = float(typical(self.lengths).mean()), topology.engines.student.dtype
        learner, recompute = topology.learner.dtype, topology.learner.recompute
        reads = 1 if topology.data.contrast_prompt is None else 2
        return Workload(
            lengths=self.lengths,
            decode=decode_cost(self.student, site.device, tp_student, dtype),
            prefill=prefill_cost(self.student, site.device, tp_student, with_head=False, dtype=dtype),
            score=prefill_cost(self.teacher, site.device, tp_teacher, dtype=self._section.dtype),
            train=train_cost(self.student, site.device, devices.learner, recompute, learner),
            sync_s=sync_seconds(self.student, site.link, dtype),
            engines=devices.rollout // tp_student,
            teachers=devices.teacher // tp_teacher,
            slots=topology.rollout.slots,
            samples_per_step=max(1, round(topology.schedule.tokens_per_step / mean)),
            prompt_tokens=self.prompt_tokens,
            chunk_tokens=topology.rollout.chunk_tokens,
            batch_tokens=topology.teacher.batch_tokens,
            max_wait_s=topology.teacher.max_wait_ms / 1000,
            cache_tokens=self.cache_tokens(self.teacher, self._section) // reads,
            reads=reads,
            group_size=topology.rollout.group_size,
            devices=devices,
        )

    def forecast(self, devices: Devices) -> Forecast:
        """What the topology's schedule makes of `devices`."""
        schedule = self.topology.schedule
        return forecast(self.workload(devices), schedule.max_staleness, schedule.step_rule)

    def fits(self, devices: Devices) -> bool:
        """Whether every role has the memory that it needs."""
        return all(memory.fits for memory in self.memory(devices))

    def splits(self) -> Iterator[Devices]:
        """Every way to deal the topology's devices out in whole replicas that fit into memory."""
        total, section = self.devices.total, self.topology.learner
        ranks = section.tensor_parallel * section.pipeline_parallel * section.context_parallel
        for learner in range(ranks, total, ranks):
            for teacher in range(self._section.tensor_parallel, total - learner, self._section.tensor_parallel):
                rollout = total - learner - teacher
                devices = Devices(rollout, teacher, learner)
                whole = rollout % self.topology.engines.student.tensor_parallel == 0
                if whole and self.fits(devices):
                    yield devices

    def best_split(self) -> tuple[Devices, Forecast] | None:
        """The fastest split, None if none fits."""

        def guess(devices: Devices) -> float:
            rates = self.workload(devices).rates()
            return min(rates.rollout, rates.teacher / here.teacher_recompute, rates.learner / here.learner_recompute)

        here = self.forecast(self.devices)
        likely = sorted(self.splits(), key=guess, reverse=True)[:TRIED]
        tried = [(devices, self.forecast(devices)) for devices in likely]
        return preferred(tried) if tried else None


def preferred(tried: Sequence[tuple[Devices, Forecast]]) -> tuple[Devices, Forecast]:
    """The fastest split; of those that a forecast cannot tell apart, the one that computes least twice."""
    fastest = max(one.tokens_per_s for _, one in tried)
    alike = [(devices, one) for devices, one in tried if one.tokens_per_s >= ALIKE * fastest]
    return min(alike, key=lambda each: each[1].learner_recompute)


def plan_text(topology: Topology, site: Site) -> str:
    """What `--plan` prints: a forecast where the schedule has one, else what the devices have to hold."""
    reason = uncovered(topology)
    if reason is None:
        return describe(Forecaster(topology, site))
    models = Models(topology, site)
    head = f"memory on {_named(models.devices, site)}; computed, not measured; no forecast, which {reason}"
    return "\n".join([head, "", *_memory_lines(models.memory(models.devices))])


def describe(forecaster: Forecaster) -> str:
    """The plan as text: stages, memory, warnings, and the best split."""
    devices, site = forecaster.devices, forecaster.site
    here, work = forecaster.forecast(devices), forecaster.workload(devices)
    longest, asked = int(typical(forecaster.lengths).max()), int(typical(site.lengths).max())
    cut = f" (rollout.sampling.max_response_tokens; --lengths has up to {asked:,})" if asked > longest else ""
    lines = [
        f"planned for {_named(devices, site)}; computed, not measured",
        f"responses: mean {work.mean_tokens:,.0f}, longest {longest:,} tokens{cut}; prompts: {work.prompt_tokens:,}",
        "",
        *_stage_lines(devices, work, here),
        *_tool_lines(forecaster.topology, work),
        "",
        *_memory_lines(forecaster.memory(devices)),
        *_cache_lines(forecaster, work),
        "",
        _split_line(forecaster, here),
        _assumed(site.device),
    ]
    return "\n".join(lines)


def _named(devices: Devices, site: Site) -> str:
    """How many of which device, and what weights travel over."""
    if site.device.shared:
        return f"{devices.total} processes on {site.device.name}"
    return f"{devices.total} x {site.device.name}, weights over {site.link.name}"


def _assumed(device: Device) -> str:
    """What the times rest on, of which nothing was measured on the device."""
    return (
        f"assumed of {device.name}: decoding at {device.decode_share:.0%} of {device.bandwidth / TERA:.3g} TB/s; "
        f"of its peak operations scoring {device.prefill_share:.0%} and training {device.train_share:.0%}, which is "
        f"{device.flops / TERA:,.3g} TFLOP/s in bfloat16 and {device.float32_flops / TERA:,.3g} in float32"
    )


def _stage_lines(devices: Devices, work: Workload, here: Forecast) -> Iterator[str]:
    """Times of one optimizer step, which may be larger than `tokens_per_step`."""
    budgets = here.step_budgets
    rates = work.rates(budgets)
    yield f"{'stage':<10}{'devices':>8}{'tokens/s alone':>16}{'busy s a step':>15}{'recompute':>11}"
    recomputes = {"rollout": 1.0, "teacher": here.teacher_recompute, "learner": here.learner_recompute}
    # not the stage that is busy for longest: engines that generate slowly for want of new responses are busy too
    bottleneck = min(recomputes, key=lambda stage: getattr(rates, stage) / recomputes[stage])
    for stage, recompute in recomputes.items():
        seconds, rate = getattr(here, f"{stage}_s") * budgets, getattr(rates, stage)
        mark = "  <- bottleneck" if stage == bottleneck else ""
        yield f"{stage:<10}{getattr(devices, stage):>8}{rate:>16,.0f}{seconds:>15.3g}{recompute:>11.2f}{mark}"
    yield ""
    yield (
        f"an optimizer step every {here.seconds * budgets:.3g} s, of {budgets * work.tokens_per_step:,.0f} tokens "
        f"({budgets:.1f} x schedule.tokens_per_step); weight update {work.sync_s:.2g} s"
    )
    yield (
        f"{here.tokens_per_s:,.0f} tokens/s: {here.tokens_per_s / rates.bound:.0%} of the slowest stage alone; "
        f"bubble {here.bubble:.0%} of the devices"
    )
    yield f"to see each step's share of that stage: telemetry.planned_tokens_per_s: {rates.bound:.0f}"


def _tool_lines(topology: Topology, work: Workload) -> Iterator[str]:
    """How long tools may take before slots run empty: what waits for one needs none, but not any number may wait."""
    if topology.rollout.function is None:
        return
    turns_s = work.mean_tokens * work.slots / work.rates().rollout
    yield (
        f"episodes: the time of their tools is not in these figures. One that waits for a tool needs no slot, and "
        f"{UNDER_WAY} x {work.slots:,} are under way at most: slots run empty where the tools of a response take more "
        f"than {(UNDER_WAY - 1) * turns_s:.3g} s beside {turns_s:.3g} s of turns, and sooner with a bound on staleness"
    )


def _memory_lines(memories: list[Memory]) -> Iterator[str]:
    titles = ("weights", "optimizer", "KV", "activations", "with reserve", "has")
    yield f"{'GiB per device':<16}" + "".join(f"{title:>14}" for title in titles)
    for one in memories:
        parts = (one.weights, one.optimizer, one.kv, one.activations, one.total, one.device.memory)
        yield f"{one.role:<16}" + "".join(f"{part / GIB:>14.{1 if part >= GIB else 3}f}" for part in parts)
    for one in memories:
        if not one.fits:
            needs, has = one.total / GIB, one.device.memory / GIB
            yield f"WARNING: a {one.role} does not fit: needs {needs:.0f} GiB of {has:.0f}; {_remedy(one.role)}"


def _remedy(role: str) -> str:
    if role == "learner":
        return "raise learner.tensor_parallel, pipeline_parallel or data_parallel, or set learner.recompute"
    side = role.split(maxsplit=1)[0]
    return f"raise engines.{side}.tensor_parallel" + (" or replicas, or lower rollout.slots" * (side == "student"))


def _cache_lines(forecaster: Forecaster, work: Workload) -> Iterator[str]:
    student, under_way = forecaster.topology.engines.student, work.slots * work.mean_context
    if student.started and student.kv_tokens * work.engines < under_way:
        yield (
            f"warning: the student engines keep {student.kv_tokens * work.engines:,} of {under_way:,.0f} tokens under "
            "way; raise engines.student.kv_tokens, or lower rollout.slots"
        )
    held = work.cache_tokens * work.teachers
    if held < under_way:
        yield (
            f"warning: the teacher's caches hold {held:,} of {under_way:,.0f} tokens under way: chunks will wait for "
            "the end of their responses; raise engines.teacher.kv_tokens or its replicas where memory allows"
        )


def _split_line(forecaster: Forecaster, here: Forecast) -> str:
    if forecaster.site.device.shared:
        return "all roles share this host, each with its part: there is no split to choose"
    found = forecaster.best_split()
    if found is None:
        return f"no split of these {forecaster.devices.total} devices fits into memory"
    devices, best = found
    if forecaster.fits(forecaster.devices) and best.tokens_per_s <= 1.01 * here.tokens_per_s:
        return f"no split of these {devices.total} devices is faster"
    parts = ", ".join(f"{count} {role}" for role, count in dataclasses.asdict(devices).items())
    return (
        f"best split of these {devices.total} devices: {parts}: {best.tokens_per_s:,.0f} tokens/s "
        f"({best.tokens_per_s / here.tokens_per_s:.2f} x), bubble {best.bubble:.0%}"
    )
