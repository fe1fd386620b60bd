"""A run whose loss is on the teacher's top-k, and whose evaluations the teacher judges: no label anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import VOCAB, Launch, check_trained, make_model, steps, topology, write_topology

MORE = 64
"""Ids that the teacher alone has."""
JUDGED = 24
"""Prompts of an evaluation, whose responses are all written down."""


def test_forward_kl_on_the_top_k(inputs: Path, tmp_path: Path) -> None:
    """The teacher has more ids than the student, and another token at one of the student's."""
    make_model(tmp_path / "teacher", hidden=48, layers=2, seed=2, rows=VOCAB + MORE, words={VOCAB - 1: "<think>"})
    values = topology(inputs, tmp_path, schedule__steps=4, opd__loss="forward_kl_topk", opd__topk=VOCAB // 2)
    values["models"] |= {"teacher": {"path": str(tmp_path / "teacher")}, "allow_token_differences": ["<think>"]}
    values["learner"] |= {"tensor_parallel": 2}
    values["data"]["held_out"] = values["data"]["train"]
    values["evaluation"] = {"judge": "teacher", "prompts": JUDGED}
    values["telemetry"] = {"samples_per_step": JUDGED}
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    check_trained(tmp_path / "run", 1, 4)
    rows = steps(tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        # the likelier 40 % of the teacher's ids, without the fifth that the student has not; it does not know them yet
        assert 0.45 < row["learner_teacher_support"] < 0.65
        assert 0.3 < row["learner_student_support"] < row["learner_teacher_support"]
        assert row["learner_loss"] > 0.0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    before, after = report["student_before"], report["student_after"]
    assert report["teacher"] is None and before["pass_at_1"] is None
    assert before["reverse_kl"] == pytest.approx(rows[0]["learner_reverse_kl"], rel=0.5)  # of the same student
    assert after["reverse_kl"] > 0.0
    assert before["reverse_kl_interval"][0] < before["reverse_kl"] < before["reverse_kl_interval"][1]
    assert before["unjudged"] == after["unjudged"] == 0
    texts = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    shown = [row for row in texts if row.get("evaluation") == "student" and row["step"] == 0]
    assert len(shown) == JUDGED
    gaps = [[p - q for p, q in zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)] for row in shown]
    assert [len(one) for one in gaps] == [row["response_tokens"] for row in shown]
    mean = sum(map(sum, gaps)) / sum(map(len, gaps))
    assert mean == pytest.approx(before["reverse_kl"], abs=1e-3)  # of the same tokens
