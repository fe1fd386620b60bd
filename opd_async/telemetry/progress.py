"""Print a run's progress: a line every few seconds, and one for each event.

Plain lines, on a terminal too: a run lasts hours and is read later, in a scrolled terminal, a pipe or a log; a display
that redraws itself leaves nothing there, and its thread would hold the run up where nobody reads.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_async.config.evaluating import HELD_OUT
from opd_async.telemetry.length_drift import LengthDrift
from opd_async.telemetry.report import Evaluation
from opd_async.transport.messages import StepStarted

LINE_EVERY_S = 3.0
WIDTH = 80
"""Columns of a step's line where nothing is known of the terminal; a wider one gets longer lines."""
_TO_EACH = "teacher_kl."
ETA_STEPS = 21
"""The end is estimated from the latest twenty steps."""


class Progress:
    """Prints through `echo`; `steps` is the number of optimizer steps asked for."""

    def __init__(self, echo: Callable[[str], None], steps: int, drift: LengthDrift | None = None) -> None:
        """`drift` watches the lengths of responses; None: nobody does."""
        self._echo = echo
        self._drift = drift
        self.on_event: Callable[[str], None] = lambda text: None
        """Called with each line that is neither a step's nor an evaluation's."""
        self._steps = steps
        self._started = time.monotonic()
        self._last = 0.0
        self._tokens = 0.0
        self._since = time.monotonic()
        self._ended: deque[tuple[int, float]] = deque(maxlen=ETA_STEPS)
        self.missing: Callable[[], Sequence[str]] = lambda: ()
        """Says which roles are not up just now."""

    def say(self, text: str) -> None:
        """Print one line about an event, with the time since the start."""
        self._line(text)
        self.on_event(text)

    def _line(self, text: str) -> None:
        self._echo(f"{self._prefix()}{text}")

    def _prefix(self) -> str:
        return f"[{time.monotonic() - self._started:6.1f} s] "

    def step(self, step: int, learner: dict[str, float], started: StepStarted) -> None:
        """Print a line about a step, at most every few seconds; the last step always gets one."""
        stats = started.stats
        if self._drift is not None and (text := self._drift.step(stats.get("response_tokens_mean"))):
            self.say(text)
        self._tokens += stats["tokens"]
        now = time.monotonic()
        self._ended.append((step, now))
        if now - self._last < LINE_EVERY_S and step != self._steps:
            return
        rate = self._tokens / max(now - self._since, 1e-9)
        ages = started.staleness_counts
        width = max(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
        self._line(fitted(self._parts(step, stats | learner, rate, ages), width - len(self._prefix())))
        self._last, self._tokens, self._since = now, 0.0, now

    def _parts(self, step: int, figures: Mapping[str, float], rate: float, ages: Any) -> list[tuple[int, str]]:
        """What a step's line may have, in its order; of what does not fit, the highest number leaves first."""
        missing = self.missing()
        known = (
            (0, f"step {step}/{self._steps}", None),
            (1, f"{len(missing)} down: {missing[0]}" if missing else "", None),
            (2, f"ETA {in_words(self._left_s(step))}" if step < self._steps else "", None),
            (4, "reward {:.3f}", "reward_mean"),
            (3, "KL {:.3f}", "reverse_kl"),
            (6, "loss {:.3f}", "loss"),
            (5, "length {:,.0f}", "response_tokens_mean"),
            (9, "{:.0%} at the limit", "at_limit_share"),
            (1, f"{per_second(rate)} tokens/s", None),
            (8, "{:.0%} of the plan", "planned_share"),
            (7, "size {:.2f}", "budget_share"),
            (10, f"age {float(np.arange(len(ages)) @ ages / max(ages.sum(), 1)):.2f}", None),
            (11, "cuts {:.0f}", "cuts"),
            (12, "entropy {:.3f}", "sampled_entropy"),
            (13, "gradient {:.3g}", "grad_norm"),
            (14, "lr {:.3g}", "learning_rate"),
            (15, "p99 {:,.0f}", "response_tokens_p99"),
            (16, "prompts {:,.0f}", "prompt_tokens_mean"),
            (17, "ratio spread {:.3f}", "ratio_std"),
            *(
                (18, f"KL to {name.removeprefix(_TO_EACH)} {value:.3f}", None)
                for name, value in figures.items()
                if name.startswith(_TO_EACH)
            ),
        )
        return [
            (rank, text if name is None else text.format(figures[name]))
            for rank, text, name in known
            if text and (name is None or name in figures)
        ]

    def _left_s(self, step: int) -> float:
        """Seconds until the last step, at the pace of the latest ones; weight updates and evaluations included."""
        began, since = self._ended[0]
        if step == began:
            return math.nan
        return (self._steps - step) * (self._ended[-1][1] - since) / (step - began)

    def evaluation(self, who: str, result: Evaluation) -> None:
        """Print one line about an evaluation that has ended: its pass@1, or the distance to the teacher."""
        if result.pass_at_1 is None or result.pass_at_1_greedy is None:
            self._line(f"{who} at step {result.step}: {compared(result)}")
            return
        sampled = f"avg@{result.samples_per_prompt}" if result.samples_per_prompt > 1 else "pass@1"
        unjudged = f", {result.unjudged} not judged" if result.unjudged else ""
        self._line(
            f"{who} at step {result.step}: {sampled} {100 * result.pass_at_1:.1f} %, "
            f"greedy {100 * result.pass_at_1_greedy:.1f} % of {prompts_of(result)}{unjudged}"
        )


def fitted(parts: Sequence[tuple[int, str]], width: int) -> str:
    """Join parts in their order with two spaces, leaving out the highest ranks until the line fits; rank 0 stays."""
    kept = list(parts)
    while len(line := "  ".join(text for _, text in kept)) > width and max(rank for rank, _ in kept) > 0:
        kept.remove(max(kept, key=lambda part: part[0]))
    return line


def per_second(rate: float) -> str:
    """A rate with a decimal below ten."""
    return f"{rate:.1f}" if rate < 9.95 else f"{rate:,.0f}"


def in_words(seconds: float) -> str:
    """A duration for a line: `0:42`, `12:05`, `3:04:00`, `2 d 3 h`; `-` for what is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def compared(result: Evaluation) -> str:
    """What an evaluation that the teacher judges has found, in words."""
    distance = "no response was scored" if result.reverse_kl is None else f"reverse KL {result.reverse_kl:.4f}"
    if result.reverse_kl_interval is not None:
        low, high = result.reverse_kl_interval
        distance += f" ({low:.4f} to {high:.4f})"
    if result.forward_kl is not None:
        distance += f", forward KL {result.forward_kl:.4f}"
    unscored = f", {result.unjudged} not scored" if result.unjudged else ""
    length = "" if result.response_tokens is None else f", length {result.response_tokens:,.1f}"
    ended = "" if result.ended_share is None else f", {100 * result.ended_share:.0f} % ended"
    return f"{distance} on {prompts_of(result)}{length}{ended}{unscored}"


def prompts_of(result: Evaluation) -> str:
    """How many prompts an evaluation had, and of which set."""
    return (
        f"{result.prompts} held-out prompts" if result.set == HELD_OUT else f"{result.prompts} prompts of {result.set}"
    )
