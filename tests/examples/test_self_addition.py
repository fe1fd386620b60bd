"""The self-distillation example: its data, what its teacher reads, and that its model is trained on just that."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from make_models import STUDENT, build_model, save
from task import Problem, is_correct
from tokenizer import EOS, build_tokenizer

from opd_async.checks.inputs import examine

FOLDER = Path(__file__).parents[2] / "examples" / "self_addition"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """The script, as a module of another name than that of the addition example's."""
    spec = importlib.util.spec_from_file_location("make_self_addition", FOLDER / "make_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_teacher_reads_what_the_model_was_trained_on(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "examples/self_addition/data"
    folder.mkdir(parents=True)
    problems = [Problem(347, 589), Problem(3, 20), Problem(999, 999)]
    save(build_model(STUDENT, 0), folder / "student")
    made.write_rows(folder / "train.jsonl", problems)
    made.write_rows(folder / "held_out.jsonl", problems[:1])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert all(is_correct(row["solution"], row["label"]) for row in rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))  # from where `opd.function` of contrast.yaml is imported
    topology, inputs = examine(FOLDER / "self_addition.yaml", [], str)
    assert (topology.opd.type, topology.opd.loss, topology.opd.divergence_clip) == ("self", "jsd_full", None)
    tokenizer = build_tokenizer()
    for problem, prompt in zip(problems, inputs.prompts.prompts, strict=True):
        assert prompt.token_ids.tolist() == tokenizer.encode(problem.prompt).ids
        assert prompt.teacher_ids is not None
        assert prompt.teacher_ids.tolist() == tokenizer.encode(made.shown(problem)).ids
        assert made.Informed(problem.a, problem.b).prompt == made.shown(problem)
        assert prompt.contrast_ids is None
    _, inputs = examine(FOLDER / "contrast.yaml", [], str)
    for problem, other, prompt in zip(problems, [*problems[1:], problems[0]], inputs.prompts.prompts, strict=True):
        read = (prompt.teacher_ids, prompt.contrast_ids)
        texts = (made.shown(problem), f"{other.answer}={problem.prompt}")
        assert [ids.tolist() for ids in read if ids is not None] == [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("hint", [False, True])
def test_only_the_answer_counts_in_the_loss(made: ModuleType, hint: bool) -> None:
    torch.manual_seed(0)
    model, tokenizer, problems = build_model(STUDENT, 0), build_tokenizer(), [Problem(1, 2), Problem(345, 678)]
    losses = []
    for problem in problems:
        prompt = made.shown(problem) if hint else problem.prompt
        ids = torch.tensor([tokenizer.encode(prompt + problem.answer + EOS).ids])
        table = model(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
        scores = table.gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-scores[len(tokenizer.encode(prompt).ids) - 1 :].mean())
    found = made.loss_of(model, tokenizer, problems, hint=hint)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=0.0, atol=1e-5)
