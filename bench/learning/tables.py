"""Outcomes as tables: a line for what is compared, a mean over its seeds, and how far the seeds lie apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from opd_async.bench.learning.cells import REGIMES, Cell
from opd_async.bench.learning.runs import Outcome

Key = tuple[str, str, str, int | None, float]
PARTS_OF_TOKENS = (0.2, 0.4, 0.6, 0.8, 1.0)


def grouped(outcomes: Iterable[Outcome]) -> dict[Key, list[Outcome]]:
    """Those that differ in their seed alone, in the order in which they came.

    The key is (regime, method, rule, S, lr).
    """
    found: dict[Key, list[Outcome]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        found.setdefault((cell.regime, cell.method, cell.rule, cell.staleness, cell.lr), []).append(outcome)
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
        f"{cell.regime:<8}{cell.how.title:<32}{bound(cell):>2} {cell.lr:>7g}{len(runs):>5}  {percent(middle):<22}"
        f"{percent([each.sampled[-1] for each in runs]):<22}{percent([each.greedy[-1] for each in runs]):<22}"
        f"{100 * min(each.lowest for each in runs):>7.1f}{fmean(each.staleness_mean for each in runs):>6.2f}"
        f"{max(each.staleness_max for each in runs):>4}{max(each.ratio_std for each in runs):>10.2f}"
        f"{fmean(each.tokens for each in runs):>10,.0f}{fmean(each.seconds for each in runs):>6.0f}"
    )


def bound(cell: Cell) -> str:
    """The bound on staleness."""
    return "-" if cell.staleness is None else str(cell.staleness)


def tokens_table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each loss, rule and bound: pass@1 after equal tokens, as far as the shortest run went."""
    most = min((each.tokens for each in outcomes), default=0)
    marks = [round(part * most) for part in PARTS_OF_TOKENS]
    head = f"{'loss':<32}{'rule':<10}{'S':>2}{'runs':>5}{'budgets':>9}{'age':>6}{'max':>4}"
    lines = [head + "".join(f"{f'{mark:,}':>24}" for mark in marks)]
    for runs in grouped(outcomes).values():
        cell = runs[0].cell
        size, age = fmean(each.budgets for each in runs), fmean(each.staleness_mean for each in runs)
        lines.append(
            f"{cell.how.title:<32}{cell.rule:<10}{bound(cell):>2}{len(runs):>5}{size:>9.2f}{age:>6.2f}"
            f"{max(each.staleness_max for each in runs):>4}"
            + "".join(f"{percent([each.after(mark) for each in runs]):>24}" for mark in marks)
        )
    return lines


def table(part: str, outcomes: Sequence[Outcome]) -> str:
    """The whole table; percent of held-out prompts, mean over seeds and their range."""
    groups = grouped(outcomes)
    regimes = {key[0]: REGIMES[key[0]].title for key in groups}
    legend = "; ".join(f"{name}: {title}" for name, title in regimes.items())
    rows = tokens_table(outcomes) if part == "rules" else [HEADER, *(line(runs) for runs in groups.values())]
    return "\n".join([f"{part} ({legend})", *rows])
