"""Responses of evaluations: a lease for each, to the rollout actors that the run uses, and what comes back.

prompts of a set -> leases (kind eval_*) -> rollout actors -> EvalDone
                         ^                        | one that ends, or has left
                         +---- another lease -----+

A lease has a number of its own. So what an actor still says of one that went to another by then counts for nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from opd_async.config.evaluating import EvaluationSet
from opd_async.data.prompts import Prompt
from opd_async.transport.messages import EvalDone, Lease, LeaseKind

log = logging.getLogger(__name__)
EVAL_IDS = 1 << 48
"""Evaluation samples are numbered from here, far above any training sample."""
UNREACHED_S = 1.0
"""Wait behind an actor that cannot be reached: it is ending, and is among the connected ones until its end is seen."""

Response = tuple[Prompt, EvalDone]


class Actors(Protocol):
    """What responses need of the dispatcher."""

    async def actor_for(self, number: int) -> str:
        """A connected rollout actor; waits while there is none."""

    async def send(self, role: str, message: Lease) -> bool:
        """Send to a role; False when it is not connected."""


class _Waiting(NamedTuple):
    """A lease whose response has not come."""

    actor: str
    done: asyncio.Future[EvalDone | None]
    """None once its actor is gone."""


class Responses:
    """Asks for responses and waits for them."""

    def __init__(self, actors: Actors) -> None:
        self._actors = actors
        self._ids = itertools.count(EVAL_IDS)
        self._waiting: dict[int, _Waiting] = {}

    def deliver(self, done: EvalDone) -> None:
        """A response has come; late ones of an abandoned evaluation, or of an actor that is gone, are ignored."""
        waiting = self._waiting.get(done.sample_id)
        if waiting is not None and not waiting.done.done():
            waiting.done.set_result(done)

    def lost(self, role: str) -> None:
        """A role is gone: what it still had to answer is leased to others."""
        left = [waiting.done for waiting in self._waiting.values() if waiting.actor == role and not waiting.done.done()]
        for done in left:
            done.set_result(None)
        if left:
            log.warning("%s is gone; %d responses of evaluations are begun anew", role, len(left))

    async def of(
        self,
        kind: LeaseKind,
        one: EvaluationSet,
        prompts: Sequence[Prompt],
        temperature: float,
        slots: asyncio.Semaphore,
    ) -> list[Response]:
        """A response to each of these prompts of a set, as many at once as `slots` admits.

        On cancel: responses under way are ignored.
        """

        async def answered(prompt: Prompt) -> Response:
            async with slots:
                return prompt, await self._generate(kind, one, prompt, temperature)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answered(prompt), name=f"evaluate-{prompt.prompt_id}") for prompt in prompts]
        return [task.result() for task in tasks]

    async def _generate(self, kind: LeaseKind, one: EvaluationSet, prompt: Prompt, temperature: float) -> EvalDone:
        """A response, of whichever actor lives to see its end. The evaluation's deadline is for all of them."""
        none = np.zeros(0, np.int32)
        while True:
            lease = Lease(
                sample_id=next(self._ids),
                attempt=0,
                prompt_id=prompt.prompt_id,
                kind=kind.value,
                temperature=temperature,
                label=prompt.label,
                prompt=prompt.token_ids,
                prefix=none,
                metadata=prompt.metadata_json,
                max_tokens=one.max_response_tokens,
                teacher=prompt.teacher,
                teacher_prompt=prompt.teacher_ids,
                evaluation_set=one.name,
            )
            done = await self._of_one(lease)
            if done is not None:
                return done

    async def _of_one(self, lease: Lease) -> EvalDone | None:
        """The response of one actor; None if it ends without, or cannot be reached."""
        actor = await self._actors.actor_for(lease.sample_id - EVAL_IDS)
        future: asyncio.Future[EvalDone | None] = asyncio.get_running_loop().create_future()
        self._waiting[lease.sample_id] = _Waiting(actor, future)
        try:
            if await self._actors.send(actor, lease):
                return await future
            await asyncio.sleep(UNREACHED_S)
            return None
        finally:
            del self._waiting[lease.sample_id]
