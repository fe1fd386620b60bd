"""Give training leases to the rollout actors as far as admission allows, and take back those of a dead actor.

Which sample comes next, and whether it may, is `scheduling/leases.py`'s; this sends it to the actor with the fewest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from opd_async.cluster.fleet import Fleet
from opd_async.data.completions import Mix
from opd_async.data.own_prompts import KEY, OwnPrompts
from opd_async.data.prompts import Prompt
from opd_async.hooks import HookError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.state import RunState
from opd_async.scheduling.grants import Grants
from opd_async.scheduling.leases import LeaseBook, LeaseSpec
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlServer


class Reach(Protocol):
    """What leasing needs of the dispatcher."""

    plan: Plan
    state: RunState
    metrics: RoleMetrics
    server: ControlServer
    fleet: Fleet

    def up(self, kind: RoleKind) -> list[str]:
        """The connected roles of a kind."""


FUNCTION_DEADLINE_S = 300.0
"""A row of `data.function` that takes longer will never come."""


class Leasing:
    """The leasing loop and what wakes it."""

    def __init__(self, reach: Reach, prompts: Sequence[Prompt], mix: Mix) -> None:
        self._reach = reach
        self._prompts = prompts
        self._mix = mix
        self._grants = Grants(reach.fleet.keys)
        self._scorers = reach.plan.scorers
        self._changed = asyncio.Event()
        self._admitting = False

    def admit(self, flow: bool) -> None:
        """Let training leases flow, or stop them; those that were given stay."""
        self._admitting = flow
        self._changed.set()

    def look_again(self) -> None:
        """Something changed that may admit a lease: a response ended, a step was taken, an actor came."""
        self._changed.set()

    async def run(self) -> None:
        """Keep the actors busy as far as admission allows. On cancel: leases that were sent stay with their actors."""
        reach = self._reach
        while True:
            await self._changed.wait()
            self._changed.clear()
            book = reach.state.book
            if book is not None and self._flows(book):
                await self._lease_out(book)
                reach.metrics["opd_launcher_leases_active"].set(book.active)

    def _flows(self, book: LeaseBook) -> bool:
        """Whether leases of this book are given out: those of the one before a recovery are not."""
        return self._admitting and book is self._reach.state.book and self._reach.state.version >= 0

    async def _lease_out(self, book: LeaseBook) -> None:
        """Lease as much as the book admits, each sample to the actor with the fewest.

        A prompt may take long, and anybody may end meanwhile: `deaths.py` reclaims only what was leased by then.
        """
        reach = self._reach
        while self._flows(book) and (actors := reach.up(RoleKind.ROLLOUT)):
            actor = min(actors, key=book.generating_by)
            spec = book.lease(actor, reach.state.version)
            if spec is None:
                return
            incarnation = reach.fleet.incarnation(actor)
            lease = await self._lease(book, spec, actor)
            there = actor in reach.up(RoleKind.ROLLOUT) and reach.fleet.incarnation(actor) == incarnation
            if there and self._flows(book):
                await reach.server.send(actor, lease)

    async def _prompt(self, index: int) -> Prompt:
        """A prompt of the file, or of the user's function, which may take its time but not for ever."""
        if not isinstance(self._prompts, OwnPrompts):
            return self._prompts[index]
        try:
            async with asyncio.timeout(FUNCTION_DEADLINE_S):
                return await asyncio.to_thread(self._prompts.__getitem__, index)
        except TimeoutError:
            path = self._reach.plan.topology.data.function
            raise HookError(
                f"{KEY}: {path} gave no row {index} in {FUNCTION_DEADLINE_S:.0f} s; mend the function, and go on with "
                "--resume"
            ) from None

    async def _lease(self, book: LeaseBook, spec: LeaseSpec, actor: str) -> m.Lease:
        given = self._mix.of(spec.sample_id)
        prompt = await self._prompt(spec.prompt_index) if given is None else given.prompt
        return m.Lease(
            sample_id=spec.sample_id,
            attempt=spec.attempt,
            prompt_id=prompt.prompt_id,
            kind=m.LeaseKind.TRAIN.value,
            temperature=self._reach.plan.topology.rollout.sampling.temperature,
            label=prompt.label,
            prompt=prompt.token_ids,
            prefix=spec.prefix,
            metadata=prompt.metadata_json,
            teacher=prompt.teacher,
            teacher_prompt=prompt.teacher_ids,
            contrast_prompt=prompt.contrast_ids,
            given=None if given is None else given.response,
            grant=self._grants.of(spec.sample_id, spec.attempt, self._reach.fleet.role(actor).index),
            route=book.route(spec, self._scorers[prompt.teacher]) if self._scorers else 0,
        )

    async def further(self, actor: str, wanted: m.FurtherWanted) -> None:
        """Give an episode of `actor` a sample for another conversation; nothing to one that is over.

        On cancel: a sample that was leased stays with the actor.
        """
        reach, book = self._reach, self._reach.state.book
        if book is None or actor not in reach.up(RoleKind.ROLLOUT):
            return
        spec = book.further(wanted.sample_id, wanted.attempt, actor)
        if spec is not None:
            grant = self._grants.of(spec.sample_id, spec.attempt, reach.fleet.role(actor).index)
            await reach.server.send(actor, m.FurtherLease(wanted.sample_id, spec.attempt, spec.sample_id, grant))

    def reclaimed(self, message: m.Reclaimed) -> None:
        """Lease the samples of a dead actor again, each behind what the intake holds of it."""
        book = self._reach.state.book
        if book is None:
            return
        prefixes = np.split(message.tokens, np.cumsum(message.ends)[:-1])
        rows = zip(message.sample_ids.tolist(), message.attempts.tolist(), prefixes, message.complete, strict=True)
        for sample_id, attempt, prefix, complete in rows:
            book.give_back(sample_id, attempt, prefix, bool(complete))
        self._changed.set()
