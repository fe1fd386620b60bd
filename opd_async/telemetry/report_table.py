"""Write the report of a run as a table for people.

What was not measured is written as `-`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from opd_async.config.evaluating import HELD_OUT
from opd_async.telemetry.report import Evaluated, Evaluation, Interval, Report, Stages

WIDTH = 86


def render(report: Report, files: Sequence[tuple[str, Path]] = (), commands: Sequence[tuple[str, str]] = ()) -> str:
    """Return the report as a table of 86 columns.

    `files` and `commands` fill the closing block: (what it is, path) and (what it does, command line).
    """
    rule = "─" * WIDTH
    blocks = [
        *(list(_evaluations(name, found)) for name, found in report.evaluated.items()),
        list(_stages(report.stages, "stage" if report.this_launch is None else "whole run")),
        [] if report.this_launch is None else list(_stages(report.this_launch.stages, "this launch")),
        list(_figures(report)),
        list(_trouble(report)),
        list(_closing(files, commands)),
    ]
    parts = ["━" * WIDTH, *_head(report), "━" * WIDTH]
    for block in blocks:
        if block:
            parts += [*block, rule]
    return "\n".join([*parts[:-1], "━" * WIDTH])


def _head(report: Report) -> Iterator[str]:
    whole = f"{_counted(report.steps, 'step')} in {_duration(report.seconds)}"
    launch = report.this_launch
    if launch is None:
        yield f" {report.name}: {whole}"
        return
    yield f" {report.name}, the whole run: {whole}"
    last = launch.first_step + launch.steps - 1
    which = (
        f"steps {launch.first_step} to {last}" if launch.steps > 1 else f"step {last}" if launch.steps else "no step"
    )
    yield f" {report.name}, this launch: {which} in {_duration(launch.seconds)}"


def _evaluations(name: str, evaluated: Evaluated) -> Iterator[str]:
    """What was found on one set."""
    rows = (
        ("teacher", evaluated.teacher),
        *evaluated.teachers.items(),
        ("student before training", evaluated.student_before),
        ("student after training", evaluated.student_after),
    )
    if all(evaluation is None for _, evaluation in rows):
        return
    first = next(evaluation for _, evaluation in rows if evaluation is not None)
    if name != HELD_OUT:
        yield f" on {name}"
    if first.pass_at_1 is None:
        forward = "" if first.forward_kl is None else "forward"
        yield f" {'reverse KL, 95 % interval':<26}{'nats a token':<34}{forward:>8}{'length':>8}{'ended':>9}"
        yield from (_distance(label, found) for label, found in rows if found is not None)
        return
    many = f", avg@{first.samples_per_prompt}" if first.samples_per_prompt > 1 else ""
    yield f" {'pass@1, 95 % interval':<24}{f'sampled, T = {first.temperature:g}{many}':<32}greedy"
    for label, found in rows:
        if found is None:
            continue
        sampled = _passed(found.pass_at_1, found.pass_at_1_interval, found.prompts)
        greedy = _passed(found.pass_at_1_greedy, found.pass_at_1_greedy_interval, found.prompts)
        yield f" {label:<24}{sampled:<32}{greedy}"


def _distance(label: str, found: Evaluation) -> str:
    """A row of an evaluation that the teacher judges."""
    kl = _number(found.reverse_kl, 4)
    if found.reverse_kl_interval is not None:
        low, high = found.reverse_kl_interval
        kl += f" ({low:.4f} to {high:.4f}, n={found.prompts})"
    forward = "" if found.forward_kl is None else _number(found.forward_kl, 4)
    return f" {label:<26}{kl:<34}{forward:>8}{_number(found.response_tokens, 1):>8}{_percent(found.ended_share):>9}"


def _stages(stages: Stages, title: str) -> Iterator[str]:
    yield f" {title:<24}{'tokens':>14}{'tokens/s':>14}{'idle':>12}"
    for name, stage in (("rollout", stages.rollout), ("teacher", stages.teacher), ("learner", stages.learner)):
        if stage is not None:
            yield f" {name:<24}{stage.tokens:>14,}{stage.tokens_per_s:>14,.0f}{_percent(stage.idle_share):>12}"


def _figures(report: Report) -> Iterator[str]:
    age, latency, sync = report.staleness, report.score_latency, report.weight_sync
    rows = (
        ("trained", f"{report.trained_tokens:,} tokens of {report.trained_samples:,} samples"),
        ("size of steps", _size(report)),
        (
            "staleness",
            f"mean {_number(age.mean, 2)}, p99 {_number(age.p99)}, max {_number(age.max)} steps "
            f"({_bound(report.max_staleness)})",
        ),
        ("deadline cuts", f"{report.cuts:,}, recompute factor {_number(report.recompute_factor, 3)}"),
        ("score latency", f"p50 {_seconds(latency.p50_s)}, p99 {_seconds(latency.p99_s)} after a sample's last token"),
        ("teacher prefix cache", f"{_percent(report.prefix_hit_share)} of its tokens"),
        (
            "weight sync",
            f"{_counted(sync.updates, 'update')}: learner {_seconds(sync.blocked_s)}, "
            f"engines paused {_seconds(sync.engines_blocked_s)}",
        ),
    )
    unscored = report.stages.teacher is None
    for name, text in rows:
        if (unscored and name in ("score latency", "teacher prefix cache")) or not text:
            continue
        yield f" {name:<24}{text}"


def _size(report: Report) -> str:
    """Steps against their budget; nothing where they have none."""
    if report.budget_share is None:
        return ""
    least_most = report.budget_share_range
    span = "" if least_most is None else f" ({least_most[0]:.2f} to {least_most[1]:.2f})"
    return f"{report.budget_share:.2f} budgets{span}"


def _trouble(report: Report) -> Iterator[str]:
    """Write a line for each kind of trouble; a run without any says so in one line."""
    restarts = ", ".join(f"{role} {times}" for role, times in report.restarts.items())
    counters = [f"{name.replace('_', ' ')} {times:,}" for name, times in report.counters.items() if times]
    here = "" if report.this_launch is None else " in this launch"
    yield f" {'restarts':<24}{restarts or 'none'}{here}"
    for one in report.suspect:
        steps = f", trained in steps {one.steps[0]} to {one.steps[-1]}" if one.steps else ", not trained"
        yield f" {'suspect scores':<24}{one.tokens:,} tokens of {one.engine}{steps}"
    if report.slow_engines:
        slow = ", ".join(f"{name} {times}" for name, times in report.slow_engines.items())
        yield f" {'slow engines':<24}{slow}"
    if report.skipped_prompts:
        yield f" {'skipped prompts':<24}{report.skipped_prompts:,}"
    lines: list[str] = []
    for counter in counters:  # wrapped between entries, never inside one
        if lines and len(lines[-1]) + len(counter) + 2 <= WIDTH - 25:
            lines[-1] += f", {counter}"
        else:
            lines.append(counter)
    for index, line in enumerate(lines):
        yield f" {f'counted{here}' if index == 0 else '':<24}{line}"


def _closing(files: Sequence[tuple[str, Path]], commands: Sequence[tuple[str, str]]) -> Iterator[str]:
    if files or commands:
        yield " What to do next"
    for what, path in files:
        yield f"   {what:<22}{path}"
    for what, command in commands:
        yield f"   {what}:"
        yield f"     {command}"


def _passed(share: float | None, interval: Interval | None, prompts: int) -> str:
    if share is None or interval is None:
        return "-"
    low, high = interval
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f}, n={prompts})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:,.1f} s"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{seconds:.1f} s"


def _bound(max_staleness: int | None) -> str:
    return "no bound" if max_staleness is None else f"bound {max_staleness}"
