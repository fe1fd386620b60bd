"""A run whose teacher is the student as it began, on engines, and reads what the student does not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from harness import Launch, check_trained, steps, topology, write_topology
from transformers import AutoModelForCausalLM

STEPS = 5


def test_every_token_is_scored_behind_the_teachers_prompt(inputs: Path, tmp_path: Path) -> None:
    """By the first weights, though the student learns; of every third row the teacher reads what the student reads."""
    hints = [" ".join(f"t{40 + (n + k) % 100}" for k in range(n % 7 + 1)) if n % 3 else None for n in range(40)]
    rows = [{"prompt": f"t{10 + n} t{20 + n} t{30 + n}", "hint": hint} for n, hint in enumerate(hints)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = topology(inputs, tmp_path, schedule__steps=STEPS)
    del values["models"]["teacher"]
    values["data"] = {
        "train": {"path": str(tmp_path / "prompts.jsonl")},
        "teacher_prompt": "{{ row.hint }} {{ text }}",
        "teacher_prompt_missing": "plain",
    }
    values["opd"] = {"use_opd": True, "type": "self", "self": {"place": "engines"}, "topk": 8}
    values["engines"]["teacher"]["context_tokens"] = 260
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    assert "14 of 40 prompts have no text for their teacher" in run.text()
    folder = tmp_path / "run"
    check_trained(folder, 1, STEPS)
    found = steps(folder)
    assert sum(row["teacher_cached_tokens"] for row in found) > 0
    assert all(0.0 < row["learner_frequent_signal_share"] <= 1.0 for row in found)
    assert all(0.0 <= row["learner_divergence_clipped_share"] < 1.0 for row in found)

    model = AutoModelForCausalLM.from_pretrained(inputs / "student", dtype=torch.float32)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    kinds = set()
    for sample in samples:
        hint = hints[sample["prompt_id"]]
        kinds.add((hint is not None, len(sample["chunks"]) > 1))
        before, response = f"{hint or ''} {sample['prompt']}".split(), sample["response"].split()
        ids = torch.tensor([[int(word[1:]) for word in [*before, *response]]])
        with torch.no_grad():
            table = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected = table.gather(1, ids[0, len(before) :, None])[:, 0][: len(sample["teacher_logprobs"])]
        torch.testing.assert_close(torch.tensor(sample["teacher_logprobs"]), expected, rtol=0.0, atol=2e-3)
    assert {known for known, _ in kinds} == {True, False} and (True, True) in kinds, kinds
