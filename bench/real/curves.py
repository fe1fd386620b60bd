"""What the runs come to: students, what they have cost and how near they are to the teacher; as tables and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from opd_async.bench.real.distance import Distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A student after `step`: what it has cost since training began, and how near it is to the teacher."""

    step: int
    tokens: float
    seconds: float
    cpu_s: float
    found: Distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run of one system; `memory` is the peak of all its processes, in bytes, `age` that of a token, in steps."""

    system: str
    settings: str
    seed: int
    memory: int
    age: float
    points: tuple[Point, ...]


def read_curve(file: Path) -> Curve:
    """A curve that was written as JSON."""
    row = json.loads(file.read_text())
    points = [Point(**(point | {"found": Distance(**point["found"])})) for point in row["points"]]
    return Curve(**(row | {"points": tuple(points)}))


def table(curves: Sequence[Curve]) -> str:
    """Markdown: a row for each student that was measured."""
    names = ["system", "settings", "seed", "step", "tokens", "s", "CPU s", "CPU s / 1,000 tokens", "tokens/s"]
    names += ["reverse KL", "length", "ended", "peak memory"]
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(names) - 2)]
    for curve in curves:
        for point in curve.points:
            found, began = point.found, point.tokens > 0
            cells = [curve.system, curve.settings or "as given", str(curve.seed), str(point.step)]
            cells += [f"{point.tokens:,.0f}", f"{point.seconds:,.0f}", f"{point.cpu_s:,.0f}"]
            cells += [f"{1000 * point.cpu_s / point.tokens:.1f}" if began else "-"]
            cells += [f"{point.tokens / point.seconds:.1f}" if began else "-"]
            cells += [f"{found.reverse_kl:.4f} ± {found.error:.4f}", f"{found.length:.1f}", f"{found.ended:.0%}"]
            lines.append("| " + " | ".join([*cells, f"{curve.memory / (1 << 30):.2f} GiB"]) + " |")
    return "\n".join(lines)


def means(curves: Sequence[Curve]) -> str:
    """Markdown: a row for each system and settings, means over seeds at the end, and the range of the distance."""
    names = ["system", "settings", "seeds", "age", "tokens", "CPU s / 1,000 tokens", "length", "reverse KL"]
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(names) - 2)]
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.system, curve.settings), []).append(curve)
    for (system, settings), runs in groups.items():
        last = [run.points[-1] for run in runs]
        found = [point.found.reverse_kl for point in last]
        cost = fmean(1000 * point.cpu_s / point.tokens for point in last)
        cells = [system, settings or "as given", str(len(runs)), f"{fmean(run.age for run in runs):.2f}"]
        cells += [f"{fmean(point.tokens for point in last):,.0f}", f"{cost:.1f}"]
        cells += [f"{fmean(point.found.length for point in last):.1f}"]
        lines.append("| " + " | ".join([*cells, f"{fmean(found):.4f} ({min(found):.4f} to {max(found):.4f})"]) + " |")
    return "\n".join(lines)
