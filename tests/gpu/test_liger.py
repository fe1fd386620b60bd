"""Liger's kernels compute what the learner's own code computes: by Triton's interpreter, in a process of its own.

Their packages are in an environment of their own, which `make test` makes before (`make kernels`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import patience

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEADLINE_S = 220.0


@pytest.mark.long
@pytest.mark.timeout(240)
def test_ligers_kernels_are_the_learners_formulas(tmp_path: Path) -> None:
    packages = [str(folder) for folder in (ROOT / ".venv-kernels").glob("lib/python3*/site-packages")]
    assert packages, "the kernels' packages are in an environment of their own; make kernels"
    path = os.pathsep.join([str(ROOT / "tests/learner"), *packages, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "liger_interpreted.py"), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(DEADLINE_S),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.partition(",")[0] for line in done.stdout.splitlines()]
    assert [found.count(what) for what in ("norm", "gate", "model")] == [9, 4, 3]
