"""The weight path's benchmark on a tiny model: both ways run, and the figures add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import patience

from opd_async.bench import weights

ROOT = Path(__file__).parents[2]


def test_both_ways_are_measured(tmp_path: Path) -> None:
    sizes = [*("--layers", "2", "--hidden", "128", "--vocab", "64"), *("--engines", "2", "--bucket-mib", "1")]
    command = [
        sys.executable,
        "-m",
        "opd_async.bench.weights",
        *sizes,
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(200), check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["engines"] == 2 and figures["bytes"] > 1 << 20
    assert figures["share"] == pytest.approx(figures["path_bytes_per_s"] / figures["broadcast_bytes_per_s"])
    assert "MiB to 2 engines" in done.stdout


def test_buffers_hold_all_bytes() -> None:
    assert weights.bucket_sizes(10, 4) == [4, 4, 2]
    assert weights.bucket_sizes(8, 4) == [4, 4]
