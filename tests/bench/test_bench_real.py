"""The comparison on a real pair, on small models: the distance by hand, what a side costs, and the table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from deadlines import patience

from opd_async.bench.peers import sides
from opd_async.bench.peers.__main__ import OWN, TRL, Setup
from opd_async.bench.peers.curves import Tick
from opd_async.bench.peers.usage import Usage, cpu_between, peak_memory, watched
from opd_async.bench.real import __main__ as real
from opd_async.bench.real import distance
from opd_async.bench.real.distance import Distance
from opd_async.config.topology_file import load_topology

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples/addition/models"
SMOLLM2 = ROOT / "examples/smollm2/smollm2.yaml"
BURN = "import time\nwhile time.process_time() < 0.5: pass"


def test_the_distance_is_the_mean_over_all_tokens_and_zero_to_itself() -> None:
    student, teacher = distance.load(MODELS / "student"), distance.load(MODELS / "teacher")
    prompts = [np.array(ids, np.int32) for ids in ([3, 4, 5, 13], [3, 4, 13], [7, 13])]
    found = distance.measure(student, teacher, prompts, (1,), 6)
    assert distance.measure(student, student, prompts, (1,), 6).reverse_kl == pytest.approx(0.0, abs=1e-6)
    responses = _drawn(student, prompts)
    sums = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            ids, total = torch.tensor([[*prompt.tolist(), *response]]), 0.0
            for at in range(len(prompt) - 1, ids.shape[1] - 1):  # each position by itself
                p, q = (model(ids[:, : at + 1]).logits[0, -1].double().softmax(-1) for model in (student, teacher))
                total += float((p * (p.log() - q.log())).sum())
            sums.append(total)
    lengths = [len(one) for one in responses]
    assert found.reverse_kl == pytest.approx(sum(sums) / sum(lengths), rel=1e-4)
    assert found.length == pytest.approx(np.mean(lengths))
    assert found.ended == pytest.approx(np.mean([one[-1] == 1 for one in responses]))
    left = [one - found.reverse_kl * length for one, length in zip(sums, lengths, strict=True)]
    assert found.error == pytest.approx(np.std(left, ddof=1) * 3**0.5 / sum(lengths), rel=1e-3)


def _drawn(student: object, prompts: list[np.ndarray]) -> list[list[int]]:
    torch.manual_seed(0)
    return distance._sampled(student, prompts, (1,), 6)


def test_a_response_goes_to_its_first_end() -> None:
    assert distance._to_its_end([5, 1, 0, 0], (1, 2)) == [5, 1]
    assert distance._to_its_end([5, 6], (1, 2)) == [5, 6]


def test_what_a_side_costs_has_its_children_and_those_that_have_ended() -> None:
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n{BURN}"
    process = subprocess.Popen([sys.executable, "-c", script + "\ntime.sleep(3)"])
    usage = watched(process, patience(60.0))
    assert process.returncode == 0
    assert usage[-1].cpu_s >= 0.95 and peak_memory(usage) > 1 << 20


def test_a_side_that_does_not_end_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        watched(process, 0.2)
    process.kill()
    process.wait()


def test_processor_time_between_samples() -> None:
    # the third has lost a process that nobody has waited for yet: time does not run back
    usage = [Usage(10.0, 0.0, 5), Usage(12.0, 4.0, 9), Usage(13.0, 3.0, 7), Usage(14.0, 8.0, 7)]
    assert cpu_between(usage, 11.0, 13.5) == pytest.approx(6.0 - 2.0)
    assert peak_memory(usage) == 9


def test_a_step_of_the_other_side_fills_the_budget_at_the_limit_of_length() -> None:
    assert real.batch_of(load_topology(SMOLLM2, [])) == 16
    assert real.batch_of(load_topology(SMOLLM2, ["rollout.sampling.max_response_tokens=4096"])) == 1


def test_both_sides_are_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sides, "run_own", lambda *words: told.append(words))
    monkeypatch.setattr(sides, "run_trl", lambda python, job: told.append(job))
    options = argparse.Namespace(steps=4, set=["rollout.sampling.max_response_tokens=32"], every_steps=2)
    options.topology, options.python = SMOLLM2, Path("python")
    real.train(Setup.read(OWN, "opd.topk=8"), 3, tmp_path / "own", options)
    real.train(Setup.read(TRL, "whole: beta=1.0"), 3, tmp_path / "trl", options)
    (_, overrides, folder, every), job = told
    wanted = ["seed=3", "schedule.steps=4", "rollout.sampling.max_response_tokens=32", "opd.topk=8"]
    assert (overrides, folder, every) == (wanted, tmp_path / "own", 2)
    assert (job.steps, job.seed, job.batch, job.max_response_tokens, job.beta) == (4, 3, 32, 32, 1.0)


def test_everything_but_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = [Usage(100.0, 2.0, 1 << 30), Usage(104.0, 10.0, 3 << 30)]
    ticks = [Tick(1, 1.0, 10.0, 101.0), Tick(2, 2.0, 20.0, 103.0)]  # a second between them did not count
    trained: list[Path] = []

    def train(setup: Setup, seed: int, folder: Path, options: object) -> sides.Outcome:
        trained.append(folder)
        return sides.Outcome(ticks, {2: tmp_path / "student"}, usage, 0.5)

    monkeypatch.setattr(real, "train", train)
    judged: list[Path] = []
    out = tmp_path / "figures.json"

    class Judge:
        def __init__(self, topology: object, prompts: int, most_tokens: int | None) -> None:
            assert (prompts, most_tokens) == (5, 48)

        def __call__(self, folder: Path) -> Distance:
            judged.append(folder)
            return Distance(0.5, 0.01 * len(judged), 7.0, 0.25)

    monkeypatch.setattr(real, "Judge", Judge)
    kept = tmp_path / "kept"
    command = ["--topology", str(SMOLLM2), "--own", "", "--prompts", "5", "--measured-tokens", "48"]
    command += ["--folder", str(kept), "--json", str(out)]
    real.main(command)
    assert judged[1:] == [tmp_path / "student"] and capsys.readouterr().out.count("| opd_async |") == 2
    real.main([*command, "--trl", "short: batch=4"])  # goes on: the first row has been measured
    assert len(judged) == 4 and len(set(trained)) == 2 and {folder.parent for folder in trained} == {kept}
    lines = capsys.readouterr().out.splitlines()
    # 10 and 16 tokens of processor time: from 100 s, where training began, to 103 s
    assert lines[3] == (
        "| opd_async | as given | 0 | 2 | 20 | 2 | 6 | 300.0 | 10.0 | 0.5000 ± 0.0200 | 7.0 | 25% | 3.00 GiB |"
    )
    assert len(lines) == 6 and lines[4].startswith("| TRL | short | 0 | 0 | 0 | 0 | 0 | - | - |")
    written = json.loads(out.read_text())["curves"]
    assert [(one["age"], one["points"][1]["cpu_s"]) for one in written] == [(0.5, 6.0)] * 2
    real.main([*command, "--seeds", "0", "1", "--steps", "8"])
    assert len(judged) == 7 and capsys.readouterr().out.splitlines()[-1] == (
        "| opd_async | as given | 2 | 0.50 | 20 | 300.0 | 7.0 | 0.5000 (0.5000 to 0.5000) |"
    )
