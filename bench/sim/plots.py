"""Pictures of simulated schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_async.bench.sim.figures import Row
from opd_async.extras import need

COLOURS = {
    "sync": "#7f7f7f",
    "one_step_off": "#8c564b",
    "two_step_off": "#e377c2",
    "sample_stream": "#ff7f0e",
    "whole_samples": "#1f77b4",
    "deadline_cuts": "#2ca02c",
    "stream_1.5": "#ffbb78",
    "partial": "#17becf",
    "filled": "#d62728",
    "drop": "#9467bd",
    "colocated": "#bcbd22",
}
"""By schedule, or by what its name begins with: a setting may follow."""
MARKERS = {
    "sync": "s",
    "one_step_off": "D",
    "two_step_off": "v",
    "sample_stream": "^",
    "whole_samples": "P",
    "filled": "*",
}


def _colour(schedule: str) -> str:
    """The colour of a schedule, whatever its setting; `StopIteration` for one that has none."""
    return COLOURS.get(schedule) or next(colour for name, colour in COLOURS.items() if schedule.startswith(f"{name}_"))


def draw_schedules(file: Path, rows: Sequence[Row], title: str) -> None:
    """Throughput against the oldest token, and against the last token's wait for its score."""
    figure = need("matplotlib.figure", "plots", "a picture").Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    streamed = [row for row in rows if row.scoring == "streamed"]
    for name in dict.fromkeys(row.schedule for row in streamed):
        mine = [row for row in streamed if row.schedule == name]
        style = {"color": _colour(name), "marker": MARKERS.get(name, "o"), "markersize": 8}
        left.plot([r.age_max for r in mine], [r.share_of_bound for r in mine], label=name, linewidth=1.5, **style)
    for row in rows:
        filled = row.scoring == "streamed"
        face = _colour(row.schedule) if filled else "none"
        marker = MARKERS.get(row.schedule, "o")
        right.plot(
            row.score_p99_s, row.share_of_bound, marker, color=_colour(row.schedule), markerfacecolor=face, markersize=8
        )
    left.set(xlabel="age of the oldest trained token (steps)", ylabel="share of the bound", ylim=(0, 1.08))
    left.legend(loc="lower right", fontsize=8)
    right.set(xlabel="last token to its score, p99 (s); hollow: whole samples scored", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"Schedules: {title}")
    figure.savefig(file, dpi=120)


def draw_sweep(file: Path, sweeps: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str) -> None:
    """One panel a sweep, which is named "figure against setting"; each line is a schedule: (setting, figure)."""
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure = need("matplotlib.figure", "plots", "a picture").Figure(
        figsize=(4.4 * columns, 3.4 * lines), layout="constrained"
    )
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, curves) in zip(panels, sweeps.items(), strict=False):
        for schedule, points in curves.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", markersize=4, label=schedule)
            if max(x) > 7 * min(x) > 0:
                axes.set_xscale("log", base=2)
                axes.set_xticks(x, [f"{value:g}" for value in x])
        ylabel, _, xlabel = name.partition(" against ")
        axes.set(xlabel=xlabel, ylabel=ylabel.replace("_", " "), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels[len(sweeps) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
