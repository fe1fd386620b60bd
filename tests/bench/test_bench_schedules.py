"""The simulation keeps what it promises, and the script writes what it says."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from opd_async.bench import schedules, sweeps
from opd_async.bench.sim.colocated import Colocated
from opd_async.bench.sim.figures import Account
from opd_async.bench.sim.open_step import OpenStep
from opd_async.bench.sim.presets import balanced
from opd_async.bench.sim.rules import (
    Rule,
    Scoring,
    deadline_cuts,
    dropping,
    filled,
    one_step_off,
    partial_rollouts,
    sync,
    two_step_off,
    whole_samples,
)
from opd_async.bench.sim.simulation import Simulation
from opd_async.bench.sim.tools import Tools
from opd_async.config.topology import TrainOn
from opd_async.forecast.lengths import LogNormal

SMALL = dataclasses.replace(
    balanced(LogNormal(200, 1500, 2000)),
    slots=16,
    samples_per_step=16,
    prompt_tokens=20,
    chunk_tokens=64,
    batch_tokens=256,
)


@pytest.mark.parametrize("scoring", Scoring)
@pytest.mark.parametrize(
    "rule",
    [
        sync(),
        one_step_off(),
        two_step_off(),
        whole_samples(1),
        *(deadline_cuts(s) for s in (0, 1, 2)),
        *(filled(s) for s in (0, 1, 2)),
    ],
    ids=lambda rule: f"{rule.name}-{rule.staleness}",
)
def test_no_token_is_older_than_the_schedule_allows(rule: Rule, scoring: Scoring) -> None:
    row = Simulation(SMALL, rule, scoring, seed=1).run(warmup=3, steps=12)
    assert rule.staleness is not None and row.age_max <= rule.staleness
    assert 0 < row.share_of_bound < 1.1
    assert row.teacher_recompute == pytest.approx(1.0)
    assert row.learner_recompute == pytest.approx(1.0, abs=0.1) or rule.train_on is TrainOn.TOKENS


TOOLS = Tools(turn_tokens=60.0, shortest_s=0.1, longest_s=20.0)


def test_tools_are_called_between_turns_and_by_every_schedule_alike() -> None:
    calls = [TOOLS.of(0, sample_id, 600) for sample_id in range(300)]
    assert calls == [TOOLS.of(0, sample_id, 600) for sample_id in range(300)] and calls[0] != calls[1]
    assert all(0 < first.at < second.at < 600 for one in calls for first, second in itertools.pairwise(one))
    seconds = [call.seconds for one in calls for call in one]
    assert min(seconds) >= 0.1 and max(seconds) <= 20.0
    assert np.mean(seconds) == pytest.approx(TOOLS.mean_s, rel=0.1)
    assert np.mean([len(one) for one in calls]) == pytest.approx(600 / 60.0, rel=0.15)


@pytest.mark.parametrize(
    "rule",
    [sync(), one_step_off(), partial_rollouts(), dropping(2), deadline_cuts(1), filled(0), filled(1), filled(None)],
    ids=lambda rule: f"{rule.name}-{rule.staleness}",
)
def test_episodes_with_tools_are_no_older_than_the_schedule_allows(rule: Rule) -> None:
    row = Simulation(SMALL, rule, Scoring.STREAMED, 1, TOOLS).run(warmup=3, steps=10)
    bound = rule.drops_after if rule.drops_after is not None else rule.staleness
    assert rule.name == "partial" or bound is None or row.age_max <= bound
    assert 0 < row.share_of_bound < 1.1 and row.step_tokens > 0.5
    assert row.teacher_recompute == pytest.approx(1.0, abs=0.02) or rule.drops_after is not None


def test_what_waits_for_a_tool_needs_no_slot() -> None:
    held = dataclasses.replace(TOOLS, frees_slot=False)
    free, kept = (Simulation(SMALL, filled(4), Scoring.STREAMED, 1, tools).run(4, 12) for tools in (TOOLS, held))
    assert free.share_of_bound > 1.2 * kept.share_of_bound
    assert kept.idle.rollout < 0.9
    pool = Colocated(SMALL, 0.0, tools=TOOLS).run(3, 10)
    assert 0 < pool.share_of_bound < 1.1


@pytest.mark.parametrize(
    ("rule", "limit"),
    [(whole_samples(4), 1.3), (deadline_cuts(1), 2.2), (deadline_cuts(4), 1.5), (filled(1), 2.2), (filled(4), 1.5)],
    ids=lambda rule: "",
)
def test_a_teacher_that_forgets_computes_a_bounded_number_of_times(rule: Rule, limit: float) -> None:
    row = Simulation(dataclasses.replace(SMALL, cache_tokens=1), rule, Scoring.STREAMED).run(warmup=3, steps=12)
    assert 1.01 < row.teacher_recompute < limit
    assert rule.staleness is not None and row.age_max <= rule.staleness


def test_what_is_dropped_is_no_older_and_longer_than_what_is_trained() -> None:
    kept, few, many = (
        Simulation(SMALL, rule, Scoring.STREAMED).run(3, 20) for rule in (filled(None), dropping(2), dropping(1))
    )
    assert kept.age_max > 2 and few.age_max == 2 and many.age_max == 1
    assert kept.lost_share == 0.0 and kept.trained_length == 1.0
    assert 0.02 < few.lost_share < many.lost_share < 0.6
    assert 0.4 < many.trained_length < few.trained_length < 0.98
    assert many.share_of_bound < few.share_of_bound < kept.share_of_bound


def test_a_colocated_pool_has_the_time_of_its_stages_one_after_the_other() -> None:
    fast, slow, full = (
        Colocated(SMALL, switch_s, wide).run(3, 20) for switch_s, wide in ((0.0, False), (2.0, False), (0.0, True))
    )
    tokens, pool = fast.tokens_per_s * fast.seconds, 3
    whole = tokens * (SMALL.mean_tokens + SMALL.prompt_tokens) / SMALL.mean_tokens
    scored_s = whole / pool * (SMALL.score.token_s + SMALL.score.floor_s / SMALL.batch_tokens)
    stages_s = scored_s + whole / pool * SMALL.train.token_s + fast.steps * SMALL.sync_s
    assert fast.seconds * (1 - fast.idle.rollout) + stages_s == pytest.approx(fast.seconds, rel=0.05)
    assert slow.seconds - fast.seconds == pytest.approx(20 * 2.0, rel=0.05)
    assert fast.teacher_recompute == pytest.approx(1.0) and 1 < fast.age_max < full.age_max
    assert full.share_of_bound > fast.share_of_bound and fast.step_tokens_max < 2


@pytest.mark.parametrize("staleness", [1, 2, None])
def test_filled_steps_have_one_budget(staleness: int | None) -> None:
    """Also when the learner is behind, where deadline cuts take two."""
    slow = dataclasses.replace(balanced(slots=32, learner=0.7), chunk_tokens=256)
    row = Simulation(slow, filled(staleness), Scoring.STREAMED).run(warmup=12, steps=16)
    assert 1 <= row.step_tokens < 1.1
    assert row.step_tokens_sd < 0.1
    assert row.share_of_bound > 0.8
    cuts = Simulation(slow, deadline_cuts(1), Scoring.STREAMED).run(warmup=6, steps=8)
    assert cuts.step_tokens > 1.9


def test_what_is_never_cut_is_forwarded_once() -> None:
    row = Simulation(SMALL, filled(None), Scoring.STREAMED).run(warmup=3, steps=12)
    assert row.learner_recompute == pytest.approx(1.0, abs=0.1)
    assert row.share_of_bound > 0.8
    assert row.age_max > 2


def test_partial_rollouts_wait_for_nobody_and_stop_when_a_batch_is_there() -> None:
    row = Simulation(SMALL, partial_rollouts(), Scoring.STREAMED).run(warmup=3, steps=12)
    barrier = Simulation(SMALL, one_step_off(), Scoring.STREAMED).run(warmup=3, steps=12)
    assert row.share_of_bound > 2 * barrier.share_of_bound
    assert row.step_tokens == pytest.approx(1.0, abs=0.2)
    assert row.idle.rollout > 0.01


def test_ages_in_budgets_are_what_was_trained_since() -> None:
    account = Account(workload=SMALL)
    for taken in (100, 300, 200):
        account.stepped(OpenStep(taken=taken))
    account.aged(3, np.array([0, 2, 2, 3]))
    assert account.lags == {600: 1, 200: 2, 0: 1}
    assert account.ages == {3: 1, 1: 2, 0: 1}


def test_a_table_a_file_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(schedules.PRESETS, "heavy-tail", SMALL)
    monkeypatch.setattr(schedules, "WARMUP", 2)
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    schedules.main(["--steps", "3", "--lengths", "100,500,600", "--json", str(figures), "--plot", str(picture)])
    few = tmp_path / "few.json"
    schedules.main(["--steps", "2", "--only", "filled", "sync", "--scoring", "streamed", "--json", str(few)])
    assert [row["schedule"] for row in json.loads(few.read_text())["rows"]] == ["sync", *["filled"] * 5]
    shown = capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert len(written["rows"]) == 2 * len(schedules.rules()) + len(schedules.POOLS)
    assert {"schedule", "scoring", "share_of_bound", "idle", "score_p99_s"} <= written["rows"][0].keys()
    assert all(row["schedule"] in shown for row in written["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_measured_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = sweeps.Sweep(
        title="chunk",
        values=(32, 256),
        workload=lambda n: dataclasses.replace(SMALL, chunk_tokens=int(n)),
        rules=(sync(),),
    )
    monkeypatch.setattr(sweeps, "SWEEPS", {"chunk": chunks})
    monkeypatch.setattr(sweeps, "STEPS", 2)
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    sweeps.main(["--only", "chunk", "--json", str(figures), "--plot", str(picture)])
    (curves,) = json.loads(figures.read_text()).values()
    assert [value for value, _ in curves["sync, S = 0"]] == [32, 256]
    assert "sync, S = 0" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_over_ages_changes_the_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = sweeps.Sweep(
        title="S, steps",
        values=(0, 2),
        workload=lambda _: SMALL,
        rules=(deadline_cuts(0),),
        figure="age_max",
        ages=True,
    )
    monkeypatch.setattr(sweeps, "STEPS", 3)
    assert sweeps.measure(ages) == {"deadline_cuts": [(0, 0), (2, 2)]}


@pytest.mark.parametrize("name", sorted(sweeps.SWEEPS))
def test_every_value_of_a_sweep_is_a_workload(name: str) -> None:
    sweep = sweeps.SWEEPS[name]
    assert all(sweep.workload(value).rates().bound > 0 for value in sweep.values)
