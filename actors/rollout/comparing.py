"""What the teacher thinks of a response of an evaluation: scored at once and whole, for `evaluation.judge: teacher`."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.rollout.engines import Engines
from opd_async.actors.rollout.generation import Generation
from opd_async.errors import EngineError
from opd_async.role import Role
from opd_async.transport import messages as m

log = logging.getLogger(__name__)

TRIES = 3
"""How often a teacher is asked about one response; a breaker lets the next try wait while its engine is down."""


class Comparing:
    """Asks teacher engines about responses of evaluations; about none unless the topology says so."""

    def __init__(self, role: Role, engines: Engines) -> None:
        self._role = role
        sets = role.plan.topology.evaluation_sets
        self._sets = frozenset(name for name, one in sets.items() if one.judge == "teacher")
        self._engines = engines

    def wants(self, lease: m.Lease) -> bool:
        """Whether the response to this lease is to be compared: sampled by the student, as in training."""
        sampled = lease.kind == m.LeaseKind.EVAL_STUDENT and lease.temperature == 1.0
        return sampled and lease.evaluation_set in self._sets

    async def teacher_logprobs(self, generation: Generation) -> NDArray[np.float32] | None:
        """The teacher's logprobs float32[n] of a response that has ended; None if it could not be asked.

        It reads its own prompt where it has one. On cancel: the request is given up.
        """
        lease = generation.lease
        prompt = lease.prompt if lease.teacher_prompt is None else lease.teacher_prompt
        ids = np.concatenate([prompt, generation.response()]).astype(np.int32)
        for _ in range(TRIES):
            engine = self._engines.teacher_of(lease.teacher, lease.sample_id)
            guard = self._engines.guards[engine.url]
            await guard.admission()
            try:
                (scores,) = await engine.score([(ids, len(prompt))])
            except EngineError as error:
                guard.failed(error)
                self._role.count("engine_errors")
                self._role.metrics["opd_rollout_engine_errors_total"].labels(error.fault.value).inc()
                log.warning("the teacher could not be asked about a response of an evaluation: %s", error)
            else:
                guard.succeeded()
                return scores.logprobs
        return None
