"""Print a run's progress: a line every few seconds, and one for each event."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from opd_async.telemetry.length_drift import LengthDrift
from opd_async.telemetry.report import Evaluation
from opd_async.transport.messages import StepStarted

LINE_EVERY_S = 3.0


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

    def say(self, text: str) -> None:
        """Print one line about an event, with the time since the start."""
        self._line(text)
        self.on_event(text)

    def _line(self, text: str) -> None:
        self._echo(f"[{time.monotonic() - self._started:6.1f} s] {text}")

    def step(self, step: int, learner: dict[str, float], started: StepStarted) -> None:
        """Print a line about a step, at most every few seconds; the last step always gets one."""
        stats = started.stats
        if self._drift is not None and (text := self._drift.step(stats.get("response_tokens_mean"))):
            self.say(text)
        self._tokens += stats["tokens"]
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S and step != self._steps:
            return
        rate = self._tokens / max(now - self._since, 1e-9)
        ages = started.staleness_counts
        mean_age = float(np.arange(len(ages)) @ ages / max(ages.sum(), 1))
        kl = f"reverse KL {learner['reverse_kl']:.4f}  " if "reverse_kl" in learner else ""
        spread = f"ratio spread {learner['ratio_std']:.3f}  " if "ratio_std" in learner else ""
        reward = f"reward {stats['reward_mean']:.3f}  " if "reward_mean" in stats else ""
        length = f"length {stats['response_tokens_mean']:,.0f}  " if "response_tokens_mean" in stats else ""
        size = f"size {stats['budget_share']:.2f}  " if "budget_share" in stats else ""
        self._line(
            f"step {step:>4}/{self._steps}  {reward}{kl}{spread}{length}{size}"
            f"staleness {mean_age:.2f} (max {len(ages) - 1})  {rate:,.0f} tokens/s  cuts {stats['cuts']:.0f}"
        )
        self._last, self._tokens, self._since = now, 0.0, now

    def evaluation(self, who: str, result: Evaluation) -> None:
        """Print one line about an evaluation that has ended: its pass@1, or the distance to the teacher."""
        if result.pass_at_1 is None or result.pass_at_1_greedy is None:
            self._line(f"{who} at step {result.step}: {compared(result)}")
            return
        sampled = f"avg@{result.samples_per_prompt}" if result.samples_per_prompt > 1 else "pass@1"
        unjudged = f", {result.unjudged} not judged" if result.unjudged else ""
        self._line(
            f"{who} at step {result.step}: {sampled} {100 * result.pass_at_1:.1f} %, "
            f"greedy {100 * result.pass_at_1_greedy:.1f} % of {result.prompts} held-out prompts{unjudged}"
        )


def compared(result: Evaluation) -> str:
    """What an evaluation that the teacher judges has found, in words."""
    distance = "no response was scored" if result.reverse_kl is None else f"reverse KL {result.reverse_kl:.4f}"
    if result.reverse_kl_interval is not None:
        low, high = result.reverse_kl_interval
        distance += f" ({low:.4f} to {high:.4f})"
    unscored = f", {result.unjudged} not scored" if result.unjudged else ""
    length = "" if result.response_tokens is None else f", length {result.response_tokens:,.1f}"
    ended = "" if result.ended_share is None else f", {100 * result.ended_share:.0f} % ended"
    return f"{distance} on {result.prompts} held-out prompts{length}{ended}{unscored}"
