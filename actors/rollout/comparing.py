"""What the teacher thinks of a response of an evaluation: scored at once and whole, where a set is judged by it.

    teacher_topk: 0   the teacher's logprobs of the tokens; what they differ by from the student's estimates the KL
    teacher_topk: k   the k likeliest tokens of teacher and student in each place, of both from a prefill

The student's are asked from the engine that generated, with the weights that did: an evaluation sees one version, since
the next weight update waits for it, and a response that has seen another one is left unscored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.replies import Scores
from opd_async.actors.rollout.engines import Engines
from opd_async.actors.rollout.generation import Generation
from opd_async.errors import EngineError
from opd_async.estimators.topk_kl import Divergences, divergences
from opd_async.role import Role
from opd_async.transport import messages as m

log = logging.getLogger(__name__)

TRIES = 3
"""How often an engine is asked about one response; a breaker lets the next try wait while its engine is down."""


class Comparison(NamedTuple):
    """The teacher's logprobs float32[n] of a response, and both divergences, float64[n], where they were asked for."""

    teacher_logprobs: NDArray[np.float32]
    divergences: Divergences | None


class Comparing:
    """Asks engines about responses of evaluations; about none unless the topology says so."""

    def __init__(self, role: Role, engines: Engines) -> None:
        self._role = role
        sets = role.plan.topology.evaluation_sets
        self._topk = {name: one.teacher_topk for name, one in sets.items() if one.judge == "teacher"}
        self._engines = engines

    def wants(self, lease: m.Lease) -> bool:
        """Whether the response to this lease is to be compared: sampled by the student, as in training."""
        sampled = lease.kind == m.LeaseKind.EVAL_STUDENT and lease.temperature == 1.0
        return sampled and lease.evaluation_set in self._topk

    async def compare(self, generation: Generation) -> Comparison | None:
        """Compare a response that has ended; None if an engine could not be asked.

        The teacher reads its own prompt where it has one. On cancel: the request is given up.
        """
        topk, response = self._topk[generation.lease.evaluation_set], generation.response()
        teacher = await self._tried(lambda: self._of_teacher(generation, response, topk))
        if teacher is None:
            return None
        if not topk:
            return Comparison(teacher.logprobs, None)
        student = await self._tried(lambda: self._of_student(generation, response, topk))
        if student is None:
            return None
        assert student.topk is not None and teacher.topk is not None
        lists, logprobs = (student.topk, teacher.topk), (student.logprobs, teacher.logprobs)
        found = await asyncio.to_thread(divergences, *lists, response, *logprobs)  # long lists take a while
        return Comparison(teacher.logprobs, found)

    async def _of_teacher(self, generation: Generation, response: NDArray[np.int32], topk: int) -> Scores:
        lease = generation.lease
        engine = self._engines.teacher_of(lease.teacher, lease.sample_id)
        prompt = lease.prompt if lease.teacher_prompt is None else lease.teacher_prompt
        ids = np.concatenate([prompt, response]).astype(np.int32)
        guard = self._engines.guards[engine.url]
        await guard.admission()
        try:
            if topk:
                scores = await engine.top(ids, len(prompt), topk)
            else:
                (scores,) = await engine.score([(ids, len(prompt))])
        except EngineError as error:
            guard.failed(error)
            raise
        guard.succeeded()
        return scores

    async def _of_student(self, generation: Generation, response: NDArray[np.int32], topk: int) -> Scores | None:
        """The student's own, with the weights that made the response; None where they are no longer in its engine."""
        student, prompt = generation.student, generation.lease.prompt
        ids = np.concatenate([prompt, response]).astype(np.int32)
        guard = self._engines.guards[student.client.url]
        await student.gate.wait()
        await guard.admission()
        version = student.version
        try:
            scores = await student.client.top(ids, len(prompt), topk, str(version))
        except EngineError as error:
            guard.failed(error)
            raise
        guard.succeeded()
        return scores if generation.versions <= {str(version)} and student.version == version else None

    async def _tried(self, ask: Callable[[], Awaitable[Scores | None]]) -> Scores | None:
        """What an engine answers within a few tries."""
        for _ in range(TRIES):
            try:
                return await ask()
            except EngineError as error:
                self._role.count("engine_errors")
                self._role.metrics["opd_rollout_engine_errors_total"].labels(error.fault.value).inc()
                log.warning("a response of an evaluation could not be scored: %s", error)
        return None
