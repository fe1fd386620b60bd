"""The report: its keys, its table, its picture."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deadlines import patience
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from opd_async.telemetry.plots import learning_curve
from opd_async.telemetry.report import (
    Evaluated,
    Evaluation,
    Report,
    ScoreLatency,
    Stage,
    Stages,
    Staleness,
    WeightSync,
    wilson_interval,
    write,
)
from opd_async.telemetry.report_table import WIDTH, render

PNG = b"\x89PNG\r\n\x1a\n"


def full() -> Report:
    """A run that measured everything."""
    return Report(
        name="quickstart",
        steps=300,
        seconds=754.2,
        teacher=Evaluation.from_counts(1000, 967, 981, 0),
        student_before=Evaluation.from_counts(1000, 112, 143, 0),
        student_after=Evaluation.from_counts(1000, 958, 977, 300),
        max_staleness=1,
        budget_share=1.25,
        budget_share_range=(0.98, 2.5),
        staleness=Staleness(mean=0.81, p99=1, max=1),
        score_latency=ScoreLatency(p50_s=0.014, p99_s=1.71),
        weight_sync=WeightSync(blocked_s=2.1, engines_blocked_s=0.9, updates=300),
        prefix_hit_share=0.731,
        stages=Stages(
            rollout=Stage(tokens=1_234_567, tokens_per_s=1641.2, idle_share=0.042),
            teacher=Stage(tokens=1_234_000, tokens_per_s=1640.4, idle_share=0.61),
            learner=Stage(tokens=1_230_000, tokens_per_s=1633.0, idle_share=0.12),
        ),
        trained_tokens=1_230_000,
        trained_samples=98_304,
        cuts=2412,
        recompute_factor=1.07,
        skipped_prompts=2,
        counters={"duplicates": 4, "malformed": 0, **{f"counter_number_{i}": i + 1 for i in range(9)}},
        restarts={"rollout-0": 1},
    )


def bare() -> Report:
    """A run that measured nothing but its steps."""
    stage = Stage(tokens=0, tokens_per_s=0.0)
    return Report(
        name="bare",
        steps=1,
        seconds=3.21,
        max_staleness=0,
        staleness=Staleness(),
        score_latency=ScoreLatency(),
        weight_sync=WeightSync(blocked_s=0.0, engines_blocked_s=0.0, updates=1),
        stages=Stages(rollout=stage, teacher=stage, learner=stage),
        trained_tokens=0,
        trained_samples=0,
        cuts=0,
    )


def test_wilson_against_known_values() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(case: tuple[int, int]) -> None:
    """Both ends p satisfy |share - p| = z sqrt(p (1 - p) / n), and the share lies between them."""
    passed, trials = case
    low, high = wilson_interval(passed, trials)
    share = passed / trials
    assert 0.0 <= low <= share <= high <= 1.0
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / trials), abs=1e-7)


@pytest.mark.parametrize(("passed", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(passed: int, trials: int) -> None:
    with pytest.raises(ValueError, match="is no proportion"):
        wilson_interval(passed, trials)


def test_the_file_is_whole_and_reads_back(tmp_path: Path) -> None:
    path = write(full(), tmp_path)
    assert Report.model_validate_json(path.read_text()) == full()
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    keys = json.loads(path.read_text())
    assert keys["staleness"] == {"mean": 0.81, "p99": 1.0, "max": 1}
    assert keys["weight_sync"] == {"blocked_s": 2.1, "engines_blocked_s": 0.9, "updates": 300}
    assert keys["stages"]["teacher"] == {"tokens": 1_234_000, "tokens_per_s": 1640.4, "idle_share": 0.61}
    assert set(keys["student_after"]) == {
        "prompts",
        "samples_per_prompt",
        "temperature",
        "unjudged",
        "pass_at_1",
        "pass_at_1_interval",
        "pass_at_1_greedy",
        "pass_at_1_greedy_interval",
        "reverse_kl",
        "reverse_kl_interval",
        "teacher_topk",
        "forward_kl",
        "forward_kl_interval",
        "response_tokens",
        "ended_share",
        "step",
        "set",
    }


def test_the_table() -> None:
    files = [("learning curve", Path("runs/quickstart/learning_curve.png"))]
    text = render(full(), files, [("go on", "python -m opd_async.launch --topology quickstart.yaml --resume")])
    lines = text.splitlines()
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in lines)
    assert lines[1] == " quickstart: 300 steps in 12 min 34 s"
    for expected in (
        " teacher                 96.7 % (95.4 to 97.6, n=1000)   98.1 % (97.1 to 98.8, n=1000)",
        " student before training 11.2 % (9.4 to 13.3, n=1000)    14.3 % (12.3 to 16.6, n=1000)",
        " teacher                      1,234,000         1,640      61.0 %",
        " staleness               mean 0.81, p99 1, max 1 steps (bound 1)",
        " score latency           p50 14 ms, p99 1.7 s after a sample's last token",
        " weight sync             300 updates: learner 2.1 s, engines paused 900 ms",
        " restarts                rollout-0 1",
        " skipped prompts         2",
        "   learning curve        runs/quickstart/learning_curve.png",
        "     python -m opd_async.launch --topology quickstart.yaml --resume",
    ):
        assert expected in lines
    assert "malformed" not in text and "counter number 8 9" in text


def test_the_table_of_a_run_that_measured_little() -> None:
    text = render(bare())
    assert "pass@1" not in text and "What to do next" not in text and "counted" not in text
    assert " bare: 1 step in 3.2 s" in text
    assert " staleness               mean -, p99 -, max - steps (bound 0)" in text
    unbound = render(bare().model_copy(update={"max_staleness": None}))
    assert " staleness               mean -, p99 -, max - steps (no bound)" in unbound
    assert " restarts                none" in text


@pytest.mark.parametrize("steps", [1, 60])
def test_the_picture(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "curve.png"
    report = full()
    assert report.student_before is not None and report.student_after is not None and report.teacher is not None
    kl = [(step, math.nan if step == 3 else 1 / (1 + step)) for step in range(steps)]
    learning_curve(path, [report.student_after, report.student_before], {"held_out": report.teacher}, kl)
    assert path.read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


def test_a_picture_of_one_panel_and_of_nothing(tmp_path: Path) -> None:
    learning_curve(tmp_path / "kl.png", [], {}, [(0, 0.5), (1, 0.4)])
    learning_curve(tmp_path / "pass.png", [Evaluation.from_counts(10, 0, 10, 0)], {}, [])
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("kl.png", "pass.png"))
    with pytest.raises(ValueError, match="no evaluation and no step"):
        learning_curve(tmp_path / "none.png", [], {}, [(0, math.nan)])


def on(name: str, found: Evaluation) -> Evaluation:
    return found.model_copy(update={"set": name})


def test_each_set_has_a_part_of_the_table_and_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (Evaluation.from_counts(200, passed, passed, step) for passed, step in ((20, 0), (90, 5)))
    far, near = (Evaluation.from_distances(50, 5, [np.full(9, gap), np.full(3, 0.0)]) for gap in (0.5, 0.25))
    gaps = [np.full(9, 0.5), np.full(3, 1.0)]
    both = Evaluation.from_distances(50, 5, gaps, [2 * one for one in gaps])
    sets = {
        "sums": Evaluated(student_before=on("sums", before), student_after=on("sums", after)),
        "words": Evaluated(student_before=on("words", far), student_after=on("words", near)),
        "chats": Evaluated(student_after=on("chats", both)),
        "unused": Evaluated(),
    }
    report = full().model_copy(update={"sets": sets})
    assert list(report.evaluated) == ["held_out", "sums", "words", "chats", "unused"]
    text = render(report)
    blocks = text.split("─" * WIDTH)
    assert "student after training  95.8 %" in blocks[0] and "\n on" not in blocks[0]
    assert blocks[1].startswith("\n on sums\n pass@1, 95 % interval") and "45.0 % (38.3 to 51.9, n=200)" in blocks[1]
    assert blocks[2].startswith("\n on words\n reverse KL, 95 % interval") and "0.1875" in blocks[2]
    assert "forward" not in blocks[2] and "forward" in blocks[3] and " 1.2500 " in blocks[3]
    assert "unused" not in text and all(len(line) <= WIDTH for line in text.splitlines())
    found = [one for of in sets.values() for one in (of.student_before, of.student_after) if one is not None]
    learning_curve(tmp_path / "one.png", found[:2], {}, [])
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: titles.append(text))
    learning_curve(tmp_path / "all.png", found, {"sums": on("sums", after)}, [(1, 0.5)])
    heights = [int.from_bytes((tmp_path / name).read_bytes()[20:24]) for name in ("one.png", "all.png")]
    assert [title.partition(":")[0] for title in titles] == ["Prompts of sums", "Training and held-out prompts"]
    assert heights == [570, 1080], "a panel for the set with answers, and one for all distances"


def test_plots_load_matplotlib_only_when_they_draw() -> None:
    code = "import sys, opd_async.telemetry.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=patience(60))


def test_the_size_of_steps_is_shown_where_they_have_a_budget() -> None:
    assert " size of steps           1.25 budgets (0.98 to 2.50)\n" in render(full())
    assert "budgets" not in render(full().model_copy(update={"budget_share": None}))
