"""Disks that fill up or become read-only in the middle of a run: it ends with the right words, and goes on later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
from harness import Launch, check_trained, left_running, steps, topology, write_topology
from small_disk import SmallDisk

STEPS = 26
EVERY = 12


def family(run: Launch) -> list[psutil.Process]:
    return [psutil.Process(run.process.pid), *run.family()]


def sealed(folder: Path) -> list[str]:
    return sorted(marker.parent.name for marker in (folder / "checkpoints").glob("step_*/complete.json"))


@pytest.mark.long
def test_a_disk_that_fills_up_and_one_that_becomes_read_only(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = topology(
        inputs, tmp_path, schedule__steps=STEPS, checkpoint__export_hf=True, checkpoint__every_steps=EVERY
    )
    file = write_topology(values, tmp_path / "run.yaml")
    with SmallDisk(folder) as disk, Launch(file) as run:
        run.wait_for_steps(folder, EVERY + 1)
        while not sealed(folder):
            run.wait_for_steps(folder, len(steps(folder)) + 1)
        disk.fill(family(run))
        assert run.wait() == 1, run.text()
        said = run.text()
        assert "defect" not in said and "Traceback" not in said, said
        assert "no checkpoint after step 24: " in said and disk.words[0] in said, said
        assert "The last checkpoint is step_00000012: go on from it with --resume" in said, said
        # what only people read is left out and counted, and training goes on
        assert "metrics.jsonl cannot be written: " in said and "unwritten rows" in said, said
        assert sealed(folder) == ["step_00000012"] and left_running(tmp_path) == []
        disk.free()
        with SmallDisk(tmp_path / "other") as checkpoints:
            # a file system of its own, on which nobody has a file open
            shutil.move(folder / "checkpoints", checkpoints.path / "checkpoints")
            (folder / "checkpoints").symlink_to(checkpoints.path / "checkpoints")
            again = Launch(file, "--resume")
            again.wait_for_text(f"step {EVERY + 1}/{STEPS}", 120.0)  # the first launch has left rows of such steps
            checkpoints.freeze(family(again))
            with again:
                assert again.wait() == 1, again.text()
            said = again.text()
            assert "defect" not in said and "no checkpoint after step 24: " in said, said
            assert "The student after step 24 is in " in said, said
            assert (folder / "export/step_00000024/config.json").is_file()
            assert json.loads((folder / "report.json").read_text())["steps"] == 24
            checkpoints.free()
            with Launch(file, "--resume") as last:
                assert last.wait() == 0, last.text()
            assert [row["step"] for row in steps(folder)] == list(range(1, STEPS + 1))
            check_trained(folder, 1, STEPS)
            assert sealed(folder) == ["step_00000024", "step_00000026"]
