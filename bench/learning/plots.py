"""Learning curves and staleness, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from opd_async.bench.learning.cells import METHODS, REGIMES, SHOWN, SIGNALS
from opd_async.bench.learning.runs import Outcome
from opd_async.bench.learning.tables import bound, grouped
from opd_async.extras import need

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

COLOURS = {name: f"C{index}" for names in (METHODS, SIGNALS, SHOWN) for index, name in enumerate(names)}


def draw(file: Path, part: str, outcomes: Sequence[Outcome]) -> None:
    """The picture of a part, as PNG."""
    {"staleness": draw_staleness, "rules": draw_rules}.get(part, draw_curves)(file, outcomes)


def draw_curves(file: Path, outcomes: Sequence[Outcome]) -> None:
    """pass@1 against steps, one column a regime: means over seeds, with a band from the lowest to the highest."""
    regimes = list(dict.fromkeys(outcome.cell.regime for outcome in outcomes))
    figure = need("matplotlib.figure", "plots", "a picture").Figure(
        figsize=(1.5 + 4.5 * len(regimes), 7.2), layout="constrained"
    )
    panels = figure.subplots(2, len(regimes), squeeze=False, sharex=True)
    for column, regime in enumerate(regimes):
        for (name, method, _, _, lr), runs in grouped(outcomes).items():
            if name == regime:
                label = runs[0].cell.how.title + (f", lr {lr:g}" if runs[0].cell.part == "rates" else "")
                band(panels[0, column], method, label, runs[0].steps, [each.sampled for each in runs])
                band(panels[1, column], method, label, runs[0].steps, [each.greedy for each in runs])
        panels[0, column].set(title=REGIMES[regime].title, ylabel="pass@1, sampled at T = 1 (%)")
        panels[1, column].set(xlabel="optimizer step", ylabel="pass@1, greedy (%)")
    lines: dict[str, Artist] = {}
    for axes in panels.flatten():
        axes.grid(alpha=0.3)
        lines |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(list(lines.values()), list(lines), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=120)


def band(axes: Axes, method: str, label: str, steps: Sequence[int], curves: Sequence[Sequence[float]]) -> None:
    """One method's curve over all its seeds, in percent."""
    columns = [[100 * value for value in column] for column in zip(*curves, strict=True)]
    axes.plot(steps, [fmean(column) for column in columns], "o-", color=COLOURS[method], markersize=3.5, label=label)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(steps, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)


def draw_rules(file: Path, outcomes: Sequence[Outcome]) -> None:
    """pass@1 against trained tokens, a panel for each loss and a line for each rule and bound: means over seeds."""
    methods = list(dict.fromkeys(outcome.cell.method for outcome in outcomes))
    figure = need("matplotlib.figure", "plots", "a picture").Figure(
        figsize=(1.5 + 4.5 * len(methods), 4.2), layout="constrained"
    )
    for axes, name in zip(figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods, strict=True):
        for (_, method, rule, _, _), runs in grouped(outcomes).items():
            if method != name:
                continue
            tokens = np.linspace(0, min(each.tokens for each in runs), 25).astype(int).tolist()
            curve = [100 * fmean(each.after(at) for each in runs) for at in tokens]
            axes.plot(tokens, curve, "-" if rule == "filled" else "--", label=f"{rule}, S = {bound(runs[0].cell)}")
        axes.set(title=SIGNALS[name].title, xlabel="trained tokens", ylabel="pass@1, sampled at T = 1 (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def draw_staleness(file: Path, outcomes: Sequence[Outcome]) -> None:
    """pass@1 at the end against the bound, and against the measured drift: means over seeds, lowest and highest."""
    figure = need("matplotlib.figure", "plots", "a picture").Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, signal in SIGNALS.items():
        mine = [runs for (_, method, _, _, _), runs in grouped(outcomes).items() if method == name]
        style = {"color": COLOURS[name], "markersize": 5, "label": signal.title, "capsize": 3}
        middle = [fmean(ends(runs)) for runs in mine]
        below = [mean - min(ends(runs)) for mean, runs in zip(middle, mine, strict=True)]
        above = [max(ends(runs)) - mean for mean, runs in zip(middle, mine, strict=True)]
        left.errorbar([runs[0].cell.staleness for runs in mine], middle, (below, above), fmt="o-", **style)
        right.errorbar(
            [max(each.ratio_std for each in runs) for runs in mine], middle, (below, above), fmt="o", **style
        )
    left.set(xlabel="schedule.max_staleness (steps)", ylabel="pass@1 after training, sampled at T = 1 (%)")
    right.set(xlabel="drift: largest standard deviation of p / mu in a step", xscale="symlog")
    left.set(ylim=(-2, 102))
    left.legend(fontsize=8, loc="best")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def ends(runs: Sequence[Outcome]) -> list[float]:
    """pass@1 of each run after the last step, percent."""
    return [100 * each.sampled[-1] for each in runs]
