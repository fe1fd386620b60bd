"""The virtual clock against real time: the same scenario simulated, and run by the real launcher and its real roles.

    python -m bench.crosscheck [--train-on tokens] [--rule filled] [--max-staleness 1] [--steps 14] [--scale 1]

    Scenario -> Simulation (virtual clock) ----------------------------------------------------------+-> table, JSON
             -> Lifecycle: rollout, teacher, intake + simulated engines and learner (`bench.crosscheck`) -+

Dispatcher, actors, intake, wire and HTTP are those of a run; only engines and learner take their time from the cost
model instead of a device. `--scale` is how many virtual seconds pass in a second: a busy machine needs less of it.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from opd_async.bench.crosscheck.scenario import PROMPT_TOKENS, Scenario, add_arguments
from opd_async.bench.sim.rules import Rule, Scoring, deadline_cuts, filled, whole_samples
from opd_async.bench.sim.simulation import Simulation
from opd_async.config.topology import StepRule, Topology, TrainOn
from opd_async.data.completions import CompletionSet
from opd_async.data.jsonl import read_jsonl
from opd_async.data.prompts import Prompt, PromptSet
from opd_async.data.tokenizer import Tokenizer
from opd_async.files import write_atomically
from opd_async.forecast.lengths import typical
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.plan.resolve import make_plan
from opd_async.run.inputs import Inputs
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import prepare
from opd_async.scheduling.admission import bound_of
from opd_async.signals import Signals

MODEL = Path(__file__).resolve().parents[2] / "examples" / "addition" / "models" / "student"
"""Whose vocabulary and tokenizer the simulated models have."""
PROMPTS = 4096
WARMUP = 4
NEVER = 10**6
AGES = 64
"""Ages from here on are not counted; without a bound a token may get as old as its response is long."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one clock says, in virtual seconds and tokens; recompute and step as in `bench.sim.figures.Row`."""

    tokens_per_s: float
    step_s: float
    step_tokens: float
    step_tokens_sd: float
    learner_recompute: float
    teacher_recompute: float
    age_mean: float
    age_max: int
    score_p50_s: float
    score_p99_s: float
    learner_idle: float


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """The schedule that both clocks are to run."""

    train_on: TrainOn
    rule: StepRule
    max_staleness: int | None
    steps: int

    def simulated(self) -> Rule:
        """As the virtual clock has it."""
        if self.rule is StepRule.FILLED and self.train_on is TrainOn.TOKENS:
            return filled(self.max_staleness)
        bound = bound_of(self.max_staleness)
        return whole_samples(bound) if self.train_on is TrainOn.SAMPLES else deadline_cuts(bound)


def virtual(scenario: Scenario, asked: Asked) -> Figures:
    """On the virtual clock."""
    rule, steps = asked.simulated(), asked.steps
    simulation = Simulation(scenario.workload(), rule, Scoring.STREAMED, scenario.lengths_seed)
    row = simulation.run(WARMUP, steps - WARMUP)
    return Figures(
        tokens_per_s=row.tokens_per_s,
        step_s=row.seconds / row.steps,
        step_tokens=row.step_tokens,
        step_tokens_sd=row.step_tokens_sd,
        learner_recompute=row.learner_recompute,
        teacher_recompute=row.teacher_recompute,
        age_mean=row.age_mean,
        age_max=row.age_max,
        score_p50_s=row.score_p50_s,
        score_p99_s=row.score_p99_s,
        learner_idle=row.idle.learner,
    )


def settings(scenario: Scenario, schedule: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content of a topology with the sizes of the scenario."""
    work, longest = scenario.workload(), int(typical(scenario.workload().lengths).max())
    context = PROMPT_TOKENS + longest + 8
    engine = {"context_tokens": context, "kv_tokens": 2 * work.slots * context, "max_running": work.slots}
    return {
        "name": "crosscheck",
        "run_dir": str(folder),
        "models": {side: {"path": str(MODEL)} for side in ("student", "teacher")},
        "data": {"train": {"path": "none.jsonl"}},
        "engines": {"student": engine | {"replicas": scenario.engines}, "teacher": engine},
        "rollout": {
            "slots": work.slots,
            "chunk_tokens": work.chunk_tokens,
            "stream_interval": work.chunk_tokens // 4,
            "sampling": {"max_response_tokens": longest + 1},
        },
        "teacher": {"batch_tokens": work.batch_tokens, "max_wait_ms": 1000 * work.max_wait_s / scenario.scale},
        "schedule": {"tokens_per_step": work.tokens_per_step, "samples_per_step": work.samples_per_step} | schedule,
        "checkpoint": {"every_steps": NEVER, "export_hf": False},
    }


def engine_command(scenario: Scenario, side: str, command: tuple[str, ...]) -> tuple[str, ...]:
    """The command of a simulated engine of a side in place of a real one's."""
    module = (sys.executable, "-m", "opd_async.bench.crosscheck.engine", "--side", side)
    return (*module, *scenario.arguments(), *command[3:])


def simulated(plan: Plan, scenario: Scenario) -> Plan:
    """The plan with simulated engines and a simulated learner in place of the real ones."""

    def command(role: RolePlan) -> tuple[str, ...]:
        match role.kind:
            case RoleKind.STUDENT_ENGINE | RoleKind.TEACHER_ENGINE:
                return engine_command(scenario, role.kind.value.removesuffix("_engine"), role.command)
            case RoleKind.LEARNER:
                module = (sys.executable, "-m", "opd_async.bench.crosscheck.learner", "--plan", role.command[-1])
                return (*module, *scenario.arguments())
            case _:
                return role.command

    roles = tuple(role.model_copy(update={"command": command(role)}) for role in plan.roles)
    return plan.model_copy(update={"roles": roles})


def made_up_inputs(topology: Topology) -> Inputs:
    """Prompts of the scenario's length, all alike."""
    ids = np.full(PROMPT_TOKENS, 3, np.int32)
    (teacher,) = topology.teachers
    prompts = PromptSet(tuple(Prompt(index, ids, "", {}, teacher) for index in range(PROMPTS)), 0)
    return Inputs(prompts, {}, Tokenizer(MODEL), CompletionSet())


def real(scenario: Scenario, asked: Asked, folder: Path) -> Figures:
    """With the real roles, in real time; the run's files go to `folder`."""
    topology = Topology.model_validate(settings(scenario, dataclasses.asdict(asked), folder))
    plan = simulated(make_plan(topology), scenario)
    with prepare(plan) as run:
        lifecycle = Lifecycle(plan, made_up_inputs(topology), _echo, Signals())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(lifecycle.run())
        rows = [row for row in read_jsonl(run.path / "metrics.jsonl") if row["step"] >= WARMUP]
    counted, work = rows[1:], scenario.workload()
    seconds = (rows[-1]["time"] - rows[0]["time"]) * scenario.scale
    tokens = sum(row["tokens"] for row in counted)
    ages = np.sum([np.pad(row["staleness_counts"], (0, AGES))[:AGES] for row in counted], axis=0)
    latency = report.score_latency
    return Figures(
        tokens_per_s=tokens / seconds,
        step_s=seconds / len(counted),
        step_tokens=tokens / len(counted) / work.tokens_per_step,
        step_tokens_sd=float(np.std([row["tokens"] for row in counted])) / work.tokens_per_step,
        learner_recompute=sum(row["forwarded_tokens"] for row in counted)
        / (tokens * (work.mean_tokens + work.prompt_tokens) / work.mean_tokens),
        teacher_recompute=report.teacher_recompute or 0.0,
        age_mean=float(np.arange(AGES) @ ages / ages.sum()),
        age_max=int(np.nonzero(ages)[0][-1]),
        score_p50_s=(latency.p50_s or 0.0) * scenario.scale,
        score_p99_s=(latency.p99_s or 0.0) * scenario.scale,
        learner_idle=sum(row["learner_idle_s"] for row in counted) * scenario.scale / seconds,
    )


def _staleness(text: str) -> int | None:
    return None if text == "none" else int(text)


def _echo(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Both clocks, side by side."""
    parser = argparse.ArgumentParser(description="The virtual clock against real roles in real time.")
    add_arguments(parser)
    parser.add_argument("--train-on", type=TrainOn, choices=tuple(TrainOn), default=TrainOn.TOKENS)
    parser.add_argument("--rule", type=StepRule, choices=tuple(StepRule), default=StepRule.DEADLINE)
    parser.add_argument("--steps", type=int, default=14, help=f"optimizer steps, of which {WARMUP} are a warm-up")
    parser.add_argument("--max-staleness", type=_staleness, default=1, help="steps, or none")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    scenario = Scenario.of(options)
    asked = Asked(options.train_on, options.rule, options.max_staleness, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        measured = real(scenario, asked, Path(folder))
    predicted = virtual(scenario, asked)
    print(f"{'':<20}{'virtual clock':>15}{'real roles':>15}{'ratio':>8}")
    for name, value in dataclasses.asdict(measured).items():
        other = getattr(predicted, name)
        ratio = f"{value / other:>8.2f}" if other else ""
        print(f"{name:<20}{other:>15,.3f}{value:>15,.3f}{ratio}")
    if options.json is not None:
        both = {"virtual": dataclasses.asdict(predicted), "real": dataclasses.asdict(measured)}
        content = {"scenario": dataclasses.asdict(scenario), "train_on": options.train_on.value, **both}
        content |= {"rule": options.rule.value, "max_staleness": options.max_staleness}
        write_atomically(options.json, json.dumps(content, indent=2).encode())


if __name__ == "__main__":
    main()
