"""A run whose teacher is inside the learner: converted, loaded, and known to no other process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from deadlines import patience
from harness import ROOT, VOCAB, Launch, check_trained, make_model, steps, topology, write_topology

FEWER = 16
"""Ids of the student that the teacher has no row for."""


def convert(teacher: Path, out: Path) -> Path:
    """The teacher as a Megatron checkpoint."""
    command = ["-m", "opd_async.learner.convert", "hf-to-megatron", "--hf", str(teacher), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, timeout=patience(120))
    return out


def test_the_learner_holds_the_teacher(inputs: Path, tmp_path: Path) -> None:
    """Sequences are spread over two ranks, half of the responses are given by a data set, and the teacher has not all
    ids of the student."""
    teacher = make_model(tmp_path / "teacher", hidden=48, layers=2, seed=2, rows=VOCAB - FEWER)
    load = convert(teacher, tmp_path / "teacher-megatron")
    values = topology(inputs, tmp_path, schedule__steps=4, opd__loss="forward_kl_full", opd__gkd_lambda=0.5)
    given = [{"prompt": f"t{10 + i} t{20 + i}", "completion": " ".join(["t77"] * 30)} for i in range(5)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    values["data"]["completions"] = {"path": str(tmp_path / "given.jsonl")}
    values["learner"]["context_parallel"] = 2
    values["data"]["teacher_prompt"] = "t9 t8 t7 t6 t5 {{ text }}"  # five tokens that the student does not have
    values["opd"] |= {"use_opd": True, "type": "megatron", "teacher_load": str(load), "plain_kl_every": 2}
    values["models"]["teacher"] = {"path": str(teacher)}
    values["models"]["allow_token_differences"] = [f"t{token}" for token in range(VOCAB - FEWER, VOCAB)]
    del values["engines"]["teacher"], values["teacher"]
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    trained = check_trained(folder, 1, 4)
    given_ends = [ranges[-1][1] for sample, ranges in trained.items() if sample % 2 == 0]
    assert max(given_ends) == 31 and given_ends.count(31) >= 4  # 30 tokens and the end
    kinds = [role["kind"] for role in json.loads((folder / "plan.json").read_text())["roles"]]
    assert sorted(kinds) == ["intake", "learner", "rollout", "student_engine"]
    assert str(load) not in (folder / "logs" / "rollout-0.log").read_text()
    rows = steps(folder)
    assert len(rows) == 4
    for row in rows:
        assert row["learner_loss"] > 0.1  # two random models: the loss is a divergence, not a surrogate around zero
        assert 0.0 < row["learner_frequent_signal_share"] <= 1.0
    assert [("learner_plain_kl" in row) for row in rows] == [True, False, True, False]
    # the student's distribution is that over the shared ids, for the engine that samples and for the learner
    assert abs(rows[0]["learner_ratio_max"] - 1.0) < 1e-3
