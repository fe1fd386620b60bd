"""A run whose teacher scores each response twice, behind two prompts: every row of the loss has both scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Launch, check_trained, steps, topology, write_topology
from transformers import AutoModelForCausalLM

STEPS = 5
LOSS = """
import os
import numpy
import torch
from opd_async import LossOutput, LossRows

FILE = os.path.join(os.path.dirname(__file__), "rows.bin")

def loss(rows: LossRows) -> LossOutput:
    columns = [rows.behaviour_R, rows.teacher_R, rows.contrast_R]
    with open(FILE, "ab") as stream:
        stream.write(torch.stack(columns, 1).float().numpy().tobytes())
    signal = rows.teacher_R - rows.contrast_R
    return LossOutput(-((rows.logprobs_R - rows.behaviour_R).exp() * signal).sum())
"""


@pytest.mark.parametrize("place", ["engines", pytest.param("learner", marks=pytest.mark.long)])
def test_every_row_has_both_scores_of_the_first_weights(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Long responses are cut, so that a part is scored behind both prompts and what was trained of it."""
    words = [[f"t{40 + (n + k) % 100}" for k in range(n % 7 + 2)] for n in range(40)]
    rows = [
        {"prompt": f"t{10 + n} t{20 + n} t{30 + n}", "hint": " ".join(one), "wrong": " ".join(reversed(one))}
        for n, one in enumerate(words)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "contrast_rows.py").write_text(LOSS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    values = topology(inputs, tmp_path, schedule__steps=STEPS, telemetry__samples_per_step=64)
    del values["models"]["teacher"]
    values["data"] = {
        "train": {"path": str(tmp_path / "prompts.jsonl")},
        "teacher_prompt": "{{ row.hint }} {{ text }}",
        "contrast_prompt": "{{ row.wrong }} {{ text }}",
    }
    values["opd"] = {
        "use_opd": True,
        "type": "self",
        "self": {"place": place},
        "loss": "reverse_kl",
        "function": "contrast_rows:loss",
    }
    values["engines"]["teacher"]["context_tokens"] = 260
    if place == "learner":
        del values["engines"]["teacher"]
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    trained = check_trained(folder, 1, STEPS)
    assert any(len(ranges) > 1 for ranges in trained.values()), "a response was cut"
    if place == "engines":
        assert sum(row["teacher_cached_tokens"] for row in steps(folder)) > 0

    found = np.frombuffer((tmp_path / "rows.bin").read_bytes(), np.float32).reshape(-1, 3)
    assert len(found) == sum(end - start for ranges in trained.values() for start, end, *_ in ranges)
    means = sum(row["learner_contrast"] * row["tokens"] for row in steps(folder))
    assert means == pytest.approx(float((found[:, 1] - found[:, 2]).sum()), abs=0.1)

    model = AutoModelForCausalLM.from_pretrained(inputs / "student", dtype=torch.float32)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) > 10
    for sample in samples:
        row, response = rows[sample["prompt_id"]], sample["response"].split()
        expected = [np.array(sample["student_logprobs"])]
        for hint in (row["hint"], row["wrong"]):
            before = f"{hint} {sample['prompt']}".split()
            ids = torch.tensor([[int(word[1:]) for word in [*before, *response]]])
            with torch.no_grad():
                table = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
            expected.append(table.gather(1, ids[0, len(before) :, None])[:, 0].numpy()[: len(expected[0])])
        for triple in np.stack(expected, 1):
            assert np.abs(found - triple).max(1).min() < 2e-3, (sample["prompt_id"], triple)
