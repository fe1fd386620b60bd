"""A real teacher actor and a real engine, around which this process stands in for everybody else.

    slots --(a chunk every so many tokens, or a response when it has ended)--> teacher actor --> engine
    latencies <--(scored chunks)-------------------------------------------------+
    control: its messages are read and dropped                                   |
    metrics: what it has counted, with the engine's own numbers <----------------+

    loop       waits for                         unblocked by
    slot       the time of the next chunk        the clock; the actor's socket
    collect    a scored chunk                    the actor
    control    a message of the actor            the actor
    watch      the end of a process              an error that ends everything

On cancel: both processes are killed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import aiohttp
import numpy as np
import zmq.asyncio
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from opd_async.cluster.supervisor import ProcessSpec, Supervisor
from opd_async.config.topology import ONE_TEACHER
from opd_async.engines.probe import POLL_S, wait_until_ready
from opd_async.errors import RoleError
from opd_async.files import write_atomically
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import PLAN_FILE
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlServer, Pull, Push

ROUND_S = 1200.0
SETTLE_S = 1.0
"""Longer than the time between two heartbeats, with which the actor brings its idle time up to date."""
COUNTERS = ("scored_tokens", "cached_tokens", "computed_tokens", "batches", "idle_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What arrives: `lengths` of responses in sampled tokens, in order; `rate` in tokens a second of each slot.

    With `turn_tokens` they are episodes: behind each turn of so many tokens but the last one a tool takes `tool_s`
    seconds and says `given_tokens` tokens.
    """

    lengths: Sequence[int]
    slots: int
    rate: float
    prompt_tokens: int
    chunk_tokens: int
    vocab: int
    turn_tokens: int | None = None
    tool_s: float = 0.0
    given_tokens: int = 0

    def tokens_of(self, length: int) -> int:
        """Tokens of a response with `length` sampled ones, those of tools included."""
        turns = 1 if self.turn_tokens is None else -(-length // self.turn_tokens)
        return length + (turns - 1) * self.given_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One mode, once: seconds from each response's last token to its score, and what the actor counted meanwhile."""

    mode: str
    seconds: float
    latencies_s: Sequence[float]
    counted: dict[str, float]
    settled_s: float
    """Seconds between the last score and the reading of the counters; nothing was done in them."""
    new_tokens: int
    """Tokens of prompts and responses, each once."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of a response up to `end`, sampled or given, which leave together `at_s` seconds after it began."""

    end: int
    sampled: bool
    at_s: float


def parts(length: int, work: Work, mode: str) -> list[Part]:
    """The parts of a response with `length` sampled tokens; for `whole`, all leave when it has ended."""
    found: list[Part] = []
    made, at, elapsed_s = 0, 0, 0.0
    while made < length:
        turn = min(work.turn_tokens or length, length - made)
        found += [Part(at + end, True, elapsed_s + end / work.rate) for end in cuts(turn, work.chunk_tokens, mode)]
        made, at, elapsed_s = made + turn, at + turn, elapsed_s + turn / work.rate
        if made < length:
            at, elapsed_s = at + work.given_tokens, elapsed_s + work.tool_s
            found.append(Part(at, False, elapsed_s))
    return [replace(part, at_s=elapsed_s) for part in found] if mode == "whole" else found


def cuts(length: int, chunk_tokens: int, mode: str) -> list[int]:
    """Ends of a response's chunks: every `chunk_tokens` and at its end, or, for `whole`, at its end alone."""
    inner = range(chunk_tokens, length, chunk_tokens) if mode == "streamed" else ()
    return [*inner, length]


@dataclass(slots=True, kw_only=True)
class Bench:
    """The sockets around a teacher actor."""

    plan: Plan
    push: Push
    pull: Pull
    session: aiohttp.ClientSession
    given_out: int = 0
    """Numbers of samples: none comes twice."""
    ended_at: dict[int, float] = field(default_factory=dict)
    waits: dict[int, asyncio.Future[float]] = field(default_factory=dict)

    async def wait_until_ready(self, deadline_s: float) -> None:
        """Return once the actor serves its metrics and the engine answers; raises as `opd_async.engines.probe`."""
        await wait_until_ready(self.plan.teacher_engines[0], "the teacher engine", deadline_s)
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    await self.counted()
                except aiohttp.ClientError:
                    await asyncio.sleep(POLL_S)
                else:
                    return

    async def collect(self) -> None:
        """Take scored chunks in; a response's last one ends its wait."""
        while True:
            chunk = await self.pull.receive()
            if chunk.finish is not None:
                self.waits.pop(chunk.sample_id).set_result(time.monotonic() - self.ended_at.pop(chunk.sample_id))

    async def respond(self, work: Work, mode: str, length: int, tokens_N: NDArray[np.int32]) -> asyncio.Future[float]:
        """Send one response of `length` sampled tokens as it grows; the future will have its latency.

        `tokens_N` is prompt and response.
        """
        self.given_out += 1
        sample_id, began, start = self.given_out, time.monotonic(), 0
        prompt = work.prompt_tokens
        self.waits[sample_id] = latency = asyncio.get_running_loop().create_future()
        for part in parts(length, work, mode):
            await asyncio.sleep(began + part.at_s - time.monotonic())
            last = prompt + part.end == len(tokens_N)
            if last:
                self.ended_at[sample_id] = time.monotonic()
            ids, context = tokens_N[prompt + start : prompt + part.end], None if start else tokens_N[:prompt]
            await self.push.send(
                m.Chunk(
                    sample_id=sample_id,
                    attempt=0,
                    actor=0,
                    prompt_id=sample_id,
                    prompt_tokens=prompt,
                    start=start,
                    weight_version=0,
                    finish="length" if last else None,
                    label="",
                    made_at=time.time(),
                    token_ids=ids,
                    behaviour_logprobs=np.full(len(ids) * part.sampled, -1.0, np.float32),
                    context=context,
                    teacher=ONE_TEACHER,
                    sampled=part.sampled,
                )
            )
            start = part.end
        return latency

    async def round(self, work: Work, mode: str, seed: int) -> Round:
        """All of `work` once. Raises `TimeoutError` when scores do not come."""
        random, queue = np.random.default_rng(seed), list(work.lengths)
        spread_s = float(np.mean([parts(one, work, mode)[-1].at_s for one in work.lengths])) / work.slots
        latencies: list[asyncio.Future[float]] = []

        async def slot(index: int) -> None:
            await asyncio.sleep(index * spread_s)  # responses do not all begin at once
            while queue:
                length = queue.pop(0)
                count = work.prompt_tokens + work.tokens_of(length)
                tokens_N = random.integers(0, work.vocab, count, dtype=np.int32)
                latencies.append(await self.respond(work, mode, length, tokens_N))

        before, began = await self.counted(), time.monotonic()
        async with asyncio.timeout(ROUND_S):
            async with asyncio.TaskGroup() as group:
                for index in range(work.slots):
                    group.create_task(slot(index), name=f"slot-{index}")
            scored = await asyncio.gather(*latencies)
        ended = time.monotonic()
        await asyncio.sleep(SETTLE_S)
        after, settled_s = await self.counted(), time.monotonic() - ended
        counted = {name: after[name] - before[name] for name in COUNTERS}
        new = sum(work.prompt_tokens + work.tokens_of(length) for length in work.lengths)
        return Round(
            mode=mode,
            seconds=ended - began,
            latencies_s=scored,
            counted=counted,
            settled_s=settled_s,
            new_tokens=new,
        )

    async def counted(self) -> dict[str, float]:
        """The actor's counters now, from its page for Prometheus."""
        role = self.plan.role(RoleKind.TEACHER, 0)
        async with self.session.get(f"http://{role.host}:{role.ports['metrics']}/metrics") as response:
            page = await response.text()
        values = {sample.name: sample.value for one in text_string_to_metric_families(page) for sample in one.samples}
        return {name: values[f"opd_teacher_{name}_total"] for name in COUNTERS}


@asynccontextmanager
async def running(plan: Plan) -> AsyncIterator[Bench]:
    """The teacher's engine and actor of `plan`, started; `RoleError` if one of them ends. Scores wait for both."""
    plan.run_folder.mkdir(parents=True)
    write_atomically(plan.run_folder / PLAN_FILE, plan.model_dump_json())
    context = zmq.asyncio.Context()
    try:
        with (
            ControlServer(context, plan.control) as control,
            Push(context, plan.chunks[0]) as push,
            Pull(context, plan.scored[0]) as pull,
        ):
            async with Supervisor(_quiet, 5.0) as supervisor, aiohttp.ClientSession() as session:
                for kind in (RoleKind.TEACHER_ENGINE, RoleKind.TEACHER):
                    role = plan.role(kind, 0)
                    environment = {**role.env, "OMP_NUM_THREADS": "1"}
                    log = plan.run_folder / f"{role.name}.log"
                    await supervisor.start(ProcessSpec(role.name, role.command, environment, log))
                bench = Bench(plan=plan, push=push, pull=pull, session=session)
                async with asyncio.TaskGroup() as group:
                    work = (bench.collect(), _drain(control), _watch(supervisor))
                    loops = [group.create_task(one) for one in work]
                    yield bench
                    for loop in loops:
                        loop.cancel()
    finally:
        context.destroy(linger=0)


def _quiet(_: str) -> None:
    """Log lines stay in the logs."""


async def _drain(control: ControlServer) -> None:
    while True:
        await control.receive()


async def _watch(supervisor: Supervisor) -> None:
    ended = await supervisor.exits.get()
    raise RoleError(f"{ended.name}: {ended.cause}\n" + "\n".join(ended.tail))
