"""Responses of evaluations: a lease for each, to the rollout actors that the run uses, and what comes back.

prompts of a set -> leases (kind eval_*) -> rollout actors -> EvalDone
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from opd_async.config.evaluating import EvaluationSet
from opd_async.data.prompts import Prompt
from opd_async.transport.messages import EvalDone, Lease, LeaseKind

EVAL_IDS = 1 << 48
"""Evaluation samples are numbered from here, far above any training sample."""

SendLease = Callable[[Lease], Awaitable[None]]
Response = tuple[Prompt, EvalDone]


class Responses:
    """Asks for responses and waits for them."""

    def __init__(self, send: SendLease) -> None:
        self._send = send
        self._ids = itertools.count(EVAL_IDS)
        self._waiting: dict[int, asyncio.Future[EvalDone]] = {}

    def deliver(self, done: EvalDone) -> None:
        """A response has come; late ones of an abandoned evaluation are ignored."""
        future = self._waiting.get(done.sample_id)
        if future is not None and not future.done():
            future.set_result(done)

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
        sample_id = next(self._ids)
        future: asyncio.Future[EvalDone] = asyncio.get_running_loop().create_future()
        self._waiting[sample_id] = future
        none = np.zeros(0, np.int32)
        try:
            await self._send(
                Lease(
                    sample_id=sample_id,
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
            )
            return await future
        finally:
            del self._waiting[sample_id]
