"""What the teacher thinks of a response of an evaluation: scored at once and whole, where a set is judged by it.

    teacher_topk: 0   the teacher's logprobs of the tokens; what they differ by from the student's estimates the KL
    teacher_topk: k   the k likeliest tokens of teacher and student in each place, of both from a prefill

A teacher in the learner is asked by the launcher (`opd_async.run.consulting`): the student's part alone is found here.
The student's are asked from the engine that generated, with the weights that did: an evaluation sees one version, since
the next weight update waits for it, and a response that has seen another one is left unscored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.replies import Scores
from opd_async.actors.rollout.engines import Engines
from opd_async.actors.rollout.generation import Comparison, Generation
from opd_async.errors import EngineError
from opd_async.estimators.topk import NO_LOGPROB, NO_TOKEN, TopK
from opd_async.estimators.topk_kl import divergences
from opd_async.role import Role
from opd_async.transport import messages as m

log = logging.getLogger(__name__)

TRIES = 3
"""How often an engine is asked about one response; a breaker lets the next try wait while its engine is down."""


def given_sampled_ids(scores: Scores, sampled_logprobs: NDArray[np.float32]) -> Scores:
    """Scores of a prefill, over all ids of the engine's table, as those over the ids that may be sampled.

    What a token was sampled with, `sampled_logprobs` float32[n], is over these: it says in each place how much of the
    whole they are.
    """
    assert scores.topk is not None
    ids, logprobs = scores.topk
    moved = np.minimum(logprobs + (sampled_logprobs - scores.logprobs)[:, None], 0.0)
    topk = TopK(ids, np.where(ids == NO_TOKEN, NO_LOGPROB, moved).astype(np.float32))
    return replace(scores, logprobs=sampled_logprobs, topk=topk)


class Comparing:
    """Asks engines about responses of evaluations; about none unless the topology says so."""

    def __init__(self, role: Role, engines: Engines) -> None:
        self._role = role
        sets = role.plan.topology.evaluation_sets
        self._topk = {name: one.teacher_topk for name, one in sets.items() if one.judge == "teacher"}
        self._engines = engines
        self._in_learner = role.plan.topology.opd.in_learner
        self._some_barred = role.plan.student_rows > role.plan.vocab_size

    def wants(self, lease: m.Lease) -> bool:
        """Whether the response to this lease is to be compared: sampled by the student, as in training."""
        sampled = lease.kind == m.LeaseKind.EVAL_STUDENT and lease.temperature == 1.0
        return sampled and lease.evaluation_set in self._topk

    async def compare(self, generation: Generation) -> Comparison | None:
        """Compare a response that has ended; None if an engine could not be asked.

        The teacher reads its own prompt where it has one. On cancel: the request is given up.
        """
        topk, response = self._topk[generation.lease.evaluation_set], generation.response()
        if self._in_learner:
            return await self._own_part(generation, response, topk)
        teacher = await self._tried(lambda: self._of_teacher(generation, response, topk))
        if teacher is None:
            return None
        if not topk:
            return Comparison(teacher.logprobs)
        student = await self._tried(lambda: self._of_student(generation, response, topk))
        if student is None:
            return None
        assert student.topk is not None and teacher.topk is not None
        lists, logprobs = (student.topk, teacher.topk), (student.logprobs, teacher.logprobs)
        found = await asyncio.to_thread(divergences, *lists, response, *logprobs)  # long lists take a while
        return Comparison(teacher.logprobs, found)

    async def _own_part(self, generation: Generation, response: NDArray[np.int32], topk: int) -> Comparison | None:
        """What is to be compared with what the teacher in the learner says."""
        if not topk:
            return Comparison()
        student = await self._tried(lambda: self._of_student(generation, response, topk))
        return None if student is None else Comparison(student_topk=student.topk)

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
        if not generation.versions <= {str(version)} or student.version != version:
            return None
        return given_sampled_ids(scores, generation.logprobs()) if self._some_barred else scores

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
