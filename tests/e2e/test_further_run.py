"""Whole runs of agents that edit their history, ask for several choices and fork: all that the student says is trained
once, in the step and the group of its episode, also when an actor is killed and when a run is stopped and resumed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, Launch, check_trained, left_running, rows, steps, topology, write_topology

from opd_async.run.trained import read_trained
from opd_async.scheduling.further import is_further

AGENT = """
from openai import AsyncOpenAI


async def episode(session, row):
    asked = [{"role": "user", "content": row["prompt"]}]
    messages = asked
    async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        for turn in range(3):
            answer = await client.chat.completions.create(
                model="m", messages=messages, max_tokens=12, n=2 if turn == 1 else 1
            )
            said = (answer.choices[0].message.content or "t5").split()[-1]
            # what was said before is forgotten, but for its last word
            messages = [*asked, {"role": "assistant", "content": said}, {"role": "user", "content": f"t{100 + turn}"}]
    session.reward(0.25)
    fork = await session.fork()
    await fork.give(" t99")
    await fork.generate(max_tokens=8)
    return float(len(said) % 2)
"""
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + (' t98 ' if message['role'] == 'assistant' else ' ') }}"
    "{% endfor %}"
)


def agents(inputs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """The topology of a run whose agent is the one above."""
    (folder / "editing_agent.py").write_text(AGENT)
    (folder / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    shared = {
        "rollout__function": "editing_agent:episode",
        "rollout__endpoint": True,
        "data__chat_template": str(folder / "chat.jinja"),
        "reward__kind": "episode",
        "telemetry__samples_per_step": 64,
        "checkpoint__every_steps": 2,
    }
    return write_topology(topology(inputs, folder, **shared | changes), folder / "run.yaml")


def shown(folder: Path) -> list[dict[str, Any]]:
    """The responses that were recorded."""
    return [row for row in rows(folder / "samples.jsonl") if "sample" in row]


def test_all_that_an_agent_is_answered_is_trained_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = agents(inputs, tmp_path, monkeypatch, schedule__steps=8, schedule__rule="filled")
    folder = tmp_path / "run"
    with Launch(file) as run:
        run.wait_for_steps(folder, 3)
        run.find("actors.rollout").kill()
        assert run.wait() == 0, run.text()
    ranges = check_trained(folder, 1, 8)
    further = sorted(sample for sample in ranges if is_further(sample))
    leased = [sample for sample in ranges if not is_further(sample)]
    assert len(further) > 2 * len(leased) > 10, "most of what was said is in further conversations"
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == {"rollout-0": 1}
    assert not report["counters"].get("episodes_failed")
    trained = sum(end - start for parts in ranges.values() for start, end, *_ in parts)
    assert report["trained_tokens"] == trained
    by_id = {row["sample"]: row for row in shown(folder)}
    assert all(("episode" in row) == is_further(sample) for sample, row in by_id.items())
    forks = [row for row in by_id.values() if "episode" in row and " t99 " in f" {row['response']} "]
    assert forks
    for fork in forks:
        assert fork["given"][0][0] == 0, "what it has in common with its session is given"
        whole = by_id.get(fork["episode"])
        if whole is not None and fork["finish"] == whole["finish"] == "stop":
            assert (whole["reward"], len(whole["turn_rewards"])) == (fork["reward"] + 0.25, 1)
            assert whole["turn_rewards"] == [[whole["response_tokens"], 0.25]] and "turn_rewards" not in fork
    assert left_running(tmp_path) == []


@pytest.mark.long
def test_groups_of_episodes_are_whole_steps_also_when_a_run_is_resumed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = agents(
        inputs,
        tmp_path,
        monkeypatch,
        schedule__steps=1000,
        schedule__rule="auto",
        schedule__train_on="samples",
        schedule__samples_per_step=4,
        rollout__group_size=2,
        advantage={"estimator": "grpo"},
    )
    folder = tmp_path / "run"
    with Launch(file) as run:
        run.wait_for_steps(folder, 3)
        run.interrupt()
        assert run.wait() == 130, run.text()
    stopped = len(steps(folder))
    with Launch(file, "--resume", "--set", f"schedule.steps={stopped + 3}") as run:
        assert run.wait() == 0, run.text()
    ranges = check_trained(folder, 1, stopped + 3)
    taken: dict[int, set[int]] = defaultdict(set)
    for step in read_trained(folder):
        taken[step.version + 1] |= set(step.ranges[:, 0].tolist())
    leased = sorted(sample for sample in ranges if not is_further(sample))
    assert leased == list(range(len(leased))) and len(leased) >= 4 * (stopped + 2)
    of_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in shown(folder):
        of_step[row["step"]].append(row)
    for step, found in of_step.items():
        assert all(row["episode"] in taken[step] for row in found if "episode" in row), "with their episodes"
    # of an episode that came to its end: another answer, two choices of the next, a fork
    counts = [sum(row.get("episode") == sample for row in shown(folder)) for sample in leased]
    assert max(counts) == 4 and sum(count == 4 for count in counts) > len(counts) / 2
    assert left_running(tmp_path) == []
