"""kill -9 of the rollout actor in the middle of evaluations, before training and beside it: no response is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT, Launch, check_trained, left_running, rows, topology, write_topology

STEPS, EVERY, PROMPTS = 3, 2, 4
SETS = ("held_out", "words")
ANEW = "responses of evaluations are begun anew"
EPISODE = """
import asyncio
import uuid
from pathlib import Path

HERE = Path(__file__).parent


async def episode(session, row):
    if row["kind"] == "evaluation":
        await session.generate(max_tokens=8)
        (HERE / "began" / uuid.uuid4().hex).touch()
    while (HERE / f"hold_{row['kind']}").exists():
        await asyncio.sleep(0.05)
    await session.generate(max_tokens=16)
    return 1.0
"""


def evaluations(folder: Path) -> list[tuple[int, str]]:
    """Step and set of each evaluation so far."""
    return sorted((row["step"], row["set"]) for row in rows(folder / "metrics.jsonl") if "evaluation" in row)


def until(run: Launch, what: str, true: Callable[[], bool]) -> None:
    """Return once it is true."""
    give_up = time.monotonic() + patience(60.0)
    while not true():
        assert run.process.poll() is None, f"the run ended before {what}:\n{run.text()}"
        assert time.monotonic() < give_up, f"{what} did not come:\n{run.text()}"
        time.sleep(0.05)


def kill_in_an_evaluation(run: Launch, folder: Path, step: int) -> None:
    """Kill the actor while episodes of both sets are held, let them go, and wait for the rows of this step."""
    lost = run.text().count(ANEW)
    until(run, f"the evaluation of step {step}", lambda: len(list((folder / "began").iterdir())) >= PROMPTS)
    run.find("actors.rollout").kill()
    until(run, "the loss of its actor", lambda: run.text().count(ANEW) > lost)
    (folder / "hold_evaluation").unlink()
    wanted = {(step, name) for name in SETS}
    until(run, f"rows of step {step}", lambda: wanted <= set(evaluations(folder / "run")))
    for one in (folder / "began").iterdir():
        one.unlink()


def test_an_evaluation_outlives_its_actor(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held_episode.py").write_text(EPISODE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (tmp_path / "began").mkdir()
    prompts = {"path": str(inputs / "prompts.jsonl")}
    sizes = {"prompts": PROMPTS, "during_prompts": PROMPTS, "every_steps": EVERY}
    values = topology(
        inputs,
        tmp_path,
        schedule__steps=STEPS,
        schedule__tokens_per_step=64,
        rollout__function="held_episode:episode",
        rollout__episode_deadline_s=patience(100.0),
        reward__kind="episode",
        evaluation={"judge": "reward", "teacher": False, "sets": {"words": prompts}} | sizes,
        data__held_out=prompts,
    )
    for kind in ("evaluation", "train"):
        (tmp_path / f"hold_{kind}").touch()
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        kill_in_an_evaluation(run, tmp_path, 0)
        (tmp_path / "hold_evaluation").touch()
        (tmp_path / "hold_train").unlink()
        kill_in_an_evaluation(run, tmp_path, EVERY)
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    check_trained(folder, 1, STEPS)
    assert evaluations(folder) == sorted((step, name) for step in (0, EVERY, STEPS) for name in SETS)
    found = [row for row in rows(folder / "metrics.jsonl") if "evaluation" in row]
    figures = {(row["prompts"], row["pass_at_1"], row["pass_at_1_greedy"], row["unjudged"]) for row in found}
    assert figures == {(PROMPTS, 1.0, 1.0, 0)}
    assert json.loads((folder / "report.json").read_text())["restarts"] == {"rollout-0": 2}
    assert left_running(tmp_path, inputs) == []
