"""Two ranks, split by tensor, by pipeline and by data, do what one rank does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_ranks import BRIEF, LAYOUTS, SAVED_AT, STEPS, WITH_LOSSES, data, losses, steps
from safetensors.torch import load_file
from tiny_learner import learner_config, write_model

from learner import checkpoint
from learner.config import ParallelConfig
from learner.convert import hf_to_megatron, megatron_to_hf
from learner.errors import LearnerError
from learner.parallel import Place, start
from learner.trainer import Trainer

HERE = Path(__file__).parent
THOROUGH = ("qwen3-tied", "qwen3-moe")
KINDS = (*THOROUGH, *BRIEF)
TIMEOUT_S = 150.0


@pytest.fixture(scope="module")
def job(alone: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One torchrun for all layouts: starting ranks is what takes time. (folder of models, folder of results)"""
    models, results = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("results")
    for kind in KINDS:
        write_model(models / kind, kind)
        if kind not in BRIEF:
            hf_to_megatron(models / kind, results / f"{kind}-alone-converted", ParallelConfig())
    hf_to_megatron(write_model(results / "teacher", "teacher"), results / "teacher-megatron", ParallelConfig())
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "learner_ranks.py"), str(models), str(results)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return models, results


@pytest.fixture(scope="module", params=KINDS)
def runs(request: pytest.FixtureRequest, alone: Place, job: tuple[Path, Path]) -> tuple[Trainer, dict[str, Any]]:
    """One rank's own run (after STEPS steps), and every report on the same model, `alone` among them."""
    models, results = job
    kind = request.param
    everything = json.loads((results / "results.json").read_text(encoding="utf-8"))
    reports = {name: everything[f"{kind} {name}"] for name in LAYOUTS}
    trainer = Trainer(learner_config(models / kind))
    own = {"logprobs": [tensor.tolist() for tensor in trainer.logprobs([data(0)[0]])]}
    reports["alone"] = own | {"steps": steps(trainer, alone, STEPS)}
    return trainer, reports


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_reports_the_same_steps(runs: tuple[Trainer, dict[str, Any]], layout: str) -> None:
    _, reports = runs
    torch.testing.assert_close(
        torch.tensor(reports[layout]["logprobs"]), torch.tensor(reports["alone"]["logprobs"]), rtol=0.0, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor(reports[layout]["steps"]), torch.tensor(reports["alone"]["steps"]), rtol=0.0, atol=1e-5
    )


def test_every_layout_computes_the_same_losses(alone: Place, job: tuple[Path, Path]) -> None:
    """Those on the top-k, and those of a teacher inside, which is split like the student."""
    models, results = job
    everything = json.loads((results / "results.json").read_text(encoding="utf-8"))
    expected = losses(learner_config(models / WITH_LOSSES), alone, results)
    assert len(expected) >= 9
    for layout in LAYOUTS:
        found = everything[f"{WITH_LOSSES} {layout}"]["losses"]
        assert found.keys() == expected.keys()
        for name in expected:
            left, right, where = torch.tensor(found[name]), torch.tensor(expected[name]), f"{name}, {layout}"
            torch.testing.assert_close(left, right, rtol=0.0, atol=1e-5, msg=lambda text, w=where: f"{w}: {text}")
        assert max(everything[f"{WITH_LOSSES} {layout}"]["furthest"].values()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_exports_every_weight(
    runs: tuple[Trainer, dict[str, Any]], job: tuple[Path, Path], layout: str
) -> None:
    trainer, reports = runs
    assert reports[layout]["exact"]
    ours = load_file(job[1] / f"{trainer.config.model_path.name}-{layout}-hf" / "model.safetensors")
    theirs = dict(_weights(trainer))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("runs", THOROUGH, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversion_in_a_layout_is_read_by_every_other(
    runs: tuple[Trainer, dict[str, Any]], job: tuple[Path, Path], tmp_path: Path, layout: str
) -> None:
    trainer, reports = runs
    models, results = job
    kind = trainer.config.model_path.name
    assert reports[layout]["converted"]
    loaded = Trainer(trainer.config)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    checkpoint.load_weights(loaded, results / f"{kind}-{layout}-converted")
    stored = load_file(models / kind / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in _weights(loaded))
    # the layout's own checkpoint of trained weights, converted by its ranks and by one
    megatron_to_hf(results / f"{kind}-{layout}", models / kind, tmp_path / "back", ParallelConfig())
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "back", results / f"{kind}-{layout}-back"))
    assert ours.keys() == theirs.keys() == stored.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["model.norm.weight"], stored["model.norm.weight"])


def _weights(trainer: Trainer) -> Any:
    from learner.hf_io import hf_weights

    return hf_weights(trainer.model)


@pytest.mark.parametrize("runs", THOROUGH, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_any_layout_resumes_in_any_other(
    runs: tuple[Trainer, dict[str, Any]], job: tuple[Path, Path], alone: Place, layout: str
) -> None:
    trainer, reports = runs
    expected = torch.tensor(reports["alone"]["steps"][SAVED_AT:])
    assert len(expected) >= 3
    for name, found in reports[layout].items():
        if name.startswith("from "):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0.0, atol=1e-5, msg=name)
    # what the job saved, resumed by one rank
    resumed = Trainer(trainer.config)
    checkpoint.load(resumed, job[1] / f"{trainer.config.model_path.name}-{layout}")
    torch.testing.assert_close(torch.tensor(steps(resumed, alone, STEPS)), expected, rtol=0.0, atol=1e-5)


def test_a_world_size_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LearnerError, match="3 learner ranks cannot hold tensor_parallel 2"):
        start(LAYOUTS["tensor"], seed=0)
