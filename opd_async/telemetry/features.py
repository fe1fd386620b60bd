"""Which of the things that a run may do without this run does: its metrics have series for no others."""

from __future__ import annotations

from opd_async.config.rewards import RewardKind
from opd_async.config.topology import Topology, TrainOn
from opd_async.telemetry.metrics import Feature


def features_of(topology: Topology) -> frozenset[Feature]:
    """The features of a run."""
    schedule = topology.schedule
    does = {
        Feature.REWARDS: topology.reward.kind is not RewardKind.NONE,
        Feature.TEACHERS: len(topology.teachers) > 1,
        Feature.FILTER: schedule.filter is not None,
        Feature.BUDGET: schedule.train_on is TrainOn.TOKENS,
        Feature.BOUND: schedule.max_staleness is not None,
        Feature.EVALUATION: bool(topology.evaluation_sets),
        Feature.SLOW_ENGINES: topology.supervisor.slow_engine is not None,
        Feature.TRACKERS: bool(topology.tracking.trackers),
        Feature.EPISODES: topology.rollout.function is not None,
        Feature.ENDPOINT: topology.rollout.endpoint,
        Feature.TOOLS: bool(topology.rollout.tools.functions),
        Feature.UPLOADS: topology.checkpoint.upload is not None,
    }
    return frozenset(feature for feature, on in does.items() if on)
