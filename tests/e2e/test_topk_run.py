"""A run whose loss is on the teacher's top-k, and which is evaluated on three sets: the teacher judges two, answers the
third."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import VOCAB, Launch, check_trained, make_model, steps, topology, write_topology
from harness import rows as rows_of
from monitoring import Prometheus

MORE = 64
"""Ids that the teacher alone has."""
JUDGED, ANSWERED = 24, 6
"""Prompts of the two sets, whose responses are all written down."""


def test_forward_kl_on_the_top_k(inputs: Path, tmp_path: Path) -> None:
    """The teacher has more ids than the student, and another token at one of the student's."""
    make_model(tmp_path / "teacher", hidden=48, layers=2, seed=2, rows=VOCAB + MORE, words={VOCAB - 1: "<think>"})
    values = topology(inputs, tmp_path, schedule__steps=4, opd__loss="forward_kl_topk", opd__topk=VOCAB // 2)
    values["models"] |= {"teacher": {"path": str(tmp_path / "teacher")}, "allow_token_differences": ["<think>"]}
    values["learner"] |= {"tensor_parallel": 2}
    few = [json.loads(line) for line in (inputs / "prompts.jsonl").read_text().splitlines()[:ANSWERED]]
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"question": one["prompt"], "label": "t3"}) + "\n" for one in few)
    )
    chats = values["data"]["train"] | {"judge": "teacher", "prompts": JUDGED}
    sums = {
        "path": str(tmp_path / "sums.jsonl"),
        "prompt_key": "question",
        "max_response_tokens": 5,
        "temperature": 0.5,
    }
    values["evaluation"] = {"every_steps": 2, "during_prompts": 2, "sets": {"chats": chats, "sums": sums}}
    values["evaluation"]["sets"]["exact"] = chats | {"teacher_topk": 2 * VOCAB}
    values["telemetry"] = {"samples_per_step": JUDGED}
    with Prometheus(tmp_path / "prometheus", tmp_path / "run" / "targets.json") as watcher:
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            assert run.wait() == 0, run.text()
        assert watcher.empty_in("run", "Distance to the teacher") == []
    check_trained(tmp_path / "run", 1, 4)
    rows = steps(tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        # the likelier 40 % of the teacher's ids, without the fifth that the student has not; it does not know them yet
        assert 0.45 < row["learner_teacher_support"] < 0.65
        assert 0.3 < row["learner_student_support"] < row["learner_teacher_support"]
        assert row["learner_loss"] > 0.0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["student_before"] is None and sorted(report["sets"]) == ["chats", "exact", "sums"]
    chats, sums = report["sets"]["chats"], report["sets"]["sums"]
    before, after = chats["student_before"], chats["student_after"]
    assert chats["teacher"] is None and before["pass_at_1"] is None
    assert before["reverse_kl"] == pytest.approx(rows[0]["learner_reverse_kl"], rel=0.5)  # of the same student
    assert after["reverse_kl"] > 0.0
    assert before["reverse_kl_interval"][0] < before["reverse_kl"] < before["reverse_kl_interval"][1]
    assert before["unjudged"] == after["unjudged"] == 0
    texts = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    first = [row for row in texts if row.get("evaluation") == "student" and row["step"] == 0]
    shown = [row for row in first if row["set"] == "chats"]
    assert len(shown) == JUDGED
    gaps = [[p - q for p, q in zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)] for row in shown]
    assert [len(one) for one in gaps] == [row["response_tokens"] for row in shown]
    mean = sum(map(sum, gaps)) / sum(map(len, gaps))
    assert mean == pytest.approx(before["reverse_kl"], abs=1e-3)  # of the same tokens
    check_set_with_answers(sums, [row for row in first if row["set"] == "sums"])
    evaluated = [row for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "evaluation" in row]
    found = sorted((row["evaluation"], row["set"], row["step"], row["prompts"]) for row in evaluated)
    assert found == [
        *(("student", "chats", step, prompts) for step, prompts in ((0, JUDGED), (2, 2), (4, JUDGED))),
        *(("student", "exact", step, prompts) for step, prompts in ((0, JUDGED), (2, 2), (4, JUDGED))),
        *(("student", "sums", step, prompts) for step, prompts in ((0, ANSWERED), (2, 2), (4, ANSWERED))),
        ("teacher", "sums", 0, ANSWERED),
    ]
    check_exact(report["sets"]["exact"]["student_before"], before)
    assert set(rows[-1]["evaluation_reverse_kl"]) == {"chats", "exact"} and set(rows[-1]["evaluation_forward_kl"]) == {
        "exact"
    }
    assert set(rows[-1]["evaluation_score"]) == {"sums"}


def check_exact(found: dict[str, Any], estimate: dict[str, Any]) -> None:
    """Of other responses to the same prompts: the same distance, with less noise. Of the forward KL a large part is the
    teacher's probability of ids that the student has not."""
    assert (found["teacher_topk"], found["unjudged"], estimate["forward_kl"]) == (2 * VOCAB, 0, None)
    assert found["reverse_kl"] == pytest.approx(estimate["reverse_kl"], rel=0.5)
    width, other = (np.diff(one["reverse_kl_interval"])[0] for one in (found, estimate))
    assert width < other and found["forward_kl"] > found["reverse_kl"] + 1.0


def check_set_with_answers(found: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    """Its limit and its temperature are its own, and the teacher is evaluated too."""
    before = found["student_before"]
    assert (before["prompts"], before["temperature"], before["reverse_kl"]) == (ANSWERED, 0.5, None)
    assert found["teacher"]["set"] == "sums" and found["student_after"]["step"] == 4
    assert len(shown) == ANSWERED and all(row["response_tokens"] <= 5 and "right" in row for row in shown)
    assert sum(row["right"] for row in shown) == round(before["pass_at_1"] * ANSWERED)
