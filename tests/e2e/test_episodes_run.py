"""A whole run of episodes on the embedded engine: turns, tools, weights that change in between, an actor that is killed
in the middle of them; episodes that raise, hang and generate nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT, Launch, check_trained, left_running, rows, steps, topology, write_topology

from opd_async.run.trained import read_trained

STEPS = 8
TURNS = 5
EPISODE = f"""
import asyncio


async def episode(session, row):
    number = int(row["prompt"].split()[0][1:])
    if number % 10 == 3:
        await session.generate(max_tokens=6)
        raise ValueError("no tool today")
    if number % 10 == 5:
        await session.generate(max_tokens=6)
        await asyncio.sleep(3600)
    if number % 10 == 7:
        return 0.25
    for turn in range({TURNS}):
        said = await session.generate(max_tokens=24)
        assert len(said.token_ids) <= 24
        await asyncio.sleep(0.3 if number % 10 == 1 else 0.0)
        await session.give(f"t{{100 + turn}} t{{150 + len(said.token_ids)}} t99")
    session.finish(1.0)
"""


@pytest.mark.long
def test_episodes_are_trained_once_whatever_happens_to_them(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_episode.py").write_text(EPISODE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    values = topology(
        inputs,
        tmp_path,
        schedule__steps=STEPS,
        schedule__tokens_per_step=192,
        rollout__function="my_episode:episode",
        rollout__episode_deadline_s=patience(0.7),  # those that do not hang end within it on a busy machine too
        reward__kind="episode",
        data__held_out={"path": str(inputs / "prompts.jsonl")},
        evaluation={"judge": "reward", "prompts": 8, "every_steps": None, "teacher": False},
        telemetry__samples_per_step=8,
    )
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        run.wait_for_steps(tmp_path / "run", 3)
        run.find("actors.rollout").kill()
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    ranges = check_trained(folder, 1, STEPS)
    given = [one for step in read_trained(folder) for one in step.given]
    assert len(given) > 10 and all(end - start == 3 for _, start, end in given)
    assert any(parts[0][2] < parts[-1][3] for parts in ranges.values()), "weights changed inside an episode"
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == {"rollout-0": 1}
    trained = sum(end - start for parts in ranges.values() for start, end, *_ in parts)
    assert report["trained_tokens"] == trained, "given tokens are in no sum"
    assert report["counters"]["episodes_failed"] >= 2
    taken = steps(folder)
    assert sum(row.get("given_tokens", 0) for row in taken) == 3 * len(given)
    assert all(row["tokens"] >= 192 for row in taken)
    assert sum(row["rewarded"] for row in taken) > 5 and sum(row["unrewarded"] for row in taken) >= 1
    shown = [row for row in rows(folder / "samples.jsonl") if "sample" in row]
    assert {row["finish"] for row in shown} >= {"stop", "failed"}
    whole = next(row for row in shown if row.get("reward") == 1.0 and row["given"])
    words = whole["response"].split()
    for index, (start, end) in enumerate(whole["given"]):
        assert words[start] == f"t{100 + index}" and words[end - 1] == "t99", whole
        assert all(value == 0.0 for value in whole["teacher_logprobs"][start:end])
    evaluated = [row for row in rows(folder / "metrics.jsonl") if "evaluation" in row]
    assert evaluated and all(0.0 < row["pass_at_1"] < 1.0 for row in evaluated), "they run the same episodes"
    assert left_running(tmp_path) == []


AGAIN = """
import asyncio


async def episode(session, row):
    for turn in range(8):
        said = await session.generate(max_tokens=16)
        await asyncio.sleep(0.3)  # longer than what frees a slot
        await session.give(f"t{100 + turn} t{150 + len(said.token_ids)} t99")
"""


def test_an_episode_goes_on_behind_a_dead_engine_and_a_resumption(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "again_episode.py").write_text(AGAIN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    values = topology(
        inputs,
        tmp_path,
        schedule__steps=1000,
        schedule__rule="filled",
        schedule__tokens_per_step=128,
        rollout__function="again_episode:episode",
        checkpoint__every_steps=2,
    )
    file, folder = write_topology(values, tmp_path / "run.yaml"), tmp_path / "run"
    with Launch(file) as run:
        run.wait_for_steps(folder, 2)
        run.find("actors.engine.server", "student").kill()
        run.wait_for_text("student-engine-0 ended")
        run.wait_for_steps(folder, len(steps(folder)) + 2)
        run.interrupt()
        assert run.wait() == 130, run.text()
    stopped, resumed_at = len(steps(folder)), time.time()
    with Launch(file, "--resume", "--set", f"schedule.steps={stopped + 4}") as run:
        assert run.wait() == 0, run.text()
    ranges = check_trained(folder, 1, stopped + 4)
    assert steps(folder)[stopped]["time"] > resumed_at
    trained: dict[int, set[bool]] = {}
    for step in read_trained(folder):
        for sample, *_ in step.ranges.tolist():
            trained.setdefault(sample, set()).add(step.version >= stopped)
    assert {False, True} in trained.values(), "an episode was under way when the run was stopped, and went on"
    assert any(len(parts) > 4 for parts in ranges.values()), "several turns of one episode were trained"
    given = [one for step in read_trained(folder) for one in step.given]
    assert len(given) > 10 and all(end - start == 3 for _, start, end in given)
    counters = json.loads((folder / "report.json").read_text())["counters"]
    assert not counters.get("episodes_failed"), "what was said before is replayed, and what was given is the same"
    assert left_running(tmp_path) == []


AGENT = """
from openai import AsyncOpenAI


async def episode(session, row):
    messages = [{"role": "user", "content": row["prompt"]}]
    async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        for turn in range(3):
            stream = await client.chat.completions.create(model="m", messages=messages, max_tokens=12, stream=True)
            said = ""
            async for chunk in stream:
                said += chunk.choices[0].delta.content or ""
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"t{100 + turn}"}]
        fresh = await client.chat.completions.create(model="m", messages=messages[-1:], max_tokens=4)
        assert fresh.usage.completion_tokens <= 4
    return 1.0
"""
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + (' t99 ' if message['role'] == 'assistant' else ' ') }}"
    "{% endfor %}"
)


def test_an_agent_that_speaks_openais_api_is_trained_on_what_it_was_answered(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_agent.py").write_text(AGENT)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    values = topology(
        inputs,
        tmp_path,
        schedule__steps=4,
        schedule__tokens_per_step=96,
        rollout__function="my_agent:episode",
        rollout__endpoint=True,
        data__chat_template=str(tmp_path / "chat.jinja"),
        reward__kind="episode",
        telemetry__samples_per_step=8,
    )
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    check_trained(folder, 1, 4)
    assert not json.loads((folder / "report.json").read_text())["counters"].get("episodes_failed")
    whole = [
        row for row in rows(folder / "samples.jsonl") if row.get("finish") == "stop" and len(row.get("given", ())) == 2
    ]
    assert whole
    for row in whole:
        words = row["response"].split()
        for turn, (start, end) in enumerate(row["given"]):
            assert words[start:end] == ["t99", f"t{100 + turn}"], "the new message alone, behind what was sampled"
    assert left_running(tmp_path) == []
