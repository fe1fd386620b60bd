"""Draw pictures of a run, without a display. matplotlib is loaded on first use, which takes a second.

Call these from a thread (`asyncio.to_thread`) when an event loop is waiting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd_async.config.evaluating import HELD_OUT
from opd_async.extras import need
from opd_async.telemetry.report import Evaluation, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLED = "#1f6fb2"
_GREEDY = "#d9772b"
_KL = "#4a4a4a"
_SETS = (_SAMPLED, _GREEDY, "#3a923a", "#8a4fbf", "#b5452f")
_SMOOTH_REACH = 10
_SMOOTH_FROM = 40


def learning_curve(
    path: Path,
    student: Sequence[Evaluation],
    teachers: Mapping[str, Evaluation],
    reverse_kl: Sequence[tuple[int, float]],
) -> None:
    """Draw pass@1 on each evaluation set, and reverse KL, against optimizer steps into a PNG, whole or not at all.

    `student`: evaluations in any order. `teachers`: by set, drawn as dashed lines. `reverse_kl`: (step, nats per
    token), by step; of more than 40, a mean is drawn as well. Values that are not finite are left out, and so is a
    panel without data. Raises `OSError`, `InputError` without matplotlib, and `ValueError` if there is nothing to draw.
    """
    finite_kl = [(step, value) for step, value in reverse_kl if math.isfinite(value)]
    student = sorted(student, key=lambda found: found.step)
    distances = [found for found in student if found.reverse_kl is not None]
    right = [found for found in student if found.pass_at_1 is not None]
    judged = list(dict.fromkeys([*(found.set for found in right), *teachers]))
    with_kl = bool(finite_kl or distances)
    panels = len(judged) + with_kl
    if not panels:
        raise ValueError("no evaluation and no step to draw")
    purpose = "the picture of a run"
    canvas = need("matplotlib.backends.backend_agg", "plots", purpose).FigureCanvasAgg
    figure = need("matplotlib.figure", "plots", purpose).Figure(
        figsize=(8, 3.4 * panels + 0.4), dpi=150, layout="constrained"
    )
    canvas(figure)  # no pyplot: no global state, no display
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for panel, name in zip(axes, judged, strict=False):
        _draw_pass_at_1(panel, name, [found for found in right if found.set == name], teachers.get(name))
    if with_kl:
        _draw_reverse_kl(axes[-1], finite_kl, distances)
    axes[-1].set_xlabel("optimizer step")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
    fresh = path.with_name(f"{path.name}.new")
    figure.savefig(fresh, format="png")
    fresh.replace(path)


def _draw_pass_at_1(axes: Axes, name: str, student: Sequence[Evaluation], teacher: Evaluation | None) -> None:
    steps = [found.step for found in student]
    sampled = _points((found.pass_at_1, found.pass_at_1_interval) for found in student)
    greedy = _points((found.pass_at_1_greedy, found.pass_at_1_greedy_interval) for found in student)
    if student:
        _draw_with_intervals(axes, steps, greedy, _GREEDY, "student, greedy")
        _draw_with_intervals(axes, steps, sampled, _SAMPLED, "student, sampled (T = 1)")
    if teacher is not None:
        levels = (("greedy", teacher.pass_at_1_greedy, _GREEDY), ("sampled (T = 1)", teacher.pass_at_1, _SAMPLED))
        for how, level, colour in levels:
            assert level is not None
            label = f"teacher, {how}: {100 * level:.1f} %"
            axes.axhline(100 * level, color=colour, linestyle=(0, (5, 3)), linewidth=1.1, label=label)
    axes.set_ylabel("pass@1 (%)")
    axes.set_ylim(-2, 104)
    axes.set_title(f"{_whose(name)}: pass@1 with 95 % intervals", loc="left", fontsize=10.5)
    axes.legend(fontsize=8.5, loc="lower right", framealpha=0.9, edgecolor="none")


def _whose(name: str) -> str:
    """The prompts of a set, in words."""
    return "Held-out prompts" if name == HELD_OUT else f"Prompts of {name}"


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


def _draw_reverse_kl(axes: Axes, reverse_kl: Sequence[tuple[int, float]], evaluations: Sequence[Evaluation]) -> None:
    steps = [step for step, _ in reverse_kl]
    values = [value for _, value in reverse_kl]
    lowest = [*values, 0.0]
    for place, name in enumerate(dict.fromkeys(found.set for found in evaluations)):
        lowest += _draw_distances(axes, name, [found for found in evaluations if found.set == name], place)
    if len(values) > _SMOOTH_FROM:
        axes.plot(steps, values, color=_KL, alpha=0.35, linewidth=0.9, label="each step")
        inner = steps[_SMOOTH_REACH:-_SMOOTH_REACH]
        axes.plot(
            inner, _centred_mean(values), color=_KL, linewidth=1.8, label=f"mean over {2 * _SMOOTH_REACH + 1} steps"
        )
    elif values:
        axes.plot(steps, values, color=_KL, marker="o", markersize=4, linewidth=1.6, label="each step")
    axes.set_ylim(bottom=min(lowest))
    axes.set_ylabel("reverse KL (nats per token)")
    where = "Training and held-out prompts" if evaluations else "Training"
    axes.set_title(f"{where}: reverse KL from student to teacher", loc="left", fontsize=10.5)
    axes.legend(fontsize=8.5, loc="upper right", framealpha=0.9, edgecolor="none")


def _draw_distances(axes: Axes, name: str, evaluations: Sequence[Evaluation], place: int) -> list[float]:
    """Draw the distances to the teacher on one set, the one in this place; return the lower ends of their intervals."""
    at = [found.step for found in evaluations]
    middle = [found.reverse_kl or 0.0 for found in evaluations]
    ends = [found.reverse_kl_interval or (value, value) for found, value in zip(evaluations, middle, strict=True)]
    below = [value - low for value, (low, _) in zip(middle, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(middle, ends, strict=True)]
    label = f"{_whose(name).lower()}: {middle[-1]:.4f} at step {at[-1]}"
    colour = _SETS[place % len(_SETS)]
    axes.errorbar(at, middle, yerr=[below, above], color=colour, marker="o", markersize=4, capsize=2.5, label=label)
    return [low for low, _ in ends]


def _centred_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its 10 neighbours on either side, without the first and the last 10 values."""
    width = 2 * _SMOOTH_REACH + 1
    return [sum(values[start : start + width]) / width for start in range(len(values) - width + 1)]
