"""A rollout actor's way to rewards: whose responses are judged, and what is counted of it."""

from __future__ import annotations

import time

import numpy as np

from opd_async.actors.rewards.pool import RewardPool
from opd_async.actors.rollout.generation import Generation
from opd_async.plan.resolve import PLAN_FILE
from opd_async.role import Role
from opd_async.transport import messages as m


class Judging:
    """The reward pool of one rollout actor; none where the topology has no reward."""

    def __init__(self, role: Role) -> None:
        topology = role.plan.topology
        self._role = role
        self._section = topology.reward
        sets = topology.evaluation_sets
        self._sets = frozenset(name for name, one in sets.items() if one.judge == "reward")
        self._pool: RewardPool | None = None
        if self._section.kind.facts.pool:
            self._pool = RewardPool(self._section, role.plan.run_folder / PLAN_FILE)

    def start(self) -> None:
        """Start the workers under the role's task group."""
        if self._pool is not None:
            for index in range(self._section.workers):
                self._role.spawn(self._pool.run(), f"reward-worker-{index}")

    def wants(self, lease: m.Lease) -> bool:
        """Whether the response to this lease is to be judged."""
        return self._pool is not None and (lease.kind == m.LeaseKind.TRAIN or lease.evaluation_set in self._sets)

    async def judge(self, generation: Generation) -> float | None:
        """Judge a response that has ended; None where it could not be judged, which is counted.

        On cancel: the worker's answer is dropped.
        """
        assert self._pool is not None
        lease, began = generation.lease, time.monotonic()
        response = generation.response()
        finished = generation.finish is m.Finish.STOP
        reward = await self._pool.reward(
            np.asarray(lease.prompt, np.int32), response, lease.label, lease.metadata, finished
        )
        metrics = self._role.metrics
        metrics["opd_rollout_reward_seconds"].observe(time.monotonic() - began)
        if reward.failure:
            self._role.count("reward_failures")
            metrics["opd_rollout_reward_failures_total"].labels(reward.failure).inc()
        return reward.value
