"""Give a step's figures about responses to `metrics.jsonl` and to Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from opd_async.actors.intake.report import describe_distribution, describe_responses
from opd_async.actors.intake.steps import Taken
from opd_async.config.topology import Topology, TrainOn
from opd_async.scheduling.segments import Segment
from opd_async.telemetry.exporter import RoleMetrics


class StepFigures:
    """The figures of one step after the other."""

    def __init__(self, topology: Topology, metrics: RoleMetrics) -> None:
        schedule = topology.schedule
        self._budget = schedule.tokens_per_step if schedule.train_on is TrainOn.TOKENS else None
        self._several = len(topology.teachers) > 1
        self._metrics = metrics

    def of_step(self, trained: Sequence[Taken], segments: Sequence[Segment]) -> dict[str, float]:
        """Return the columns of a step's row, and set the metrics."""
        stats = describe_responses(trained) | describe_distribution(segments, several=self._several)
        if self._budget is not None:
            stats["budget_share"] = sum(segment.tokens for segment in segments) / self._budget
        self._export(trained, stats)
        return stats

    def _export(self, trained: Sequence[Taken], stats: dict[str, float]) -> None:
        metrics = self._metrics
        for one in trained:
            if one.complete:
                metrics["opd_intake_response_tokens"].observe(one.end)
        for column in ("at_limit_share", "prompt_tokens_mean", "sampled_entropy", "budget_share"):
            metrics[f"opd_intake_{column}"].set(stats.get(column))
        for column, value in stats.items():
            name, _, teacher = column.partition(".")
            if teacher:
                metrics[f"opd_intake_{name}"].labels(teacher).set(value)
