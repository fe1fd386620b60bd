"""Record what a run achieved, and write it as `report.json`; `report_table` makes the table for people of it.

Shares are between 0 and 1, times in seconds, staleness in optimizer steps. `None` stands for what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from opd_async.config.evaluating import HELD_OUT
from opd_async.config.section import Section
from opd_async.data.jsonl import read_jsonl

METRICS_FILE = "metrics.jsonl"
_Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile: two-sided 95 %."""

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]


def wilson_interval(passed: float, trials: int) -> Interval:
    """Return the 95 % score interval of a proportion (Wilson 1927), both ends in [0, 1]. `ValueError` without trials.

    It has a width at 0 % and 100 %, where the textbook interval has none.
    """
    if not 0 <= passed <= trials or trials == 0:
        raise ValueError(f"{passed} of {trials} is no proportion")
    share, z2 = passed / trials, _Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # At either end the exact bound is the end itself, which rounding would miss.
    return (0.0 if passed == 0 else centre - half, 1.0 if passed == trials else centre + half)


class Evaluation(Section):
    """One model on `prompts` held-out prompts: `samples_per_prompt` sampled responses, and a greedy one.

    What was not asked for is None: answers where the teacher judges, the distance to the teacher where answers count.
    """

    set: str = HELD_OUT
    """Whose prompts: `held_out` is `data.held_out`, others are of `evaluation.sets`."""
    prompts: int
    samples_per_prompt: int = 1
    temperature: float = 1.0
    """Of the sampled responses."""
    pass_at_1: float | None = None
    """Share of all sampled responses that are right: avg@k with k = `samples_per_prompt`."""
    pass_at_1_interval: Interval | None = None
    """95 %, with prompts for trials: samples of one prompt resemble one another, so it is never too narrow."""
    pass_at_1_greedy: float | None = None
    pass_at_1_greedy_interval: Interval | None = None
    step: int
    """Optimizer steps behind the evaluated weights; 0 for the teacher."""
    unjudged: int = 0
    """Responses for which no reward could be computed, which count as wrong; or that the teacher could not score."""
    teacher_topk: int = 0
    """Where the teacher judges: how many of the likeliest tokens of both sides were compared."""
    reverse_kl: float | None = None
    """Nats a token, over all tokens of the sampled responses, which the student drew: the mean of log p - log q, or
    with `teacher_topk` of KL(p || q) at each of them, exact or from below."""
    reverse_kl_interval: Interval | None = None
    """95 %, with responses for trials: tokens of one response resemble one another."""
    forward_kl: float | None = None
    """With `teacher_topk` only: the same of KL(q || p)."""
    forward_kl_interval: Interval | None = None
    response_tokens: float | None = None
    """Mean length of the sampled responses."""
    ended_share: float | None = None
    """Share of the sampled responses that ended by themselves."""

    @classmethod
    def from_counts(
        cls,
        prompts: int,
        passed: int,
        passed_greedy: int,
        step: int,
        samples: int = 1,
        temperature: float = 1.0,
        unjudged: int = 0,
    ) -> Self:
        """From numbers of right responses, `passed` among prompts x samples; `ValueError` unless both are possible."""
        return cls(
            prompts=prompts,
            samples_per_prompt=samples,
            temperature=temperature,
            unjudged=unjudged,
            pass_at_1=passed / (prompts * samples) if prompts else 0.0,
            pass_at_1_interval=wilson_interval(passed / samples, prompts),
            pass_at_1_greedy=passed_greedy / prompts if prompts else 0.0,
            pass_at_1_greedy_interval=wilson_interval(passed_greedy, prompts),
            step=step,
        )

    @classmethod
    def from_distances(
        cls,
        prompts: int,
        step: int,
        reverse: Sequence[Floats],
        forward: Sequence[Floats] = (),
        samples: int = 1,
        unjudged: int = 0,
    ) -> Self:
        """From the KLs in the place of each token, float64[n] for each sampled response that could be compared.

        Estimates, log p - log q, will do for the reverse ones.
        """
        reverse_kl, reverse_interval = _mean_over_tokens(reverse)
        forward_kl, forward_interval = _mean_over_tokens(forward)
        return cls(
            prompts=prompts,
            samples_per_prompt=samples,
            step=step,
            unjudged=unjudged,
            reverse_kl=reverse_kl,
            reverse_kl_interval=reverse_interval,
            forward_kl=forward_kl,
            forward_kl_interval=forward_interval,
        )


def _mean_over_tokens(values: Sequence[Floats]) -> tuple[float | None, Interval | None]:
    """Return the mean over the tokens of all responses, float64[n] each, and its 95 % interval; None without tokens.

    The mean is a ratio of two sums over responses; its variance is that of a ratio estimator (Cochran, Sampling
    Techniques, 1977, 6.4).
    """
    sums = np.array([one.sum() for one in values])
    lengths = np.array([len(one) for one in values], np.float64)
    count, tokens = len(lengths), float(lengths.sum())
    if not tokens:
        return None, None
    mean = float(sums.sum()) / tokens
    spread = float(((sums - mean * lengths) ** 2).sum())
    error = _Z * math.sqrt(spread * count / max(count - 1, 1)) / tokens
    return mean, (mean - error, mean + error) if count > 1 else None


def on_set(who: str, name: str) -> str:
    """Say whom an evaluation is of, and on which set unless that is `data.held_out`."""
    return who if name == HELD_OUT else f"{who} on {name}"


class Staleness(Section):
    """Ages of the trained tokens when they were trained, in optimizer steps."""

    mean: float | None = None
    p99: float | None = None
    max: int | None = None


class ScoreLatency(Section):
    """Seconds from the last token of a sample to its score."""

    p50_s: float | None = None
    p99_s: float | None = None


class WeightSync(Section):
    """Seconds that weight updates took."""

    blocked_s: float
    """Time that the learner spent sending weights."""
    engines_blocked_s: float
    """Time that student engines were paused, a mean over engines."""
    updates: int


class Stage(Section):
    """Throughput of one stage over the whole run."""

    tokens: int
    """Response tokens: generated, scored, trained."""
    tokens_per_s: float
    idle_share: float | None = None
    """Share of the time with nothing to do, a mean over processes."""


class Stages(Section):
    """The three stages of the pipeline."""

    rollout: Stage
    teacher: Stage | None = None
    """None where no teacher engine scores."""
    learner: Stage


class Launch(Section):
    """What one launch did of a run that earlier launches had begun."""

    first_step: int
    """Counted from 1; 0 where the launch has taken none."""
    steps: int
    seconds: float
    stages: Stages
    trained_tokens: int
    trained_samples: int


class Suspect(Section):
    """What a teacher engine scored between its last good canary and the moment when it was found wrong."""

    engine: str
    reason: str
    tokens: int
    samples: list[int]
    trained_tokens: int
    """Of the suspect tokens, those that a step has trained."""
    steps: list[int]
    """Steps that have trained any of them, counted from 1 as in `metrics.jsonl`."""


class Evaluated(Section):
    """What the evaluations on one set have found."""

    teacher: Evaluation | None = None
    teachers: dict[str, Evaluation] = Field(default_factory=dict)
    """Where there are several: each on its own prompts, by `teacher <name>`."""
    student_before: Evaluation | None = None
    student_after: Evaluation | None = None


class Report(Evaluated):
    """Everything about a run. A field is about all launches together, unless its comment says otherwise.

    Evaluations on `data.held_out` are fields of the report itself.
    """

    name: str
    steps: int
    seconds: float
    """From the first lease to the last optimizer step, summed over launches. What a crash of the whole run has lost is
    not in it."""
    this_launch: Launch | None = None
    """None where the run has had but one."""
    sets: dict[str, Evaluated] = Field(default_factory=dict)
    """Evaluations on `evaluation.sets`, by name."""
    max_staleness: int | None
    """The bound that was set."""
    staleness: Staleness
    score_latency: ScoreLatency
    """Of this launch."""
    weight_sync: WeightSync
    prefix_hit_share: float | None = None
    """Share of the teacher's tokens that its prefix cache held."""
    teacher_recompute: float | None = None
    """Tokens that the teacher's engines computed for each token that they scored."""
    stages: Stages
    trained_tokens: int
    trained_samples: int
    budget_share: float | None = None
    """Mean tokens of a step for each token of `schedule.tokens_per_step`; None where steps take samples."""
    budget_share_range: Interval | None = None
    """The same of the smallest step and of the largest."""
    cuts: int
    """Responses trained in part because of a deadline."""
    recompute_factor: float | None = None
    """Tokens that the learner forwarded for each token that it trained."""
    skipped_prompts: int = 0
    counters: dict[str, int] = Field(default_factory=dict)
    """Anything else that was counted in this launch, by name."""
    restarts: dict[str, int] = Field(default_factory=dict)
    """In this launch, by role; roles that never died are absent."""
    suspect: list[Suspect] = Field(default_factory=list)
    """Scores of this launch that are not to be trusted."""
    slow_engines: dict[str, int] = Field(default_factory=dict)
    """How often in this launch an engine was far slower than its peers and got no work for a while, by role or
    address."""
    folder: Path | None = Field(default=None, exclude=True)
    """Where the run left its files; None for a report that was read from one."""

    @property
    def evaluated(self) -> dict[str, Evaluated]:
        """What was found on each set, `data.held_out` among them where anything was."""
        own = Evaluated(**{name: getattr(self, name) for name in Evaluated.model_fields})
        return ({} if own == Evaluated() else {HELD_OUT: own}) | self.sets

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, one for each step and each evaluation, in order; the file is read at each call.

        A step's row has `step`, an evaluation's row `evaluation`: which model was evaluated. Empty without a folder.
        """
        return [] if self.folder is None else list(read_jsonl(self.folder / METRICS_FILE))


def write(report: Report, folder: Path) -> Path:
    """Write `report.json` into `folder`, whole or not at all; returns its path. Raises `OSError`."""
    path = folder / "report.json"
    fresh = folder / "report.json.new"
    fresh.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)
    return path
