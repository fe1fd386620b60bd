"""Held-out pass@1 over seconds and over tokens: what one training run of one system comes to."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["sampled", "greedy"]


@dataclass(frozen=True, slots=True)
class Tick:
    """A step has ended at `time` (since 1970): seconds since training began, and tokens trained since then."""

    step: int
    seconds: float
    tokens: float
    time: float


@dataclass(frozen=True, slots=True)
class Point:
    """The student after `step`: shares of right answers to the held-out prompts, in [0, 1]."""

    step: int
    seconds: float
    tokens: float
    sampled: float
    greedy: float


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: points in their order, the first before any step."""

    system: str
    settings: str
    seed: int
    points: tuple[Point, ...]

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens per second over the whole run."""
        return self.points[-1].tokens / self.points[-1].seconds


def own_ticks(metrics: Iterable[Mapping[str, Any]], seconds: float) -> list[Tick]:
    """Ticks of a run of this project, from the rows of its `metrics.jsonl` and the `seconds` of its report.

    A row is written when the step's weights are in the engines. Training ends with the last row, so that it began
    `seconds` before it.
    """
    rows = [row for row in metrics if "evaluation" not in row]
    began, tokens, ticks = rows[-1]["time"] - seconds, 0.0, []
    for row in rows:
        tokens += row["tokens"]
        ticks.append(Tick(int(row["step"]), row["time"] - began, tokens, row["time"]))
    return ticks


def reached(points: Sequence[Point], target: float, kind: Kind = "sampled") -> tuple[float, float] | None:
    """Seconds and tokens at which pass@1 first was `target`, on straight lines between points; None if it never was."""
    for before, after in itertools.pairwise(points):
        low, high = getattr(before, kind), getattr(after, kind)
        if high >= target:
            share = (target - low) / (high - low) if high > low else 1.0
            part = max(share, 0.0)
            return (
                before.seconds + part * (after.seconds - before.seconds),
                before.tokens + part * (after.tokens - before.tokens),
            )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Means over the runs of one system with one set of settings; None where a run did not get there."""

    system: str
    settings: str
    runs: int
    seconds_to: Mapping[float, float | None]
    tokens_to: Mapping[float, float | None]
    tokens_per_s: float
    sampled: float
    greedy: float
    seconds: float


def summarize(curves: Iterable[Curve], targets: Sequence[float]) -> list[Summary]:
    """One summary for each system and settings, in the order of their first runs."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.system, curve.settings), []).append(curve)
    return [_summary(group, targets) for group in groups.values()]


def _summary(group: Sequence[Curve], targets: Sequence[float]) -> Summary:
    found = {target: [reached(curve.points, target) for curve in group] for target in targets}
    last = [curve.points[-1] for curve in group]
    return Summary(
        system=group[0].system,
        settings=group[0].settings,
        runs=len(group),
        seconds_to={target: _mean(one and one[0] for one in runs) for target, runs in found.items()},
        tokens_to={target: _mean(one and one[1] for one in runs) for target, runs in found.items()},
        tokens_per_s=statistics.fmean(curve.tokens_per_s for curve in group),
        sampled=statistics.fmean(point.sampled for point in last),
        greedy=statistics.fmean(point.greedy for point in last),
        seconds=statistics.fmean(point.seconds for point in last),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else statistics.fmean(value for value in known if value is not None)
