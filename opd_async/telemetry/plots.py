"""Draw pictures of a run, without a display. matplotlib is loaded on first use, which takes a second.

Call these from a thread (`asyncio.to_thread`) when an event loop is waiting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_async.extras import need
from opd_async.telemetry.report import Evaluation, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLED = "#1f6fb2"
_GREEDY = "#d9772b"
_KL = "#4a4a4a"
_SMOOTH_REACH = 10
_SMOOTH_FROM = 40


def learning_curve(
    path: Path, student: Sequence[Evaluation], teacher: Evaluation | None, reverse_kl: Sequence[tuple[int, float]]
) -> None:
    """Draw pass@1 and reverse KL against optimizer steps into a PNG, whole or not at all.

    `student`: evaluations in any order. `teacher`: drawn as dashed lines. `reverse_kl`: (step, nats per token), by
    step; of more than 40, a mean is drawn as well. Values that are not finite are left out, and so is a panel without
    data. Raises `OSError`, `InputError` without matplotlib, and `ValueError` if there is nothing to draw.
    """
    finite_kl = [(step, value) for step, value in reverse_kl if math.isfinite(value)]
    student = sorted(student, key=lambda found: found.step)
    distances = [
        (found.step, found.reverse_kl, found.reverse_kl_interval or (found.reverse_kl, found.reverse_kl))
        for found in student
        if found.reverse_kl is not None
    ]
    student = [found for found in student if found.pass_at_1 is not None]
    panels = [bool(student or teacher), bool(finite_kl or distances)]
    if not any(panels):
        raise ValueError("no evaluation and no step to draw")
    purpose = "the picture of a run"
    canvas = need("matplotlib.backends.backend_agg", "plots", purpose).FigureCanvasAgg
    figure = need("matplotlib.figure", "plots", purpose).Figure(
        figsize=(8, 3.4 * sum(panels) + 0.4), dpi=150, layout="constrained"
    )
    canvas(figure)  # no pyplot: no global state, no display
    axes = list(figure.subplots(sum(panels), 1, sharex=True, squeeze=False)[:, 0])
    if panels[0]:
        _draw_pass_at_1(axes[0], student, teacher)
    if panels[1]:
        _draw_reverse_kl(axes[-1], finite_kl, distances)
    axes[-1].set_xlabel("optimizer step")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
    fresh = path.with_name(f"{path.name}.new")
    figure.savefig(fresh, format="png")
    fresh.replace(path)


def _draw_pass_at_1(axes: Axes, student: Sequence[Evaluation], teacher: Evaluation | None) -> None:
    steps = [found.step for found in student]
    sampled = _points((found.pass_at_1, found.pass_at_1_interval) for found in student)
    greedy = _points((found.pass_at_1_greedy, found.pass_at_1_greedy_interval) for found in student)
    if student:
        _draw_with_intervals(axes, steps, greedy, _GREEDY, "student, greedy")
        _draw_with_intervals(axes, steps, sampled, _SAMPLED, "student, sampled (T = 1)")
    if teacher is not None:
        levels = (("greedy", teacher.pass_at_1_greedy, _GREEDY), ("sampled (T = 1)", teacher.pass_at_1, _SAMPLED))
        for name, level, colour in levels:
            assert level is not None
            label = f"teacher, {name}: {100 * level:.1f} %"
            axes.axhline(100 * level, color=colour, linestyle=(0, (5, 3)), linewidth=1.1, label=label)
    axes.set_ylabel("pass@1 (%)")
    axes.set_ylim(-2, 104)
    axes.set_title("Held-out prompts: pass@1 with 95 % intervals", loc="left", fontsize=10.5)
    axes.legend(fontsize=8.5, loc="lower right", framealpha=0.9, edgecolor="none")


def _points(found: Iterable[tuple[float | None, Interval | None]]) -> list[tuple[float, Interval]]:
    """Those that were measured."""
    return [(value, interval) for value, interval in found if value is not None and interval is not None]


def _draw_with_intervals(
    axes: Axes, steps: Sequence[int], points: Sequence[tuple[float, Interval]], colour: str, label: str
) -> None:
    middle = [100 * value for value, _ in points]
    # A proportion's interval is not symmetric, and at 0 % or 100 % rounding may put its end on the wrong side.
    below = [max(0.0, 100 * (value - low)) for value, (low, _) in points]
    above = [max(0.0, 100 * (high - value)) for value, (_, high) in points]
    axes.errorbar(
        steps,
        middle,
        yerr=[below, above],
        color=colour,
        marker="o",
        markersize=4,
        linewidth=1.6,
        elinewidth=1.0,
        capsize=2.5,
        label=f"{label}: {middle[-1]:.1f} % at step {steps[-1]}",
    )


def _draw_reverse_kl(
    axes: Axes, reverse_kl: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float, Interval]]
) -> None:
    steps = [step for step, _ in reverse_kl]
    values = [value for _, value in reverse_kl]
    if held_out:
        at = [step for step, _, _ in held_out]
        middle = [value for _, value, _ in held_out]
        reach = [[value - low for _, value, (low, _) in held_out], [high - value for _, value, (_, high) in held_out]]
        label = f"held-out prompts: {middle[-1]:.4f} at step {at[-1]}"
        axes.errorbar(at, middle, yerr=reach, color=_SAMPLED, marker="o", markersize=4, capsize=2.5, label=label)
    if len(values) > _SMOOTH_FROM:
        axes.plot(steps, values, color=_KL, alpha=0.35, linewidth=0.9, label="each step")
        inner = steps[_SMOOTH_REACH:-_SMOOTH_REACH]
        axes.plot(
            inner, _centred_mean(values), color=_KL, linewidth=1.8, label=f"mean over {2 * _SMOOTH_REACH + 1} steps"
        )
    elif values:
        axes.plot(steps, values, color=_KL, marker="o", markersize=4, linewidth=1.6, label="each step")
    axes.set_ylim(bottom=min(0.0, *values, *(low for _, _, (low, _) in held_out)))
    axes.set_ylabel("reverse KL (nats per token)")
    where = "Training and held-out prompts" if held_out else "Training"
    axes.set_title(f"{where}: reverse KL from student to teacher", loc="left", fontsize=10.5)
    axes.legend(fontsize=8.5, loc="upper right", framealpha=0.9, edgecolor="none")


def _centred_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its 10 neighbours on either side, without the first and the last 10 values."""
    width = 2 * _SMOOTH_REACH + 1
    return [sum(values[start : start + width]) / width for start in range(len(values) - width + 1)]
