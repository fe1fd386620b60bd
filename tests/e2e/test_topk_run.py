"""A run whose loss is on the teacher's top-k: from the engine's answer to the learner's report."""

from __future__ import annotations

from pathlib import Path

from harness import VOCAB, Launch, check_trained, steps, topology, write_topology


def test_forward_kl_on_the_top_k(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path, schedule__steps=4, opd__loss="forward_kl_topk", opd__topk=VOCAB // 2)
    values["learner"] |= {"tensor_parallel": 2}
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    check_trained(tmp_path / "run", 1, 4)
    rows = steps(tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        # half of the tokens, the likelier ones of the teacher, whom the student does not know yet
        assert 0.6 < row["learner_teacher_support"] < 1.0
        assert 0.3 < row["learner_student_support"] < row["learner_teacher_support"]
        assert row["learner_loss"] > 0.0
