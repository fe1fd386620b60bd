"""The comparison as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd_async.bench.peers.curves import Curve, Summary
from opd_async.extras import need

COLOURS = ("#2ca02c", "#1f77b4", "#9467bd", "#ff7f0e", "#d62728", "#8c564b")


def table(rows: Sequence[Summary], targets: Sequence[float]) -> str:
    """Markdown: a row for each system and settings; a dash where a target was not reached by every run."""
    to = [f"{target:.0%}" for target in targets]
    names = ["system", "settings", "runs", *(f"s to {one}" for one in to), *(f"tokens to {one}" for one in to)]
    names += ["tokens/s", "sampled at the end", "greedy", "after s"]
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(names) - 2)]
    for row in rows:
        cells = [row.system, row.settings or "as given", str(row.runs)]
        cells += [_number(row.seconds_to[target], "{:.1f}") for target in targets]
        cells += [_number(row.tokens_to[target], "{:,.0f}") for target in targets]
        cells += [f"{row.tokens_per_s:,.0f}", f"{row.sampled:.1%}", f"{row.greedy:.1%}", f"{row.seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def draw(file: Path, curves: Sequence[Curve], targets: Sequence[float]) -> None:
    """Sampled pass@1 over seconds, and over tokens; a colour for each system and settings, a line for each run."""
    figure = need("matplotlib.figure", "plots", "a picture").Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = dict.fromkeys((curve.system, curve.settings) for curve in curves)
    colour = {one: COLOURS[index % len(COLOURS)] for index, one in enumerate(styles)}
    seen: set[tuple[str, str]] = set()
    for curve in curves:
        one = (curve.system, curve.settings)
        label = None if one in seen else f"{curve.system}, {curve.settings}" if curve.settings else curve.system
        seen.add(one)
        share = [100 * point.sampled for point in curve.points]
        line = {"color": colour[one], "label": label, "markersize": 3, "linewidth": 1.3}
        left.plot([point.seconds for point in curve.points], share, "o-", **line)
        right.plot([point.tokens / 1000 for point in curve.points], share, "o-", **line)
    for axes, unit in ((left, "seconds of training"), (right, "thousand trained tokens")):
        axes.set(xlabel=unit, ylim=(None, 100.5), xlim=(0, None))
        axes.grid(alpha=0.3)
        for target in targets:
            axes.axhline(100 * target, color="black", linewidth=0.7, linestyle=":")
    left.set_ylabel("held-out pass@1 at T = 1, %")
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=120)
