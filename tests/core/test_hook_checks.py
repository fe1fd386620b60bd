"""Hooks before the start: what is wrong with one is said with its key, and the examples of the page pass."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hook_examples import EXAMPLES, ROOT, write_examples
from small_runs import topology_data, write_topology

from opd_async.checks.evaluation import evaluation_problems
from opd_async.checks.hooks import hook_problems
from opd_async.checks.inputs import examine
from opd_async.checks.reward import reward_problems
from opd_async.config.topology_file import load_topology
from opd_async.errors import InputError

MODULE = """
import sys
print("what a module prints when it is loaded is no problem")
number = 3

def two(one, other):
    return True

def none():
    return True

class Loss:
    def __call__(self, rows):
        return rows

loss = Loss()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples and a module of the test's in the working directory; processes find the project all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    write_examples(tmp_path)
    (tmp_path / "checked_hooks.py").write_text(MODULE)
    (tmp_path / "leaving_hooks.py").write_text("import os\nos._exit(3)\n")


def problems(root: Path, *overrides: str) -> list[str]:
    samples = ("schedule.train_on=samples", "schedule.samples_per_step=8")
    return list(hook_problems(load_topology(write_topology(root, topology_data(root)), [*samples, *overrides])))


def test_the_page_has_an_example_of_every_hook() -> None:
    assert set(EXAMPLES) == {"A reward", "An episode", "Prompts", "A loss", "A filter of groups", "Tracking"}


def test_the_examples_of_the_page_pass(tmp_path: Path) -> None:
    hooks = ("opd.function=my_loss:loss", "schedule.filter=my_hooks:keep", "tracking.function=my_hooks:track")
    hooks += ("rollout.function=my_hooks:episode", "reward.kind=episode")
    assert problems(tmp_path, *hooks) == []
    assert problems(tmp_path, "opd.function=checked_hooks:loss") == [], "an object that can be called will do"
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "opd.function=checked_hooks:two",
            "checked_hooks:two takes (one, other), but is called with (rows)",
        ),
        (
            "opd.function=checked_hooks:number",
            "opd.function: checked_hooks:number is int, not a function; write",
        ),
        (
            "schedule.filter=checked_hooks:none",
            "checked_hooks:none takes (), but is called with (group)",
        ),
        ("schedule.filter=checked_hooks:nix", "schedule.filter: checked_hooks:nix cannot be loaded (AttributeError"),
        ("tracking.function=nowhere:track", "tracking.function: nowhere:track cannot be loaded (ModuleNotFoundError"),
        ("tracking.function=leaving_hooks:track", "leaving_hooks:track ends the process that loads it with code 3"),
        ("schedule.train_on=tokens", "schedule.filter: chooses among finished groups, but steps take parts of them"),
    ],
)
def test_what_cannot_be_called_is_said(tmp_path: Path, override: str, words: str) -> None:
    given = [override] if "train_on" not in override else ["schedule.filter=my_hooks:keep", override]
    (found,) = problems(tmp_path, *given)
    assert words in found


def test_a_loss_on_the_whole_vocabulary_has_no_rows(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "opd.function=my_loss:loss", "opd.loss=jsd_full")
    assert found.startswith("opd.function: opd.loss is jsd_full, on the whole vocabulary, whose rows no function gets")


def test_check_names_the_line_of_a_hook(tmp_path: Path) -> None:
    data = topology_data(tmp_path)
    data["tracking"] = {"function": "nowhere:track"}
    data["opd"] = {"function": "nowhere:loss"}
    file = write_topology(tmp_path, data)
    lines = file.read_text().splitlines()
    with pytest.raises(InputError) as caught:
        examine(file, [], lambda line: None)
    for key in ("tracking", "opd"):
        number = lines.index(f"{key}:") + 2
        assert f"  line {number}: {key}.function: nowhere:" in str(caught.value)


def test_an_episode_is_a_coroutine_function_of_session_and_row(tmp_path: Path) -> None:
    (plain,) = problems(tmp_path, "rollout.function=checked_hooks:two")
    assert plain == "rollout.function: checked_hooks:two is awaited, but is no coroutine function; write `async def`"
    (few,) = problems(tmp_path, "rollout.function=checked_hooks:none")
    assert few.startswith("rollout.function: checked_hooks:none takes () -> ") or "is called with (session, row)" in few
    episodes = ["rollout.function=my_hooks:episode", "evaluation.judge=teacher"]
    (judged,) = evaluation_problems(load_topology(write_topology(tmp_path, topology_data(tmp_path)), episodes))
    assert judged.startswith("evaluation.judge: teacher") and judged.endswith("write reward or answer")


def test_an_endpoint_needs_an_agent_and_a_template(tmp_path: Path) -> None:
    (none,) = problems(tmp_path, "rollout.endpoint=true")
    assert none.startswith("rollout.endpoint: true, but no rollout.function")
    agent = ("rollout.endpoint=true", "rollout.function=my_hooks:episode")
    assert problems(tmp_path, *agent) == []
    (read,) = problems(tmp_path, *agent, "data.privileged_key=label")
    assert read.startswith("rollout.endpoint: agents write the prompts")
    topology = load_topology(write_topology(tmp_path, topology_data(tmp_path)), agent)
    config = tmp_path / "student/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    (bare,) = hook_problems(topology)
    assert bare.startswith("rollout.endpoint: ") and bare.endswith("give one in data.chat_template")
    (tmp_path / "student/tokenizer.json").unlink()
    (broken,) = hook_problems(topology)
    assert broken.startswith("rollout.endpoint: ") and "no tokenizer.json" in broken


def test_tools_are_functions_of_different_names_that_an_episode_calls(tmp_path: Path) -> None:
    tools = 'rollout.tools={functions: ["checked_hooks:two", "my_hooks:judge"]}'
    assert problems(tmp_path, "rollout.function=my_hooks:episode", tools) == []
    (alone,) = problems(tmp_path, tools)
    assert alone.startswith("rollout.tools.functions: no rollout.function")
    twice = 'rollout.tools={functions: ["checked_hooks:two", "my_hooks:two", "checked_hooks:number"]}'
    found = problems(tmp_path, "rollout.function=my_hooks:episode", twice)
    assert found[0].startswith("rollout.tools.functions: two stands there twice")
    assert any("checked_hooks:number is int, not a function" in problem for problem in found)


def test_somebody_must_say_what_an_episode_earns(tmp_path: Path) -> None:
    topology = load_topology(write_topology(tmp_path, topology_data(tmp_path)), ["reward.kind=episode"])
    assert any(found.startswith("reward.kind: episode, but no rollout.function") for found in reward_problems(topology))
