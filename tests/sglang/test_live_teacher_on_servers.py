"""A real server that scores for its own student between what it generates."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Launch, make_inputs, write_topology
from test_live_teacher import HINT, chunks_of
from test_pipeline import check_run, on_sglang

pytestmark = pytest.mark.timeout(900)


def test_live_weights_score_on_the_students_server(tmp_path: Path) -> None:
    values, folder = (
        on_sglang(make_inputs(tmp_path / "inputs"), tmp_path, telemetry__samples_per_step=8),
        tmp_path / "run",
    )
    del values["models"]["teacher"], values["engines"]["teacher"]
    values["data"]["teacher_prompt"] = f"{HINT} {{{{ text }}}}"
    values["opd"] = {"use_opd": True, "type": "self", "self": {"place": "engines", "weights": "live"}, "topk": 8}
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        report = check_run(run, folder)
    assert report["restarts"] == {}
    assert "cannot be trusted" not in (folder / "logs" / "teacher-0.log").read_text()
    chunks = chunks_of(folder)
    assert chunks and all(version <= scored <= sample["step"] - 1 for sample, _, _, version, scored in chunks), chunks
    assert max(scored for *_, scored in chunks) > 2
