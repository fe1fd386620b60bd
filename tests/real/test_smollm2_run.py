"""`make smollm2` in short, on the pair that `examples/smollm2/make_pair.py` has made: three small steps, looked at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, Launch, check_trained, steps
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_async.data.tokenizer import Tokenizer
from opd_async.telemetry.samples import read_samples

EXAMPLE = ROOT / "examples/smollm2"
STEPS, PROMPTS, LONGEST = 3, 8, 32
NEARER = 0.97
"""What is left of the distance to the teacher after three steps, at most."""

pytestmark = pytest.mark.timeout(900)


def test_a_real_student_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    assert (EXAMPLE / "models/student").is_dir(), "make test-smollm2 makes the pair"
    changes = {
        "run_dir": tmp_path,
        "schedule.steps": STEPS,
        "schedule.tokens_per_step": 384,
        "rollout.sampling.max_response_tokens": LONGEST,
        "learner.optimizer.warmup_steps": 0,
        "learner.optimizer.decay": "constant",
        "evaluation.prompts": PROMPTS,
        "evaluation.every_steps": "null",
        "telemetry.samples_per_step": PROMPTS,
        "checkpoint.every_steps": STEPS,
    }
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    file = tmp_path / "smollm2.yaml"
    file.write_text((EXAMPLE / "smollm2.yaml").read_text())
    with Launch(file, *options) as run:
        assert run.wait(600.0) == 0, run.text()
    folder = tmp_path / "smollm2"
    check_trained(folder, 1, STEPS)
    first = steps(folder)[0]
    assert first["staleness_counts"][0] == first["tokens"] and first["learner_ratio_std"] < 1e-3, (
        "engine and learner agree on the weights that both began with"
    )
    report = json.loads((folder / "report.json").read_text())
    for found in (report["student_before"], report["student_after"]):
        assert found["prompts"] == PROMPTS and found["unjudged"] == 0 and 0.0 < found["reverse_kl"] < 3.0
    rows = [row for _, row in read_samples(folder / "samples.jsonl")]
    before = [row for row in rows if row.get("evaluation") == "student" and row["step"] == 0]
    assert len(before) == PROMPTS and (folder / "samples.html").stat().st_size > 10_000
    for row in before:
        assert row["prompt"].startswith("<|im_start|>system") and row["prompt"].endswith("<|im_start|>assistant\n")
        assert len(row["ends"]) == len(row["teacher_logprobs"]) == row["response_tokens"] <= LONGEST
    check_nearer(folder / "export", before)


def check_nearer(export: Path, rows: list[dict[str, Any]]) -> None:
    """The exact KL to the teacher on the same text, of the student as it was and as the run has left it."""
    tokenizer = Tokenizer(EXAMPLE / "models/student")
    prompts, whole = (
        tokenizer.encode_batch([row["prompt"] + more(row) for row in rows], add_special_tokens=False)
        for more in (lambda row: "", lambda row: row["response"])
    )
    texts = [(len(prompt), torch.tensor([ids])) for prompt, ids in zip(prompts, whole, strict=True)]
    teacher = tables(EXAMPLE / "models/teacher", texts)
    was, became = (divergence(tables(folder, texts), teacher) for folder in (EXAMPLE / "models/student", export))
    assert math.isfinite(became) and became < NEARER * was, (was, became)


@torch.no_grad()
def tables(folder: Path, texts: list[tuple[int, Tensor]]) -> list[Tensor]:
    """Log-probabilities float32[R, V] behind each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(ids_1T).logits[0, prompt - 1 : -1].log_softmax(-1) for prompt, ids_1T in texts]


def divergence(student: list[Tensor], teacher: list[Tensor]) -> float:
    """KL(student || teacher), nats a token."""
    each = [(p_RV.exp() * (p_RV - q_RV)).sum(-1) for p_RV, q_RV in zip(student, teacher, strict=True)]
    return float(torch.cat(each).mean())
