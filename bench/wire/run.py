"""A run whose engines and learner are null: measured between two of its steps.

    topology -> plan, its engines and learner exchanged -> Lifecycle (launcher, dispatcher) -> steps until measured

Everything between the engines' replies and the learner's step is what a run has: the rollout actor, the teacher actor,
the intake and the dispatcher as processes of their own, their messages, acknowledgements, leases, weight updates.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from opd_async.bench.wire.pattern import CONTEXT_TOKENS, VOCAB_SIZE, prompts
from opd_async.config.topology import Topology
from opd_async.data.completions import CompletionSet
from opd_async.data.prompts import PromptSet
from opd_async.errors import OpdError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run.inputs import Inputs
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import prepare
from opd_async.signals import Signals

ROLES = ("rollout", "teacher", "intake", "launcher")
"""The data plane. Engines and learner are null, and counted apart."""
POLL_S = 0.02
DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setting. `http`: null engines are servers; else they sit in the actors, below the client's interface."""

    chunk_tokens: int
    event_tokens: int
    http: bool
    response_tokens: int = 16_384
    slots: int = 32
    step_tokens: int = 524_288
    seconds: float = 8.0
    """Measured at least so long, in whole steps."""
    encrypt: str = "all"
    """`network.encrypt`."""
    topk: int = 0
    """Of the teacher's most likely ids, so many come with each token."""
    intakes: int = 1
    """`intake.replicas`, and as many learner ranks."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Running totals at one moment: steps, tokens that the intake has taken in, CPU seconds by role, and the counts of
    each role's lag histogram by upper bound (seconds)."""

    time: float
    steps: int
    tokens: float
    cpu_s: dict[str, float]
    lag: dict[str, dict[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What happened between two moments. `tokens_per_core_s`: tokens for a second of one core's time, all roles
    together; `tokens_per_s` by the clock."""

    case: Case
    steps: int
    tokens: int
    seconds: float
    tokens_per_core_s: float
    tokens_per_s: float
    us_per_chunk: dict[str, float]
    """CPU microseconds of each role for each chunk's worth of tokens; `null` is what engines and learner took."""
    lag_p99_ms: dict[str, float]
    checked_tokens: int
    """Tokens that reached the learner in the whole run, each of them the right one, once and in order."""


def make_topology(case: Case, folder: Path) -> Topology:
    """One engine and one actor of each kind; settings that are not the case's are the defaults."""
    (folder / "model").mkdir()
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": VOCAB_SIZE - 1}
    (folder / "model" / "config.json").write_text(json.dumps({**sizes, "max_position_embeddings": CONTEXT_TOKENS}))
    return Topology.model_validate(
        {
            "name": "null",
            "run_dir": folder,
            "models": {"student": {"path": folder / "model"}, "teacher": {"path": folder / "model"}},
            "data": {"train": {"path": folder / "none.jsonl"}, "shuffle": False},
            "schedule": {"steps": 10**6, "tokens_per_step": case.step_tokens},
            "engines": {side: {"context_tokens": CONTEXT_TOKENS} for side in ("student", "teacher")},
            "rollout": {
                "slots": case.slots,
                "chunk_tokens": case.chunk_tokens,
                "stream_interval": case.event_tokens,
                "sampling": {"max_response_tokens": case.response_tokens},
            },
            "checkpoint": {"every_steps": 10**6, "export_hf": False},
            "intake": {"replicas": case.intakes},
            "learner": {"data_parallel": case.intakes},
            "opd": {"loss": "reverse_kl_topk", "topk": case.topk} if case.topk else {},
            "supervisor": {"restarts": 0},
            "network": {"encrypt": case.encrypt},
        }
    )


def with_null_roles(plan: Plan, http: bool) -> Plan:
    """The plan with null engines and a null learner; without `http` the actors get null clients too."""
    null = {RoleKind.TEACHER_ENGINE, RoleKind.STUDENT_ENGINE, RoleKind.LEARNER}
    null |= set() if http else {RoleKind.ROLLOUT, RoleKind.TEACHER}
    file = str(plan.run_folder / "plan.json")
    roles = tuple(
        role.model_copy(update={"command": (*words, role.kind.value, "--plan", file, "--index", str(role.index))})
        if role.kind in null
        else role
        for role in plan.roles
        for words in [(sys.executable, "-m", "opd_async.bench.wire.roles")]
    )
    return plan.model_copy(update={"roles": roles})


class Watch:
    """Looks at a run from outside its roles: their CPU time, and what they export."""

    def __init__(self, plan: Plan, lifecycle: Lifecycle) -> None:
        self._conductor = lifecycle
        self._ports: list[tuple[str, int]] = [
            (role.kind.value, role.ports["metrics"]) for role in plan.roles if role.kind.value in ROLES
        ]
        self._ports.append(("launcher", plan.launcher_metrics_port))
        self._host = plan.topology.network.bind

    async def between(self, case: Case) -> tuple[Moment, Moment]:
        """Two moments, each right after a step: the first after two steps, the second `case.seconds` later."""
        first = await self._after(2, 0.0)
        return first, await self._after(first.steps + 1, first.time + case.seconds)

    async def _after(self, steps: int, not_before: float) -> Moment:
        async with asyncio.timeout(DEADLINE_S):
            while self._steps < steps or time.perf_counter() < not_before:  # noqa: ASYNC110  # a run calls nobody back
                await asyncio.sleep(POLL_S)
            done = self._steps
            while self._steps == done:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        return await self._look()

    @property
    def _steps(self) -> int:
        return self._conductor.ledger.books.whole.steps if self._conductor.ledger is not None else 0

    async def _look(self) -> Moment:
        cpu_s = dict.fromkeys((*ROLES, "null"), 0.0)
        for process in [psutil.Process(), *psutil.Process().children()]:
            try:
                kind, times = process.name().rsplit("-", 1)[0], process.cpu_times()
            except psutil.NoSuchProcess:  # a child that ended meanwhile: none of the roles, or the run says so
                continue
            role = "launcher" if process.pid == psutil.Process().pid else kind if kind in ROLES else "null"
            cpu_s[role] += times.user + times.system
        pages = [(role, await asyncio.to_thread(self._page, port)) for role, port in self._ports]
        lag: dict[str, dict[float, float]] = {role: defaultdict(float) for role in ROLES}
        for role, page in pages:
            for bound, count in buckets(page, f"opd_{role}_loop_lag_seconds").items():
                lag[role][bound] += count
        tokens = sum(value(page, "opd_intake_scored_tokens_total") for role, page in pages if role == "intake")
        return Moment(time.perf_counter(), self._steps, tokens, cpu_s, lag)

    def _page(self, port: int) -> str:
        with urllib.request.urlopen(f"http://{self._host}:{port}/metrics", timeout=30.0) as answer:
            return str(answer.read().decode())


def buckets(page: str, name: str) -> dict[float, float]:
    """Cumulative counts of a histogram by upper bound."""
    families = text_string_to_metric_families(page)
    samples = [s for family in families if family.name == name for s in family.samples if s.name == f"{name}_bucket"]
    return {float(sample.labels["le"]): sample.value for sample in samples}


def value(page: str, name: str) -> float:
    """The value of a counter."""
    return next(s.value for family in text_string_to_metric_families(page) for s in family.samples if s.name == name)


def quantile(before: dict[float, float], after: dict[float, float], q: float) -> float:
    """Quantile of what a histogram counted between two looks, linear within a bucket, as Prometheus has it."""
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    rank, low, below = q * max(counts.values()), 0.0, 0.0
    for bound, count in counts.items():
        if count >= rank:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / max(count - below, 1e-9)
        low, below = bound, count
    return low


def figures(case: Case, first: Moment, second: Moment, checked_tokens: int) -> Figures:
    """What happened between two moments."""
    tokens, seconds = second.tokens - first.tokens, second.time - first.time
    cpu_s = {role: second.cpu_s[role] - first.cpu_s[role] for role in second.cpu_s}
    chunks = tokens / case.chunk_tokens
    return Figures(
        case=case,
        steps=second.steps - first.steps,
        tokens=int(tokens),
        seconds=seconds,
        tokens_per_core_s=tokens / sum(cpu_s[role] for role in ROLES),
        tokens_per_s=tokens / seconds,
        us_per_chunk={role: taken / chunks * 1e6 for role, taken in cpu_s.items()},
        lag_p99_ms={role: 1e3 * quantile(first.lag[role], second.lag[role], 0.99) for role in ROLES},
        checked_tokens=checked_tokens,
    )


async def conduct(plan: Plan, case: Case) -> tuple[Moment, Moment]:
    """Run until measured. Raises what ends the run early."""
    signals = Signals()
    inputs = Inputs(PromptSet(prompts(), 0), {}, cast(Any, None), CompletionSet())  # no evaluation, no tokenizer
    lifecycle = Lifecycle(plan, inputs, lambda line: None, signals)
    watch = Watch(plan, lifecycle)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(lifecycle.run())
        looking = group.create_task(watch.between(case))
        looking.add_done_callback(lambda _: signals.arrived())  # that is how it is ended
        run.add_done_callback(lambda _: looking.cancel())
    return looking.result()


def measure(case: Case) -> Figures:
    """One null run. Raises `OpdError`s, in groups, if a token was lost, came twice or was changed on its way."""
    with tempfile.TemporaryDirectory() as name:
        plan = with_null_roles(make_plan(make_topology(case, Path(name))), case.http)
        with prepare(plan), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            first, second = runner.run(conduct(plan, case))
        rows = [json.loads(line) for line in (plan.run_folder / "metrics.jsonl").read_text().splitlines()]
    checked, planned = rows[-1]["learner_checked_tokens"], sum(row["tokens"] for row in rows)
    if checked != planned:
        raise OpdError(f"{checked:.0f} tokens reached the learner of {planned:.0f} that the intake sent")
    return figures(case, first, second, int(checked))
