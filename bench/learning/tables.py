"""Outcomes as tables: a line for what is compared, a mean over its seeds, and how far the seeds lie apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from opd_async.bench.learning.cells import REGIMES
from opd_async.bench.learning.runs import Outcome

Key = tuple[str, str, int, float]


def grouped(outcomes: Iterable[Outcome]) -> dict[Key, list[Outcome]]:
    """Those that differ in their seed alone, in the order in which they came; (regime, method, S, lr) is the key."""
    found: dict[Key, list[Outcome]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        found.setdefault((cell.regime, cell.method, cell.staleness, cell.lr), []).append(outcome)
    return found


def percent(values: Sequence[float]) -> str:
    """A mean in percent, with the lowest and the highest where there are several."""
    mean = f"{100 * fmean(values):5.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


HEADER = (
    f"{'regime':<8}{'method':<32}{'S':>2} {'lr':>7}{'runs':>5}  {'sampled, halfway':<22}{'sampled, end':<22}"
    f"{'greedy, end':<22}{'lowest':>7}{'age':>6}{'max':>4}{'ratio std':>10}{'tokens':>10}{'s':>6}"
)


def line(runs: Sequence[Outcome]) -> str:
    """One line of the table."""
    cell = runs[0].cell
    middle = [each.sampled[len(each.sampled) // 2] for each in runs]
    return (
        f"{cell.regime:<8}{cell.how.title:<32}{cell.staleness:>2} {cell.lr:>7g}{len(runs):>5}  {percent(middle):<22}"
        f"{percent([each.sampled[-1] for each in runs]):<22}{percent([each.greedy[-1] for each in runs]):<22}"
        f"{100 * min(each.lowest for each in runs):>7.1f}{fmean(each.staleness_mean for each in runs):>6.2f}"
        f"{max(each.staleness_max for each in runs):>4}{max(each.ratio_std for each in runs):>10.2f}"
        f"{fmean(each.tokens for each in runs):>10,.0f}{fmean(each.seconds for each in runs):>6.0f}"
    )


def table(part: str, outcomes: Sequence[Outcome]) -> str:
    """The whole table; percent of held-out prompts, mean over seeds and their range."""
    groups = grouped(outcomes)
    regimes = {key[0]: REGIMES[key[0]].title for key in groups}
    legend = "; ".join(f"{name}: {title}" for name, title in regimes.items())
    return "\n".join([f"{part} ({legend})", HEADER, *(line(runs) for runs in groups.values())])
