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
from deadlines import patience
from learner_ranks import (
    BRIEF,
    LAYOUTS,
    SAVED_AT,
    STEPS,
    WITH_LOSSES,
    critics,
    data,
    layouts,
    losses,
    steps,
    with_average,
    with_critic,
    with_experts,
)
from megatron.core.parallel_state import RankGenerator
from safetensors.torch import load_file
from span_parity import LOSSES, expected
from tiny_learner import VOCAB, assert_close, learner_config, write_model

from opd_async.config.topology import LearnerSection
from opd_async.learner import resume
from opd_async.learner.config import ParallelConfig
from opd_async.learner.convert import hf_to_megatron, megatron_to_hf
from opd_async.learner.distributed.parallel import Place, start
from opd_async.learner.errors import LearnerError
from opd_async.learner.trainer import Trainer

HERE = Path(__file__).parent
KINDS = ("qwen3-tied", "qwen3-moe", *BRIEF)
PAIRS = [(kind, layout) for kind in KINDS for layout in layouts(kind)]
TIMEOUT_S = 240.0


class Jobs:
    """One torchrun for all layouts and models, when it is first asked for: starting ranks is what takes time."""

    def __init__(self, models: Path, results: Path) -> None:
        self.models, self.results = models, results
        self._done: dict[str, dict[str, Any]] = {}

    def of(self, layout: str) -> dict[str, Any]:
        """What the ranks have reported of each model."""
        if not self._done:
            self._run()
            for name in LAYOUTS:
                self._done[name] = json.loads((self.results / f"{name}.json").read_text(encoding="utf-8"))
        return self._done[layout]

    def _run(self) -> None:
        path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*command, str(HERE / "learner_ranks.py"), str(self.models), str(self.results)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=patience(TIMEOUT_S),
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def jobs(alone: Place, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The models, converted by one rank, and nothing run yet."""
    models, results = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("results")
    for kind in KINDS:
        write_model(models / kind, kind)
        if kind not in BRIEF:
            hf_to_megatron(models / kind, results / f"{kind}-alone-converted", ParallelConfig())
    # more ids than the student has: its head is split at other rows
    teacher = write_model(results / "teacher", "teacher", rows=VOCAB + 8)
    hf_to_megatron(teacher, results / "teacher-megatron", ParallelConfig())
    return Jobs(models, results)


class Reports(dict[str, Any]):
    """What is reported of a model, by layout: a layout is run when somebody asks for it."""

    def __init__(self, jobs: Jobs, kind: str) -> None:
        super().__init__()
        self._jobs, self._kind = jobs, kind

    def __missing__(self, layout: str) -> Any:
        return self._jobs.of(layout)[self._kind]


class Runs:
    """Per model: one rank's own run (after STEPS steps), and every report on the same model, `alone` among them."""

    def __init__(self, alone: Place, jobs: Jobs) -> None:
        self.jobs, self.models, self.results = jobs, jobs.models, jobs.results
        self._alone = alone
        self._known: dict[str, tuple[Trainer, dict[str, Any]]] = {}

    def of(self, kind: str) -> tuple[Trainer, dict[str, Any]]:
        if kind not in self._known:
            reports = Reports(self.jobs, kind)
            trainer = Trainer(learner_config(self.models / kind))
            own = {"logprobs": [tensor.tolist() for tensor in trainer.logprobs([data(0)[0]])]}
            reports["alone"] = own | {"steps": steps(trainer, self._alone, STEPS)}
            self._known[kind] = trainer, reports
        return self._known[kind]


@pytest.fixture(scope="module")
def runs(alone: Place, jobs: Jobs) -> Runs:
    return Runs(alone, jobs)


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_a_layout_reports_the_same_steps(runs: Runs, kind: str, layout: str) -> None:
    _, reports = runs.of(kind)
    assert reports[layout]["micro_batching"] < 1e-6
    assert reports[layout]["in_parts"] < 1e-6
    torch.testing.assert_close(
        torch.tensor(reports[layout]["logprobs"]), torch.tensor(reports["alone"]["logprobs"]), rtol=0.0, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor(reports[layout]["steps"]), torch.tensor(reports["alone"]["steps"]), rtol=0.0, atol=1e-5
    )


def test_a_teacher_with_experts_is_spread_as_the_student(alone: Place, runs: Runs) -> None:
    trainer, reports = runs.of("qwen3-moe")
    expected = torch.tensor(with_experts(trainer.config, alone, runs.results))
    for layout in layouts("qwen3-moe"):
        found = torch.tensor(reports[layout]["teacher with experts"])
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5, msg=lambda text, n=layout: f"{n}: {text}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BRIEF])
def test_a_critic_is_split_as_the_student_and_resumes_anywhere(alone: Place, runs: Runs, kind: str) -> None:
    trainer, reports = runs.of(kind)
    expected = torch.tensor(steps(with_critic(trainer.config), alone, STEPS))
    assert bool((expected[1:, -1] > 0.0).all())
    for layout in critics(kind):
        found = torch.tensor(reports[layout]["critic"])
        same = {"rtol": 0.0, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(found, expected, **same, msg=lambda text, n=layout: f"{n}: {text}")
        resumed = with_critic(trainer.config)
        resume.load(resumed, runs.results / f"{kind}-{layout}-critic")
        after = torch.tensor(steps(resumed, alone, STEPS))
        torch.testing.assert_close(after, expected[SAVED_AT:], **same, msg=layout)


def test_an_average_that_teaches_is_split_as_the_student_and_resumes_anywhere(alone: Place, runs: Runs) -> None:
    config = learner_config(runs.models / WITH_LOSSES)
    expected = torch.tensor(steps(with_average(config), alone, STEPS, other_prompts=True))
    for layout in layouts(WITH_LOSSES):
        found = torch.tensor(runs.jobs.of(layout)[WITH_LOSSES]["average"])
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5, msg=lambda text, n=layout: f"{n}: {text}")
        resumed = with_average(config)
        resume.load(resumed, runs.results / f"{WITH_LOSSES}-{layout}-average")
        after = torch.tensor(steps(resumed, alone, STEPS, other_prompts=True))
        torch.testing.assert_close(after, expected[SAVED_AT:], rtol=0.0, atol=1e-5, msg=layout)


def test_every_layout_computes_the_same_losses(alone: Place, runs: Runs) -> None:
    """Those on the top-k, and those of a teacher inside, which is split like the student."""
    expected = losses(learner_config(runs.models / WITH_LOSSES), alone, runs.results)
    assert len(expected) >= 9
    for layout in layouts(WITH_LOSSES):
        found = runs.jobs.of(layout)[WITH_LOSSES]["losses"]
        assert found.keys() == expected.keys()
        for name in expected:
            left, right, where = torch.tensor(found[name]), torch.tensor(expected[name]), f"{name}, {layout}"
            torch.testing.assert_close(left, right, rtol=0.0, atol=1e-5, msg=lambda text, w=where: f"{w}: {text}")
        assert max(runs.jobs.of(layout)[WITH_LOSSES]["furthest"].values()) < 1e-5


@pytest.mark.parametrize("layout", layouts(WITH_LOSSES))
def test_given_tokens_are_context_and_nobodys_label_in_every_layout(runs: Runs, layout: str) -> None:
    """Gradients of episodes, cut and whole, are those of plain autograd over their sampled positions; what stands
    behind the last of these changes no bit of them."""
    runs.jobs.of(layout)
    found = load_file(runs.results / f"{layout}-spans.safetensors")
    wanted = expected(runs.models / WITH_LOSSES, runs.results / "teacher")
    assert set(wanted) == set(LOSSES)
    for loss, gradient in wanted.items():
        assert max(float(one.abs().max()) for one in gradient.values()) > 1e-3

        def of(form: str, loss: str = loss) -> dict[str, torch.Tensor]:
            prefix = f"{loss}/{form}/"
            return {key.removeprefix(prefix): one for key, one in found.items() if key.startswith(prefix)}

        assert_close(of("cut"), gradient, 1e-5)
        assert_close(of("whole"), gradient, 1e-5)
        assert all(torch.equal(one, of("labels")[key]) for key, one in of("cut").items())


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_a_layout_exports_every_weight(runs: Runs, kind: str, layout: str) -> None:
    trainer, reports = runs.of(kind)
    assert reports[layout]["exact"]
    ours = load_file(runs.results / f"{trainer.config.model_path.name}-{layout}-hf" / "model.safetensors")
    theirs = dict(_weights(trainer))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize(("kind", "layout"), [pair for pair in PAIRS if pair[0] not in BRIEF])
def test_a_conversion_in_a_layout_is_read_by_every_other(runs: Runs, kind: str, tmp_path: Path, layout: str) -> None:
    trainer, reports = runs.of(kind)
    models, results = runs.models, runs.results
    assert reports[layout]["converted"]
    loaded = Trainer(trainer.config)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    resume.load_weights(loaded, results / f"{kind}-{layout}-converted")
    stored = load_file(models / kind / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in _weights(loaded))
    # the layout's own checkpoint of trained weights, converted by its ranks and by one
    megatron_to_hf(results / f"{kind}-{layout}", models / kind, tmp_path / "back", ParallelConfig())
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "back", results / f"{kind}-{layout}-back"))
    assert ours.keys() == theirs.keys() == stored.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["model.norm.weight"], stored["model.norm.weight"])


def _weights(trainer: Trainer) -> Any:
    from opd_async.learner.hf.io import hf_weights

    return hf_weights(trainer.model)


@pytest.mark.parametrize(("kind", "layout"), [pair for pair in PAIRS if pair[0] not in BRIEF])
def test_a_checkpoint_of_any_layout_resumes_in_any_other(runs: Runs, kind: str, alone: Place, layout: str) -> None:
    trainer, reports = runs.of(kind)
    expected = torch.tensor(reports["alone"]["steps"][SAVED_AT:])
    assert len(expected) >= 3
    for name, found in reports[layout].items():
        if name.startswith("from "):
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0.0, atol=1e-5, msg=name)
    # what the job saved, resumed by one rank
    resumed = Trainer(trainer.config)
    resume.load(resumed, runs.results / f"{trainer.config.model_path.name}-{layout}")
    torch.testing.assert_close(torch.tensor(steps(resumed, alone, STEPS)), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 3, 2), (2, 1, 2, 2), (1, 1, 4, 1)])
def test_the_intake_and_megatron_number_ranks_alike(sizes: tuple[int, int, int, int]) -> None:
    tensor, context, data, pipeline = sizes
    learner = LearnerSection(
        tensor_parallel=tensor, context_parallel=context, data_parallel=data, pipeline_parallel=pipeline
    )
    groups = RankGenerator(tensor, 1, data, pipeline, context, "tp-cp-ep-dp-pp").get_ranks("dp")
    assert sorted(rank for group in groups for rank in group) == list(range(learner.ranks))
    assert all(learner.data_rank(rank) == index for group in groups for index, rank in enumerate(group))


def test_experts_that_no_ranks_can_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LearnerError, match="expert_parallel 2 does not divide the 3 ranks of a pipeline stage"):
        start(LAYOUTS["expert"], seed=0)


def test_a_world_size_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LearnerError, match="3 learner ranks cannot hold tensor_parallel 2"):
        start(LAYOUTS["tensor"], seed=0)
