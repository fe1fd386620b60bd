"""Runs on several hosts of a lab: inputs made once, and time for processes on a busy machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "e2e")]  # whole runs are judged there too, by the same rules

from harness import make_inputs  # noqa: E402


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student/`, `teacher/` and `prompts.jsonl`; responses last about 180 tokens."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs start a dozen processes."""
    for item in items:
        item.add_marker(pytest.mark.timeout(600))
