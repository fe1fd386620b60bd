"""The soak of the data plane sees its four roles, and what the launcher holds does not grow with the samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_async.bench.wire import soak

SAMPLES = 2000


@pytest.mark.long
def test_a_short_soak_of_the_data_plane(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    code = soak.main(["--samples", str(SAMPLES), "--every", "0.1", "--json", str(path)])
    rows = json.loads(path.read_text())
    seen = {row["role"] for row in rows if row["figure"] == "memory (MiB)"}
    assert seen == {"launcher", "rollout-0", "teacher-0", "intake-0"}, "null engines and the null learner do not count"
    assert {row["figure"] for row in rows} >= {"open files", "threads", "objects", "opd_launcher_leases_active"}
    assert code == any(row["grows"] for row in rows)
    (objects,) = (row for row in rows if row["figure"] == "objects")
    assert objects["role"] == "launcher" and not objects["grows"], objects
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(rows) + 2 and int(said[-1].split()[0].replace(",", "")) >= SAMPLES
