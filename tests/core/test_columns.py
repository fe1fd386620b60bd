"""The page on running a run lists the columns of `metrics.jsonl` that the intake and the learner make."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def listed() -> set[str]:
    """The first cells of the table of steps."""
    text = (ROOT / "docs/running.md").read_text().partition("### Rows of steps")[2].partition("###")[0]
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def keys_of(file: str, function: str) -> set[str]:
    """The keys of every dictionary that a function makes, by its source: no torch here."""
    tree = ast.parse((ROOT / file).read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    keys = (key for node in ast.walk(found) if isinstance(node, ast.Dict) for key in node.keys)
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def figures_of_the_learner() -> set[str]:
    """The fields of `StepMetrics`."""
    tree = ast.parse((ROOT / "learner/metrics.py").read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "StepMetrics")
    return {
        f"learner_{node.target.id}"
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_the_columns_of_steps_are_listed() -> None:
    written = keys_of("actors/intake/report.py", "describe_step") | keys_of(
        "actors/intake/report.py", "describe_rewards"
    )
    figures = figures_of_the_learner() | {"learner_idle_s"}
    assert {"tokens", "cuts", "reward_mean"} <= written and {"learner_reverse_kl", "learner_value_loss"} <= figures
    assert written - listed() == set()
    assert {name for name in listed() if name.startswith("learner_")} == figures
