"""Files for forges and tools: they can be read, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import opd_async

ROOT = Path(__file__).parents[2]


JOBS = {
    "tests": {"lint", "tests", "smollm2", "chaos", "cluster", "sglang", "wheel"},
    "nightly": {"long", "chaos"},
}
USED = {
    "tests": {"lint", "test", "test-smollm2", "chaos", "test-cluster", "test-sglang", "install"},
    "nightly": {"test-long", "chaos"},
}


@pytest.mark.parametrize("name", JOBS)
def test_workflows_run_targets_that_there_are(name: str) -> None:
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {word for command in commands for word in re.findall(r"make ([a-z0-9-]+)", command)}
    assert used == USED[name] and used <= targets
    assert set(workflow["jobs"]) == JOBS[name]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == opd_async.__version__ and citation["license"] == "Apache-2.0"


def test_pre_commit_uses_the_tools_of_the_project() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff", "ruff-format", "mypy", "modules"}


def test_every_issue_template_says_what_it_is_for() -> None:
    for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"):
        head = yaml.safe_load(file.read_text().split("---")[1])
        assert head["name"] and head["about"]
