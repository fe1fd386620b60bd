"""What intakes carry, with nothing else of a run: scored chunks in, steps out, as fast as they can.

    this process: teacher actor (PUSH), dispatcher (ROUTER), null learner (DEALER)  <->  intakes, as in a run

CURVE, messages, steps, packing and the check of every token are those of `run.py`. There a loaded machine is most of
what is seen; here no intake waits for a rollout. What counts is the CPU time of each intake. An intake that has to wait
for its next chunk pays for being woken too, so several look dearer than one where this process cannot keep all of them
busy: on one core they are always behind.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import uvloop
import zmq.asyncio

from opd_async.bench.wire.learner import Ranks
from opd_async.bench.wire.pattern import LOGPROBS, PROMPT_TOKENS, SCORES, TOKENS, TOPK_IDS, TOPK_LOGPROBS
from opd_async.bench.wire.run import DEADLINE_S, Case, make_topology
from opd_async.cluster.supervisor import ProcessSpec, Supervisor
from opd_async.config.topology import ONE_TEACHER
from opd_async.errors import RoleError
from opd_async.files import write_atomically
from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan, RoleKind, role_name
from opd_async.plan.resolve import PLAN_FILE, make_plan
from opd_async.scheduling.grants import Grants
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlServer
from opd_async.transport.door import Door, Passport
from opd_async.transport.to_intakes import ToIntakes

AHEAD = 3
"""Budgets that may be on their way at once."""
WARM_STEPS = 2
NOBODY = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """One measurement. `us_per_chunk`: CPU microseconds of each intake for each chunk of the run, whoever held it."""

    case: Case
    tokens: int
    us_per_chunk: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """What the intakes carry with a core each: the busiest one decides."""
        return 1e6 * self.case.chunk_tokens / max(self.us_per_chunk)


class Flood:
    """Everybody but the intakes."""

    def __init__(self, plan: Plan, case: Case, control: ControlServer, to_intakes: ToIntakes) -> None:
        self._plan, self._case = plan, case
        self._control, self._to_intakes = control, to_intakes
        self._grants = Grants(RunKeys.of_environment())
        self._room = asyncio.Event()
        self._stepped = asyncio.Event()
        self._version = self._sent = 0
        self.steps = self.tokens = 0

    async def dispatch(self) -> None:
        """Answer the intakes and the learner. On cancel: they wait."""
        first = role_name(RoleKind.INTAKE, 0)
        while True:
            role, message = await self._control.receive()
            match message:
                case m.Frontier():
                    await self._control.send(first, m.Version(0, *NOBODY))
                case m.StepStarted():
                    self.tokens += int(message.stats["tokens"])
                    self._room.set()
                case m.LearnerReply(command="Train"):
                    self._version = message.version
                    self.steps += 1
                    self._stepped.set()
                    await self._control.send(first, m.Version(message.version, *NOBODY))
                case m.Failure():
                    raise RoleError(f"{role}: {message.text}")

    async def flood(self) -> None:
        """Send chunks of `slots` responses at a time, `AHEAD` steps ahead. On cancel: responses have not ended."""
        case, numbers = self._case, itertools.count()
        while True:
            together = list(itertools.islice(numbers, case.slots))
            for start in range(0, case.response_tokens, case.chunk_tokens):
                for sample_id in together:
                    while self._sent - self.tokens > AHEAD * case.step_tokens:
                        self._room.clear()
                        await self._room.wait()
                    chunk = self._chunk(sample_id, start)
                    await self._to_intakes.send(chunk)
                    self._sent += len(chunk.token_ids)  # the last one of a response may be shorter

    def _chunk(self, sample_id: int, start: int) -> m.ScoredChunk:
        end, k = min(start + self._case.chunk_tokens, self._case.response_tokens), self._case.topk
        at = slice(PROMPT_TOKENS + start, PROMPT_TOKENS + end)
        context = TOKENS[:PROMPT_TOKENS].copy()
        context[0] = sample_id
        return m.ScoredChunk(
            sample_id=sample_id,
            attempt=0,
            actor=0,
            prompt_id=sample_id,
            prompt_tokens=PROMPT_TOKENS,
            start=start,
            weight_version=self._version,
            finish=m.Finish.LENGTH if end == self._case.response_tokens else None,
            label="",
            teacher_id=role_name(RoleKind.TEACHER, 0),
            latency_s=0.1,
            token_ids=TOKENS[at],
            behaviour_logprobs=LOGPROBS[at],
            teacher_logprobs=SCORES[at],
            context=context if start == 0 else None,
            topk_ids=TOPK_IDS[at, :k] if k else None,
            topk_logprobs=TOPK_LOGPROBS[at, :k] if k else None,
            teacher=ONE_TEACHER,
            grant=self._grants.of(sample_id, 0, 0),
        )

    async def measured(self) -> Carried:
        """CPU time from the end of one step to the end of another, `Case.seconds` later. Raises `TimeoutError`."""
        async with asyncio.timeout(DEADLINE_S):
            await self._after(WARM_STEPS)
            tokens, before = self.tokens, _cpu_s()
            await asyncio.sleep(self._case.seconds)
            await self._after(self.steps + 1)
        after, tokens = _cpu_s(), self.tokens - tokens
        chunks = tokens / self._case.chunk_tokens
        used = tuple(1e6 * (after[name] - before[name]) / chunks for name in sorted(after))
        return Carried(case=self._case, tokens=tokens, us_per_chunk=used)

    async def _after(self, steps: int) -> None:
        while self.steps < steps:
            self._stepped.clear()
            await self._stepped.wait()


def _cpu_s() -> dict[str, float]:
    """CPU seconds of each intake so far."""
    found: dict[str, float] = {}
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # another child, which ended meanwhile
            if (name := process.name()).startswith(RoleKind.INTAKE):
                used = process.cpu_times()
                found[name] = used.user + used.system
    return found


@contextmanager
def _only_on(cores: set[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores, all its life."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _carry(plan: Plan, case: Case, cores: set[int]) -> Carried:
    async with AsyncExitStack() as stack:
        context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        door = Door(context, plan.peers)
        stack.callback(door.close)
        control = stack.enter_context(ControlServer(context, plan.control, door=door))
        teacher = role_name(RoleKind.TEACHER, 0)
        to_intakes = ToIntakes(context, plan.scored, Passport.of_environment(teacher))
        stack.callback(to_intakes.close)
        supervisor = await stack.enter_async_context(Supervisor(lambda line: None, 5.0))
        for role in plan.of_kind(RoleKind.INTAKE):
            log = plan.run_folder / f"{role.name}.log"
            with _only_on(cores):
                await supervisor.start(ProcessSpec(role.name, role.command, {"OMP_NUM_THREADS": "1"}, log))
        flood = Flood(plan, case, control, to_intakes)
        async with asyncio.TaskGroup() as group:
            ranks = Ranks(plan, plan.role(RoleKind.LEARNER, 0))
            work = (door.keep(), flood.dispatch(), flood.flood(), ranks.obey(), _watch(supervisor))
            loops = [group.create_task(one) for one in work]
            found = await flood.measured()
            for loop in loops:
                loop.cancel()
        return found


async def _watch(supervisor: Supervisor) -> None:
    ended = await supervisor.exits.get()
    raise RoleError(f"{ended.name}: {ended.cause}\n" + "\n".join(ended.tail))


@contextmanager
def _keys() -> Iterator[None]:
    """Keys of a run in the environment, as a launcher hands them to its roles."""
    keys = RunKeys.draw().environment()
    os.environ.update(keys)
    try:
        yield
    finally:
        for name in keys:
            del os.environ[name]


def measure(case: Case, core: int | None = None) -> Carried:
    """What the intakes of a case take; with `core` all of them are on that one, and everything else elsewhere.

    Raises `OpdError`s, in groups, if a token is lost, comes twice or is changed.
    """
    here, everywhere = os.sched_getaffinity(0), set(range(os.cpu_count() or 1))
    intakes, rest = (here, here) if core is None else ({core}, everywhere - {core} or {core})
    with tempfile.TemporaryDirectory() as name, _keys(), _only_on(rest):
        plan = make_plan(make_topology(case, Path(name)))
        schedule = plan.topology.schedule.model_copy(update={"max_staleness": None})
        plan = plan.model_copy(update={"topology": plan.topology.model_copy(update={"schedule": schedule})})
        plan.run_folder.mkdir(parents=True)
        write_atomically(plan.run_folder / PLAN_FILE, plan.model_dump_json())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_carry(plan, case, intakes))


def table(rows: Sequence[Carried]) -> str:
    """The figures as text, with what a second intake brings."""
    where = f"{'chunk':>5}{'top-k':>7}{'intakes':>9}"
    lines = [f"{where}  {'us a chunk, each':<18}{'tokens/s, a core each':>22}{'times one':>11}"]
    alone = {(row.case.chunk_tokens, row.case.topk): row.tokens_per_s for row in rows if row.case.intakes == 1}
    for row in rows:
        kind = row.case.chunk_tokens, row.case.topk
        costs = ", ".join(f"{cost:.0f}" for cost in row.us_per_chunk)
        times = row.tokens_per_s / alone[kind] if kind in alone else 1.0
        where = f"{kind[0]:>5}{kind[1]:>7}{row.case.intakes:>9}"
        lines.append(f"{where}  {costs:<18}{row.tokens_per_s:>22,.0f}{times:>11.2f}")
    return "\n".join(lines)
