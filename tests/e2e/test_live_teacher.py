"""A run whose teacher is the student of the step, scored between what its own engines generate; no second model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Launch, check_trained, steps, topology, write_topology
from transformers import AutoModelForCausalLM

STEPS = 8
HINT = "t41 t42 t43"


def live(inputs: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A topology without a teacher of its own."""
    values = topology(inputs, tmp_path, schedule__steps=STEPS, **changes)
    del values["models"]["teacher"], values["engines"]["teacher"]
    values["data"]["teacher_prompt"] = f"{HINT} {{{{ text }}}}"
    values["opd"] = {"use_opd": True, "type": "self", "self": {"place": "engines", "weights": "live"}, "topk": 8}
    values["telemetry"] = {"samples_per_step": 8}
    return values


def chunks_of(folder: Path) -> list[tuple[dict[str, Any], int, int, int, int]]:
    """(sample, start, end, version, scored by) of every chunk that was recorded."""
    found = []
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample, start = json.loads(line), 0
        for end, version, _, _, scored in sample["chunks"]:
            found.append((sample, start, end, version, scored))
            start = end
    return found


@pytest.mark.parametrize("bound", [0, pytest.param(1, marks=pytest.mark.long)])
def test_scores_are_of_weights_as_new_as_their_tokens(inputs: Path, tmp_path: Path, bound: int) -> None:
    """Also where generation stands until a step has all of its scores (a bound of 0), and where the engine dies, or the
    actor that asks it."""
    values = live(inputs, tmp_path, schedule__max_staleness=bound)
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        folder = tmp_path / "run"
        for done, process in ((2, "opd_async.actors.engine.server"), (5, "opd_async.actors.teacher")):
            run.wait_for_steps(folder, done)
            run.find(process).kill()
        assert run.wait() == 0, run.text()
    check_trained(folder, bound, STEPS)
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == {"student-engine-0": 1, "teacher-0": 1}
    assert sorted(path.stem for path in (folder / "logs").glob("*engine*.log")) == ["student-engine-0"]
    assert sum(row["teacher_cached_tokens"] for row in steps(folder)) > 0
    assert "cannot be trusted" not in (folder / "logs" / "teacher-0.log").read_text()

    chunks = chunks_of(folder)
    assert all(version <= scored <= sample["step"] - 1 for sample, _, _, version, scored in chunks), chunks
    model, first, moved = AutoModelForCausalLM.from_pretrained(inputs / "student", dtype=torch.float32), 0, 0.0
    for sample, start, end, _, scored in chunks:
        before, response = f"{HINT} {sample['prompt']}".split(), sample["response"].split()
        ids = torch.tensor([[int(word[1:]) for word in [*before, *response]]])
        with torch.no_grad():
            table = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        at_first = table.gather(1, ids[0, len(before) :, None])[:, 0][start:end]
        scores = torch.tensor(sample["teacher_logprobs"][start:end])
        distance = float((scores - at_first).abs().max())
        if scored == 0:
            first += 1
            assert distance < 2e-3, "not the weights that the student began with"
        elif scored > 2:
            moved = max(moved, distance)
    assert first > 0 and moved > 2e-2, (first, moved)
