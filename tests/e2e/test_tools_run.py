"""A whole run in which the student itself calls tools of a pool: one answers, one raises, one hangs, and the run goes
on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deadlines import patience
from harness import (
    ROOT,
    Launch,
    check_trained,
    left_running,
    make_model,
    rows,
    steps,
    still_there,
    topology,
    write_topology,
)

from opd_async.run.trained import read_trained

STEPS, ADDED = 4, 21
"""At least so many steps, with so many different sums."""
CALLS = [*["add"] * 70, *["refuse"] * 6, *["hang"] * 3, "nobody"]
WORDS = {
    # a token is a whole call: a student that has learnt nothing calls a tool every few tokens
    176 + index: f'<tool_call>{{"name":"{name}","arguments":{{"a":{index}}}}}</tool_call>'
    for index, name in enumerate(CALLS)
}
TOOLS = '''
import subprocess
import time
from pathlib import Path


def add(a: int) -> str:
    """A hundred more than a, as a token."""
    return f"t{a + 100}"


def refuse(a: int) -> str:
    raise ValueError("no number today")


def hang(a: int) -> str:
    child = subprocess.Popen(["sleep", "3600"])
    with Path(__file__).with_name("hung.txt").open("a") as file:
        file.write(f"{child.pid}\\n")
    time.sleep(3600)
'''
EPISODE = """
import json
from pathlib import Path

SAID = Path(__file__).with_name("said.jsonl")


async def episode(session, row):
    for _ in range(4):
        turn = await session.generate(max_tokens=24, stop="</tool_call>")
        if not turn.calls:
            break
        (call,) = turn.calls
        said = await session.call(call)
        with SAID.open("a") as file:
            file.write(json.dumps([call.name, call.arguments["a"], said]) + "\\n")
        await session.give(said)
"""


@pytest.mark.long
def test_a_run_goes_on_whatever_its_tools_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side, hidden, seed in (("student", 32, 1), ("teacher", 48, 2)):
        make_model(tmp_path / side, hidden=hidden, layers=2, seed=seed, words=WORDS)
    prompts = [{"prompt": f"t{10 + n} t{20 + n} t{30 + n}"} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "pool_tools.py").write_text(TOOLS)
    (tmp_path / "pool_episode.py").write_text(EPISODE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    deadline_s = round(patience(0.5))
    values = topology(
        tmp_path,
        tmp_path,
        schedule__steps=1000,
        schedule__tokens_per_step=128,
        rollout__function="pool_episode:episode",
        rollout__tools={
            "functions": [f"pool_tools:{name}" for name in ("add", "refuse", "hang")],
            "deadline_s": deadline_s,
        },
        telemetry__samples_per_step=8,
    )
    folder = tmp_path / "run"

    def said() -> dict[str, set[str]]:
        """What each tool has answered."""
        calls = rows(tmp_path / "said.jsonl")
        return {name: {text for called, _, text in calls if called == name} for name in {*CALLS}}

    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        run.wait_for_steps(folder, STEPS)
        while len((found := said())["add"]) < ADDED or not all(found.values()):
            run.wait_for_steps(folder, len(steps(folder)) + 1)
        run.stop()
    check_trained(folder, 1, len(steps(folder)))
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == {} and not report["counters"].get("episodes_failed")

    texts = said()
    assert all(text == f"t{a + 100}" for name, a, text in rows(tmp_path / "said.jsonl") if name == "add")
    assert texts["refuse"] == {"error: ValueError: no number today"}
    assert texts["hang"] == {f"error: no answer within {deadline_s} s"}
    assert all("there is no tool 'nobody'; there are add, refuse, hang" in text for text in texts["nobody"])
    hung = [Path(f"/proc/{pid}") for pid in (tmp_path / "hung.txt").read_text().split()]
    assert not still_there(hung), "what a tool has started is gone with it"

    given = [one for step in read_trained(folder) for one in step.given]
    assert len(given) > 10 and sum(row["given_tokens"] for row in steps(folder)) == sum(b - a for _, a, b in given)
    whole = [row for row in rows(folder / "samples.jsonl") if row.get("given")]
    assert whole
    for row in whole:
        words = row["response"].split()
        start, end = row["given"][0]
        call = json.loads(words[start - 1].removeprefix("<tool_call>").removesuffix("</tool_call>"))
        if call["name"] == "add":
            assert words[start:end] == [f"t{call['arguments']['a'] + 100}"], "what the tool said, behind the call"
    assert left_running(tmp_path) == []
