"""Whole runs on real servers, and what only they have; `make test-sglang` runs this folder, `make test` does not."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("e2e", "conformance"):  # the whole-run harness, and the server under test
    sys.path.append(str(Path(__file__).parents[1] / folder))
