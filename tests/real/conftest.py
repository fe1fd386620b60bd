"""A run on real weights; `make test-smollm2` runs this folder, `make test` does not: it takes a download of 93 MB."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # the whole-run harness
