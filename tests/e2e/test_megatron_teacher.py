"""A run whose teacher is inside the learner: converted, loaded, and known to no other process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deadlines import patience
from harness import ROOT, VOCAB, Launch, check_trained, make_model, steps, topology, write_topology
from harness import rows as all_rows
from transformers import AutoModelForCausalLM

FEWER = 16
"""Ids of the student that the teacher has no row for."""


def convert(teacher: Path, out: Path) -> Path:
    """The teacher as a Megatron checkpoint."""
    command = ["-m", "opd_async.learner.convert", "hf-to-megatron", "--hf", str(teacher), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, timeout=patience(120))
    return out


def test_the_learner_holds_the_teacher(inputs: Path, tmp_path: Path) -> None:
    """Sequences are spread over two ranks, half of the responses are given by a data set, the teacher has not all ids
    of the student, and it judges evaluations."""
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
    values["data"]["held_out"] = {"path": values["data"]["train"]["path"]}
    values["evaluation"] = {"judge": "teacher", "teacher_topk": VOCAB, "prompts": 3, "every_steps": 2}
    values["evaluation"]["during_prompts"] = 2
    values["telemetry"] = {"samples_per_step": 3}
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
    check_evaluations(folder, inputs / "student", teacher)


def check_evaluations(folder: Path, student: Path, teacher: Path) -> None:
    """Both divergences before training are those of transformers, over whole vocabularies; later ones are there."""
    found = [row for row in all_rows(folder / "metrics.jsonl") if row.get("evaluation") == "student"]
    assert [row["step"] for row in found] == [0, 2, 4]
    assert all(row["reverse_kl"] > 0.01 and row["forward_kl"] > 0.01 and row["unjudged"] == 0 for row in found)
    texts = [row for row in all_rows(folder / "samples.jsonl") if row.get("evaluation") and row["step"] == 0]
    assert len(texts) == 3
    p, q = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in (student, teacher))
    reverse, forward = [], []
    for text in texts:
        own, response = text["prompt"].split(), text["response"].split()
        tables = []
        for model, before in ((p, own), (q, [*["t9", "t8", "t7", "t6", "t5"], *own])):
            ids = torch.tensor([[int(word[1:]) for word in [*before, *response]]])
            with torch.no_grad():
                tables.append(model(ids).logits[0, len(before) - 1 : -1, : VOCAB - FEWER].double().log_softmax(-1))
        log_p, log_q = tables
        told = log_q.gather(1, ids[0, len(before) :, None])[:, 0]
        assert torch.tensor(text["teacher_logprobs"]).sub(told).abs().max() < 2e-3
        reverse.append((log_p.exp() * (log_p - log_q)).sum(1))
        forward.append((log_q.exp() * (log_q - log_p)).sum(1))
    for name, values in (("reverse_kl", reverse), ("forward_kl", forward)):
        assert found[0][name] == pytest.approx(float(torch.cat(values).mean()), abs=1e-3)
