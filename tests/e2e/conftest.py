"""Tiny random models and prompts for whole runs, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student/`, `teacher/` and `prompts.jsonl`; responses last about 180 tokens."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs start a dozen processes: on a busy machine they need longer than a unit test may."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(600))
