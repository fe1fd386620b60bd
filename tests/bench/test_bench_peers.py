"""The comparison with TRL, without TRL: what is read back, merged, told to the other side and shown."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from opd_async.bench.peers import __main__ as peers
from opd_async.bench.peers import sides
from opd_async.bench.peers.curves import Curve, Point, Tick, own_ticks, reached, summarize
from opd_async.bench.peers.output import draw, table
from opd_async.bench.peers.passes import Passed, Task, measure
from opd_async.config.topology_file import load_topology
from opd_async.data.answers import AnswerChecker
from opd_async.data.prompts import Prompt
from opd_async.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart.yaml"
STUDENT = ROOT / "examples/addition/models/student"


def curve(system: str, *shares: float, seed: int = 0) -> Curve:
    """A point each 10 seconds and 100 tokens."""
    points = [Point(5 * i, 10.0 * i, 100.0 * i, share, share + 0.1) for i, share in enumerate(shares)]
    return Curve(system, "", seed, tuple(points))


def test_ticks_of_a_run_of_this_project() -> None:
    evaluation = {"time": 90.0, "evaluation": "student", "step": 0}
    rows = [evaluation, {"step": 1, "time": 103.0, "tokens": 8.0}, {"step": 2, "time": 105.0, "tokens": 4.0}]
    assert own_ticks(rows, 5.0) == [Tick(1, 3.0, 8.0, 103.0), Tick(2, 5.0, 12.0, 105.0)]


def test_a_target_is_reached_between_two_points() -> None:
    points = curve("x", 0.5, 0.7, 0.6, 0.9, 0.8).points
    assert reached(points, 0.75) == pytest.approx((25.0, 250.0))
    assert reached(points, 0.75, "greedy") == pytest.approx((7.5, 75.0))
    assert reached(points, 0.95) is None
    assert reached(points, 0.4) == (0.0, 0.0)  # it began there


def test_runs_of_one_system_are_averaged_and_a_target_needs_all_of_them() -> None:
    own = [curve("own", 0.5, 1.0), curve("own", 0.0, 1.0, seed=1)]
    first, second = summarize([own[0], curve("TRL", 0.5, 0.8), own[1]], [0.75, 0.9])
    assert (first.system, first.runs, second.system, second.runs) == ("own", 2, "TRL", 1)
    assert first.seconds_to[0.75] == pytest.approx((5.0 + 7.5) / 2)
    assert second.tokens_to[0.75] == pytest.approx(100 * 0.25 / 0.3)
    assert second.seconds_to[0.9] is None
    assert first.tokens_per_s == 10.0
    lines = table([first, second], [0.75, 0.9]).splitlines()
    assert len(lines) == 4 and "| 6.2 |" in lines[2] and "| - |" in lines[3]


def test_the_picture(tmp_path: Path) -> None:
    draw(tmp_path / "peers.png", [curve("own", 0.5, 0.9), curve("TRL", 0.5, 0.8)], [0.9])
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_the_other_side_is_told_what_the_topology_says(tmp_path: Path) -> None:
    topology = load_topology(QUICKSTART, ["schedule.steps=7", "seed=3"])
    job = sides.trl_job(topology, tmp_path, 5, sides.parse_settings("beta=1.0,threads=2,lr=1.0e-3"))
    assert (job.steps, job.seed, job.batch, job.max_response_tokens) == (7, 3, 256, 32)
    assert (job.beta, job.threads, job.lr) == (1.0, 2, 1e-3)
    assert (job.beta2, job.warmup_steps, job.clip_grad, job.weight_decay) == (0.95, 20, 1.0, 0.0)
    assert job.scheduler == "polynomial" and job.scheduler_kwargs == {"lr_end": pytest.approx(1e-4), "power": 1.0}
    constant = load_topology(QUICKSTART, ["learner.optimizer.decay=constant"])
    assert sides.trl_job(constant, tmp_path, 5, {}).scheduler == "constant_with_warmup"
    with pytest.raises(ValueError, match="no setting gamma"):
        sides.trl_job(topology, tmp_path, 5, {"gamma": 1})


PRETENDED = """
import json, pathlib, sys
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(job["folder"])
steps = range(1, job["steps"] + 1)
rows = [{"step": step, "seconds": 2.0 * step, "tokens": 8.0 * step, "time": 50.0 + step} for step in steps]
(folder / "clock.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(folder / "step_00000002").mkdir()
sys.exit(job["seed"])
"""


def test_the_other_side_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRETENDED)
    monkeypatch.setattr(sides, "TRL_SCRIPT", script)
    topology = load_topology(QUICKSTART, ["schedule.steps=3"])
    job = sides.trl_job(topology, tmp_path / "good", 2, {})
    outcome = sides.run_trl(Path(sys.executable), job)
    assert outcome.ticks[-1] == Tick(3, 6.0, 24.0, 53.0)
    assert outcome.students == {2: tmp_path / "good/step_00000002"}
    assert json.loads((tmp_path / "good/job.json").read_text()) == asdict(job)
    with pytest.raises(sides.SideError, match=r"ended with 3; see .*bad/log.txt"):
        sides.run_trl(Path(sys.executable), sides.trl_job(topology, tmp_path / "bad", 2, {"seed": 3}))


def test_everything_but_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "347+589=", "label": "0936"}\n')

    def trained(*_: object) -> sides.Outcome:
        return sides.Outcome([Tick(1, 1.0, 10.0, 101.0), Tick(2, 2.0, 20.0, 102.0)], {2: STUDENT})

    monkeypatch.setattr(sides, "run_own", trained)
    monkeypatch.setattr(sides, "run_trl", trained)
    monkeypatch.setattr(peers, "measure", lambda folder, task, samples: Passed(0.5, len(task.prompts)))
    monkeypatch.chdir(ROOT)
    words = [
        "--own",
        "opd.loss=jsd_topk,opd.topk=8",
        "--trl",
        "beta=1",
        "--trl",
        "forward: beta=0",
        "--seeds",
        "0",
        "1",
    ]
    peers.main([*words, "--set", f"data.held_out.path={held_out}", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [one["settings"] for one in figures["curves"]] == ["opd.loss=jsd_topk,opd.topk=8", "beta=1", "forward"] * 2
    assert [point["step"] for point in figures["curves"][0]["points"]] == [0, 2]
    assert figures["curves"][0]["points"][1]["greedy"] == 1


def test_an_answer_counts_when_the_response_ends_by_itself_and_states_the_label() -> None:
    tokenizer = Tokenizer(STUDENT)
    texts = ("347+589=", "203+068=")

    def task(labels: str, tokens: int) -> Task:
        """Answers are the first characters of the responses, the last digit of the first number."""
        rows = zip(tokenizer.encode_batch(texts), labels, strict=True)
        prompts = [Prompt(i, np.array(ids, np.int32), label, {}) for i, (ids, label) in enumerate(rows)]
        return Task(prompts, tokenizer, AnswerChecker(r"^(\d)"), tokens)

    assert measure(STUDENT, task("73", 32), 1).greedy == 1.0
    assert measure(STUDENT, task("74", 32), 2) == Passed(0.5, 0.5)
    assert measure(STUDENT, task("73", 2), 1) == Passed(0.0, 0.0)
