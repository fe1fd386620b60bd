"""The figures of a run over several launches: each is named, none is counted twice, none is missing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_runs import small_topology

from opd_async.config.topology import Topology
from opd_async.data.jsonl import read_jsonl
from opd_async.plan.resolve import make_plan
from opd_async.run import ledger as ledger_module
from opd_async.run.books import BOOKS_FILE, load_books
from opd_async.run.evaluations import Evaluations
from opd_async.run.ledger import Ledger
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.telemetry.progress import Progress
from opd_async.telemetry.report import Evaluation
from opd_async.telemetry.report_table import render
from opd_async.telemetry.trace import OFF
from opd_async.transport.messages import StepStarted

TOKENS = 100.0


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(
            ledger_module, "time", SimpleNamespace(monotonic=lambda: self.now_s, time=lambda: self.now_s)
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def launched(root: Path, version: int) -> Ledger:
    ledger = Ledger(plan=make_plan(small_topology(root)))
    ledger.rewind(version)
    return ledger


def train(ledger: Ledger, clock: Clock, first: int, last: int, step_s: float) -> None:
    """Steps first to last, each `step_s` seconds and 100 tokens, of which the rollout actor made 120 and idled half."""
    nothing, none = np.zeros(0, np.int64), np.zeros(0, np.int32)
    ledger.start_training()
    for step in range(first, last + 1):
        clock.now_s += step_s
        for role, tokens in (("rollout-0", 120.0), ("teacher-0", 110.0)):
            now = ledger.roles[role].now
            ledger.roles[role].now = {
                "tokens": now.get("tokens", 0.0) + tokens,
                "idle_s": now.get("idle_s", 0.0) + step_s / 2,
                "cached_tokens": now.get("cached_tokens", 0.0) + 30.0,
                "computed_tokens": now.get("computed_tokens", 0.0) + 90.0,
            }
        started = StepStarted(
            version=step - 1,
            waited_s=0.0,
            stats={"tokens": TOKENS, "completed": 2.0, "cuts": 1.0, "forwarded_tokens": 150.0},
            staleness_counts=np.array([100]),
            taken_ids=nothing,
            taken_ends=none,
            taken_complete=none,
        )
        ledger.step(started, {"idle_s": step_s / 4, "reverse_kl": 0.1}, 0.1, 0.2)


def test_figures_of_this_launch_and_of_the_whole_run(tmp_path: Path, clock: Clock) -> None:
    first = launched(tmp_path, 0)
    train(first, clock, 1, 40, 1.0)
    alone = first.report({})
    assert alone.this_launch is None and alone.seconds == pytest.approx(40.0)
    first.close()
    clock.now_s += 5000.0  # a night between the launches
    second = launched(tmp_path, 40)
    train(second, clock, 41, 120, 2.0)
    report = second.report({})
    assert (report.steps, report.trained_tokens, report.trained_samples) == (120, 12_000, 240)
    assert report.seconds == pytest.approx(40.0 + 160.0)
    assert report.stages.learner.tokens_per_s == pytest.approx(12_000 / 200)
    assert report.stages.rollout.tokens == 120 * 120 and report.stages.rollout.idle_share == pytest.approx(0.5)
    assert report.stages.teacher is not None and report.stages.teacher.tokens_per_s == pytest.approx(120 * 110 / 200)
    assert report.prefix_hit_share == pytest.approx(0.25) and report.teacher_recompute == pytest.approx(90 / 110)
    launch = report.this_launch
    assert launch is not None
    assert (launch.first_step, launch.steps, launch.trained_tokens, launch.trained_samples) == (41, 80, 8_000, 160)
    assert launch.seconds == pytest.approx(160.0)
    assert launch.stages.learner.tokens_per_s == pytest.approx(50.0)
    assert launch.stages.rollout.tokens == 80 * 120
    second.close()
    text = render(report)
    assert "small, the whole run: 120 steps in 3 min 20 s" in text
    assert "small, this launch: steps 41 to 120 in 2 min 40 s" in text
    assert [line.split()[:2] for line in text.splitlines() if "tokens/s" in line] == [
        ["whole", "run"],
        ["this", "launch"],
    ]


def test_rows_have_the_share_of_what_was_planned_where_that_is_written(tmp_path: Path, clock: Clock) -> None:
    ledger = launched(tmp_path, 0)
    train(ledger, clock, 1, 1, 2.0)
    planned = {"telemetry": ledger.plan.topology.telemetry.model_copy(update={"planned_tokens_per_s": 80.0})}
    ledger.plan = ledger.plan.model_copy(update={"topology": ledger.plan.topology.model_copy(update=planned)})
    train(ledger, clock, 2, 2, 2.0)
    ledger.close()
    assert [row.get("planned_share") for row in read_jsonl(ledger.path)] == [None, 100 / 2 / 80]


def test_a_launch_without_a_step_says_so(tmp_path: Path, clock: Clock) -> None:
    first = launched(tmp_path, 0)
    train(first, clock, 1, 4, 1.0)
    first.close()
    second = launched(tmp_path, 4)
    report = second.report({})
    second.close()
    assert report.steps == 4 and report.this_launch is not None and report.this_launch.steps == 0
    assert "small, this launch: no step in 0.0 s" in render(report)


def test_what_a_recovery_loses_is_time_and_work_of_the_next_step(tmp_path: Path, clock: Clock) -> None:
    ledger = launched(tmp_path, 0)
    train(ledger, clock, 1, 5, 1.0)
    clock.now_s += 7.0  # learner and intake start again
    ledger.rewind(3)
    train(ledger, clock, 4, 6, 1.0)
    report = ledger.report({})
    ledger.close()
    assert (report.steps, report.trained_tokens) == (6, 600)
    assert report.budget_share == pytest.approx(100 / ledger.plan.topology.schedule.tokens_per_step)
    assert report.seconds == pytest.approx(5 + 7 + 3)
    assert report.stages.rollout.tokens == 8 * 120, "everything that was generated, two steps of it in vain"
    seconds = [row["seconds"] for row in read_jsonl(ledger.path)]
    assert seconds == pytest.approx([1.0, 1.0, 1.0, 2.0 + 7.0 + 1.0, 1.0, 1.0])


def saved(ledger: Ledger, root: Path, step: int) -> Path:
    """A checkpoint's folder with the ledger's books."""
    folder = root / f"step_{step}"
    folder.mkdir()
    ledger.save(folder)
    return folder


def test_a_launch_goes_on_from_the_books_of_its_checkpoint_and_reads_no_row_before_it(
    tmp_path: Path, clock: Clock
) -> None:
    first = launched(tmp_path, 0)
    first.evaluation(measured(0), "student")
    train(first, clock, 1, 40, 1.0)
    checkpoint = saved(first, tmp_path, 40)
    first.evaluation(measured(40), "student")
    train(first, clock, 41, 43, 1.0)  # lost with the launch
    expected = first.path.read_bytes()
    first.close()
    size = json.loads((checkpoint / BOOKS_FILE).read_text())["size"]
    # whoever reads what is before the checkpoint finds no JSON there
    first.path.write_bytes(b"x" * (size - 1) + expected[size - 1 :])
    second = Ledger(plan=first.plan)
    second.rewind(40, checkpoint)
    kept = expected.find(b"\n", size) + 1
    assert second.path.stat().st_size == kept, "the evaluation of step 40 stays, no later step"
    assert [one.step for one in second.books.evaluations] == [0, 40]
    train(second, clock, 41, 60, 2.0)
    inner = saved(second, tmp_path, 60)
    train(second, clock, 61, 62, 2.0)
    second.rewind(60, inner)  # a recovery within the launch
    train(second, clock, 61, 62, 2.0)
    report = second.report({})
    second.close()
    assert (report.steps, report.trained_tokens, report.student_before) == (62, 6_200, measured(0))
    assert report.seconds == pytest.approx(40.0 + 2 * 20 + 2 * 2 + 2 * 2)
    assert report.staleness.max == 0 and report.stages.rollout.tokens == (60 + 4) * 120
    launch = report.this_launch
    assert launch is not None and (launch.first_step, launch.steps, launch.trained_tokens) == (41, 22, 2_200)


def test_a_file_that_somebody_has_edited_is_read_whole(tmp_path: Path, clock: Clock) -> None:
    first = launched(tmp_path, 0)
    train(first, clock, 1, 4, 1.0)
    checkpoint = saved(first, tmp_path, 4)
    first.close()
    first.path.write_text(first.path.read_text().replace('"step": 1,', '"step":            1,'))
    again = Ledger(plan=first.plan)
    again.rewind(4, checkpoint)
    again.close()
    assert again.books.whole.steps == 4 and len(list(read_jsonl(first.path))) == 4


def test_a_file_that_somebody_has_removed_begins_again(tmp_path: Path, clock: Clock) -> None:
    first = launched(tmp_path, 0)
    train(first, clock, 1, 4, 1.0)
    checkpoint = saved(first, tmp_path, 4)
    first.close()
    first.path.unlink()
    again = Ledger(plan=first.plan)
    again.rewind(4, checkpoint)
    train(again, clock, 5, 5, 1.0)
    again.close()
    assert again.books.whole.steps == 5 and [row["step"] for row in read_jsonl(first.path)] == [5]


def measured(step: int, prompts: int = 4, name: str = "held_out") -> Evaluation:
    return Evaluation.from_counts(prompts, 2, 2, step).model_copy(update={"set": name})


def test_only_the_untrained_student_is_the_one_before_training(tmp_path: Path, clock: Clock) -> None:
    ledger = launched(tmp_path, 0)
    ledger.evaluation(measured(5), "student")
    assert ledger.books.before == {}
    ledger.evaluation(measured(0), "student")
    ledger.close()
    again = launched(tmp_path, 5)
    again.close()
    assert again.books.before == {"held_out": measured(0)} and len(again.books.evaluations) == 2


# --- evaluations over launches ---------------------------------------------------------------------------------------


class Evaluator:
    """Says at once that two of the prompts were right."""

    def __init__(self, topology: Topology) -> None:
        self.sets = topology.evaluation_sets
        self.asked: list[tuple[str, int]] = []
        self.on: list[tuple[str, int]] = []
        """Sets, and how many prompts of them."""

    def slots(self) -> None:
        return None

    def prompts_of(self, name: str, count: int, teacher: str) -> list[int]:
        return list(range(self.count(name, count)))

    def count(self, name: str, wanted: int) -> int:
        return min(wanted, 8)

    async def evaluate(
        self, kind: Any, name: str, count: int, step: int, deadline_s: float, slots: None, teacher: str | None = None
    ) -> Evaluation:
        self.asked.append(("student" if teacher is None else teacher, step))
        self.on.append((name, count))
        return measured(step, self.count(name, count), name)


def evaluations(
    root: Path, version: int, every: str = "10", sets: tuple[str, ...] = ("data.held_out.path=held_out.jsonl",)
) -> tuple[Evaluations, Evaluator, Ledger]:
    settings = (f"evaluation.every_steps={every}", "evaluation.prompts=8", "evaluation.during_prompts=4", *sets)
    ledger = Ledger(plan=make_plan(small_topology(root, *settings)))
    ledger.rewind(version)
    evaluated = asyncio.Event()

    def spawn(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return asyncio.create_task(work, name=name)

    dispatcher: Any = SimpleNamespace(
        plan=ledger.plan, ledger=ledger, evaluated=evaluated, spawn=spawn, metrics=RoleMetrics("launcher"), trace=OFF
    )
    evaluator = Evaluator(ledger.plan.topology)
    fake: Any = evaluator
    return Evaluations(dispatcher, fake, Progress(lambda line: None, 100)), evaluator, ledger


async def test_an_evaluation_that_a_stop_came_before_is_made_up_for(tmp_path: Path) -> None:
    first, _, ledger = evaluations(tmp_path, 0)
    await first.before(0)
    ledger.close()
    for version, asked in ((9, []), (10, [("student", 10)]), (13, [])):
        later, evaluator, ledger = evaluations(tmp_path, version)
        later.make_up(version)
        if later.under_way is not None:
            await later.under_way
        ledger.close()
        assert evaluator.asked == asked, version
    skipped, evaluator, ledger = evaluations(tmp_path, 27)  # the one of step 20 ended with the stop in step 27
    skipped.make_up(27)
    assert skipped.under_way is not None
    await skipped.under_way
    ledger.close()
    assert evaluator.asked == [("student", 27)]
    unwanted, evaluator, ledger = evaluations(tmp_path, 27, "null")
    unwanted.make_up(27)
    ledger.close()
    assert unwanted.under_way is None and evaluator.asked == []


async def test_no_evaluation_is_done_twice(tmp_path: Path) -> None:
    first, evaluator, ledger = evaluations(tmp_path, 0)
    await first.before(0)
    assert sorted(evaluator.asked) == [("student", 0), ("teacher", 0)]
    await first.after(30)
    ledger.close()
    rows = len(list(read_jsonl(ledger.path)))
    for _ in range(2):
        again, evaluator, ledger = evaluations(tmp_path, 30)
        await again.before(30)
        again.make_up(30)
        assert (await again.after(30))["held_out"].step == 30
        ledger.close()
        assert evaluator.asked == [] and len(list(read_jsonl(ledger.path))) == rows


async def test_a_start_that_was_stopped_evaluates_whoever_is_missing(tmp_path: Path) -> None:
    first, _, ledger = evaluations(tmp_path, 0)
    ledger.evaluation(measured(0, 8), "teacher")
    await first.before(0)
    ledger.close()
    assert [row["evaluation"] for row in read_jsonl(ledger.path)] == ["teacher", "student"]


SUMS, WORDS = (
    "evaluation.sets.sums.path=a.jsonl",
    "evaluation.sets.words={path: b.jsonl, during_prompts: 2, judge: teacher}",
)


async def test_each_set_is_evaluated_once_with_its_own_number_of_prompts(tmp_path: Path) -> None:
    """The teacher is not compared with itself; what is missing of an evaluation is made up for, and nothing else."""
    first, evaluator, ledger = evaluations(tmp_path, 0, sets=(SUMS, WORDS))
    await first.before(0)
    assert sorted(zip(evaluator.asked, evaluator.on, strict=True)) == [
        (("student", 0), ("sums", 8)),
        (("student", 0), ("words", 8)),
        (("teacher", 0), ("sums", 8)),
    ]
    ledger.evaluation(measured(10, 4, "sums"), "student")  # and the launch ended
    ledger.close()
    later, evaluator, ledger = evaluations(tmp_path, 10, sets=(SUMS, WORDS))
    later.make_up(10)
    assert later.under_way is not None
    await later.under_way
    assert evaluator.on == [("words", 2)]
    ledger.student_after = await later.after(30)
    report = ledger.report({})
    ledger.close()
    assert (report.student_before, report.student_after, report.teacher) == (None, None, None)
    assert {name: found.student_after for name, found in report.sets.items()} == {
        name: measured(30, 8, name) for name in ("sums", "words")
    }
    assert report.sets["sums"].teacher == measured(0, 8, "sums") and report.sets["words"].teacher is None
    assert report.evaluated == report.sets


async def test_a_steps_row_has_the_last_figures_of_each_set(tmp_path: Path, clock: Clock) -> None:
    """So have the books of a checkpoint; those of an earlier version are read again from the rows."""
    ledger = launched(tmp_path, 0)
    for one in (measured(0, 8, "sums"), measured(5, 4, "sums"), measured(5, 8)):
        ledger.evaluation(one, "student")
    ledger.evaluation(measured(0, 8, "sums"), "teacher")
    train(ledger, clock, 6, 6, 1.0)
    (checkpoint := tmp_path / "checkpoint").mkdir()
    ledger.save(checkpoint)
    ledger.close()
    assert list(read_jsonl(ledger.path))[-1]["evaluation_score"] == {"sums": 0.5, "held_out": 0.25}
    kept = load_books(checkpoint)
    assert kept.before == {"sums": measured(0, 8, "sums")} and kept.latest()["sums"] == measured(5, 4, "sums")
    assert kept.teachers == {"sums": {"teacher": measured(0, 8, "sums")}}
    assert (kept.size > 0, kept.dump()) == (True, ledger.books.dump())
