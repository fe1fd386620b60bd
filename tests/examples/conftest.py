"""Make the addition example's modules importable, as they are for its scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ADDITION = Path(__file__).parents[2] / "examples" / "addition"
sys.path.insert(0, str(ADDITION))


@pytest.fixture
def addition() -> Path:
    """Directory of the addition example."""
    return ADDITION
