"""The memory benchmark, on a tiny model: every phase is there, and a checkpoint adds next to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import patience

from opd_async.bench.convert import make_model

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_phase_is_measured_and_a_checkpoint_adds_little(ranks: int, tmp_path: Path) -> None:
    """16 million weights, so that a copy of a checkpoint of 250 MiB would be seen beside what the library takes."""
    make_model(tmp_path / "model", 2, 512, 16_384)
    started = [sys.executable, *(TORCHRUN if ranks == 2 else [])]
    command = [*started, "-m", "opd_async.bench.memory", str(tmp_path / "model"), "--tokens", "256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["libraries", "model", "first step", "step", "checkpoint"]
    bytes_each = 4 + 4 + 8 / ranks  # of the weights, their gradients, and this rank's share of the moments
    assert found["weights"] * bytes_each / 2**20 <= found["planned_states_mib"] * 1.01
    assert found["checkpoint_mib"] > 12 * found["weights"] / 2**20
    saved = found["phases"][-1]
    assert saved["peak"] - saved["before"] <= found["checkpoint_mib"] / 4
    assert found["phases"][3]["tensors"] <= 17 * found["weights"] / 2**20  # a step leaves nothing behind
    assert "bytes a weight beside those activations" in done.stdout
