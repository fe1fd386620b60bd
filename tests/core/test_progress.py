"""The line of a step: what it says, and that it fits."""

from __future__ import annotations

import re

import numpy as np
import pytest

from opd_async.telemetry import progress as progress_module
from opd_async.telemetry.progress import WIDTH, Progress, fitted, in_words, per_second
from opd_async.transport.messages import StepStarted


def started(step: int, **stats: float) -> StepStarted:
    return StepStarted(
        version=step - 1,
        waited_s=0.0,
        staleness_counts=np.array([30, 10]),
        taken_ids=np.zeros(0, np.int64),
        taken_ends=np.zeros(0, np.int32),
        taken_complete=np.zeros(0, np.int32),
        stats={"tokens": 40.0, "cuts": 2.0} | stats,
    )


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    monkeypatch.delenv("COLUMNS", raising=False)
    return clock


LEARNER = ("reverse_kl", "loss", "ratio_std", "grad_norm", "learning_rate")


def lines(clock: Clock, steps: int, of: int, seconds: float, **figures: float) -> list[str]:
    said: list[str] = []
    progress = Progress(said.append, of)
    for step in range(1, steps + 1):
        clock.now += seconds
        learner = {name: figures[name] for name in figures if name in LEARNER}
        stats = {name: figures[name] for name in figures if name not in learner}
        progress.step(step, learner, started(step, **stats))
    return said


def test_a_line_says_what_a_person_asks_first(clock: Clock) -> None:
    said = lines(clock, 3, 10, 5.0, reverse_kl=0.4567, loss=0.1234, response_tokens_mean=312.4, budget_share=1.25)
    assert said[-1] == "[  15.0 s] step 3/10  ETA 0:35  KL 0.457  loss 0.123  length 312  8.0 tokens/s"
    assert said[0] == "[   5.0 s] step 1/10  ETA -  KL 0.457  loss 0.123  length 312  8.0 tokens/s"
    (planned,) = lines(clock, 1, 1, 2.0, planned_share=0.625)
    assert planned == "[   2.0 s] step 1/1  20 tokens/s  62% of the plan  age 0.25  cuts 2"
    (rewarded,) = lines(clock, 1, 1, 2.0, reward_mean=0.25, budget_share=1.0)
    assert rewarded == "[   2.0 s] step 1/1  reward 0.250  20 tokens/s  size 1.00  age 0.25  cuts 2"


def test_roles_that_are_down_are_named(clock: Clock) -> None:
    said: list[str] = []
    progress = Progress(said.append, 10)
    progress.missing = lambda: ["teacher-1", "rollout-0"]
    clock.now += 10
    progress.step(1, {"reverse_kl": 1.0}, started(1))
    assert said == ["[  10.0 s] step 1/10  2 down: teacher-1  ETA -  KL 1.000  4.0 tokens/s  age 0.25"]


def test_every_line_fits_and_keeps_what_matters_most(clock: Clock) -> None:
    figures = {"reverse_kl": 12.5, "loss": -123.4567, "response_tokens_mean": 131072.0, "reward_mean": -10.25}
    figures |= {"budget_share": 123.0, "ratio_std": 2.0, "tokens": 9e9}
    for line in lines(clock, 3, 1_000_000, 54321.0, **figures):
        assert len(line) <= WIDTH
        assert re.search(r"step \d/1000000 .*tokens/s", line) and "ratio" not in line
    assert fitted([(0, "step"), (2, "b" * 20), (1, "a")], 10) == "step  a"
    assert fitted([(0, "x" * 90)], 10) == "x" * 90, "what cannot be left out stays"


def test_a_wide_terminal_has_every_figure_of_a_step(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"reverse_kl": 0.4567, "response_tokens_mean": 312.4, "response_tokens_p99": 1024.0, "budget_share": 1.25}
    figures |= {"at_limit_share": 0.125, "prompt_tokens_mean": 41.2, "sampled_entropy": 0.8765, "grad_norm": 1.5}
    figures |= {"learning_rate": 1e-5, "teacher_kl.maths": 0.25, "ratio_std": 0.0625}
    monkeypatch.setenv("COLUMNS", "250")
    assert lines(clock, 1, 1, 2.0, **figures) == [
        "[   2.0 s] step 1/1  KL 0.457  length 312  12% at the limit  20 tokens/s  size 1.25  age 0.25  cuts 2  "
        "entropy 0.876  gradient 1.5  lr 1e-05  p99 1,024  prompts 41  ratio spread 0.062  KL to maths 0.250"
    ]
    monkeypatch.setenv("COLUMNS", "20")
    (line,) = lines(clock, 1, 1, 2.0, **figures)
    assert 60 < len(line) <= WIDTH and "size 1.25" in line and "entropy" not in line


def test_the_pace_is_that_of_the_latest_steps(clock: Clock) -> None:
    said: list[str] = []
    progress = Progress(said.append, 1000)
    for step in range(1, 101):
        clock.now += 100.0 if step < 50 else 4.0
        progress.step(step, {}, started(step))
    assert f"ETA {in_words(900 * 4)}" in said[-1]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0:00"), (42, "0:42"), (725, "12:05"), (11040, "3:04:00"), (200_000, "2 d 7 h"), (float("nan"), "-")],
)
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("rate", "words"), [(0.04, "0.0"), (9.94, "9.9"), (9.96, "10"), (1234.6, "1,235"), (0.0, "0.0")]
)
def test_rates_have_a_decimal_below_ten(rate: float, words: str) -> None:
    assert per_second(rate) == words
