"""Simulated devices take the time that they should, and real roles run on them as on the virtual clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deadlines import patience

from opd_async.actors.engine.batch import Batch
from opd_async.actors.engine.request import LogprobSpec, Request
from opd_async.actors.engine.sampling import SamplingParams
from opd_async.actors.engine.scheduler import Work
from opd_async.bench.crosscheck.engine import SimulatedRunner
from opd_async.bench.crosscheck.learner import step_seconds
from opd_async.bench.crosscheck.scenario import PROMPT_TOKENS, Scenario
from opd_async.transport import messages as m

SMALL = Scenario("20,150,200", slots=4, scale=4.0)
EMPTY = np.zeros(0, np.int32)
NOTHING = np.zeros(0, np.float32)


def batch(*works: Work) -> Batch:
    ids = np.zeros(0, np.int64)
    return Batch(works=list(works), input_ids_T=ids, positions_T=ids, slots_T=ids, groups=[], sample=None, score=None)


def request(tokens: int, prompt_done: bool) -> Request:
    made = Request(rid="0000000000000007-x", input_ids=[3] * tokens, params=SamplingParams(), logprob=LogprobSpec())
    made.prompt_done = prompt_done
    return made


def test_a_step_of_an_engine_takes_what_the_virtual_one_does() -> None:
    work = SMALL.workload()
    student, teacher = SimulatedRunner(SMALL, True, 1), SimulatedRunner(SMALL, False, 1)
    running = [Work(request(100, True), 99, 1), Work(request(60, True), 59, 1)]
    assert student.seconds(batch(*running)) == pytest.approx(work.decode.seconds(1, 2, 158))
    scored = [Work(request(300, False), 200, 100), Work(request(50, False), 0, 50)]
    expected = work.score.floor_s + work.score.tokens_s(200, 300) + work.score.tokens_s(0, 50)
    assert teacher.seconds(batch(*scored)) == pytest.approx(expected)


def test_a_response_ends_where_the_lengths_say() -> None:
    runner, length = SimulatedRunner(SMALL, True, 1), SMALL.response_tokens()[7]
    ids = [runner._next(request(PROMPT_TOKENS + made, True)) for made in range(length)]
    assert ids[-1] == 1 and 1 not in ids[:-1]


def test_a_step_of_the_learner_takes_what_the_virtual_one_does() -> None:
    cost = SMALL.workload().train
    lengths, rows = np.array([100, 40], np.int32), np.arange(90, dtype=np.int32)
    step = m.Train(
        version=0,
        part=0,
        last=True,
        loss_tokens=90,
        mb_tokens=EMPTY,
        mb_sequences=EMPTY,
        mb_rows=EMPTY,
        token_ids=EMPTY,
        sequence_lengths=lengths,
        rows=rows,
        behaviour_logprobs=NOTHING,
        teacher_logprobs=NOTHING,
        advantages=NOTHING,
        staleness=EMPTY,
    )
    assert step_seconds(cost, step) == pytest.approx(cost.floor_s + cost.segment_s(100, 60) + cost.segment_s(40, 30))


def test_a_fleet_has_as_much_of_everything_for_each_engine() -> None:
    one, four = SMALL.workload(), Scenario("20,150,200", slots=4, scale=4.0, engines=4).workload()
    for rate in ("rollout", "teacher", "learner"):
        assert getattr(four.rates(), rate) == pytest.approx(4 * getattr(one.rates(), rate)), rate
    assert four.samples_per_step == 4 * one.samples_per_step


def fleet(file: Path, *options: str) -> tuple[Any, list[str]]:
    """What the bench of fleets has written and printed for one engine and for two."""
    small = ["--slots", "4", "--lengths", SMALL.lengths, "--scale", "4", "--steps", "6", "--engines", "1", "2"]
    command = [sys.executable, "-m", "opd_async.bench.crosscheck.fleet", *small, *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(240), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text()), done.stdout.splitlines()


@pytest.mark.long
def test_real_roles_run_on_one_engine_and_on_two(tmp_path: Path) -> None:
    written, said = fleet(tmp_path / "figures.json")
    assert list(written) == ["1", "2"] and all(found["real"]["age_max"] <= 1 for found in written.values())
    assert said[-2].startswith("| 1 | ") and said[-2].endswith(" | 1.00 |")


@pytest.mark.long
def test_an_engine_joins_real_roles(tmp_path: Path) -> None:
    (one, two), said = fleet(tmp_path / "figures.json", "--join")
    assert (one["engines"], one["joined_s"], two["engines"]) == (1, 0.0, 2) and two["joined_s"] > 0
    assert one["tokens_per_s"] > 0 and two["tokens_per_s"] > 0
    assert said[-2].startswith("| 1 |  | ") and said[-2].endswith(" | 1.00 |")


@pytest.mark.parametrize("rule", ["deadline", "filled"])
def test_real_roles_run_on_simulated_devices(tmp_path: Path, rule: str) -> None:
    file = tmp_path / "figures.json"
    options = ["--slots", str(SMALL.slots), "--lengths", SMALL.lengths, "--scale", str(SMALL.scale), "--steps", "7"]
    options += ["--rule", rule]
    command = [sys.executable, "-m", "opd_async.bench.crosscheck", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(240), check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    for clock in ("virtual", "real"):
        found = written[clock]
        assert found["age_max"] <= 1
        assert found["step_tokens"] >= 1 and found["tokens_per_s"] > 0
        # of the mean length: the few responses of a short run may be longer, and have less prompt for each token
        assert 0.9 < found["learner_recompute"] < 5 and 0.9 < found["teacher_recompute"] < 1.5
    assert "real roles" in done.stdout
