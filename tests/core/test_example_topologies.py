"""The examples for GPUs pass `--dry-run` with nothing but the models' configurations: no weights, no GPU, no SGLang."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from small_runs import make_model, write_lines
from test_opd_options import make_checkpoint

from opd_async.checks.inputs import examine
from opd_async.checks.validation import validate, warnings
from opd_async.command import launch, parse_arguments
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.plan.plan import RoleKind
from opd_async.plan.resolve import make_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
QWEN3_32B = QWEN3_8B | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every path that the examples name, in a folder from which they are started."""
    make_model(tmp_path / "models/Qwen3-8B", **QWEN3_8B)
    make_model(tmp_path / "models/Qwen3-32B", **QWEN3_32B)
    sealed = make_checkpoint(tmp_path / "teacher-run", 20)
    (sealed / "learner").rename(tmp_path / "models/Qwen3-8B-megatron")
    (tmp_path / "data").mkdir()
    row = {"prompt": [{"role": "user", "content": "abc"}], "label": "34", "solution": "def"}
    make_model(tmp_path / "models/student-1.7b", **QWEN3_8B)
    make_model(tmp_path / "models/teacher-8b", **QWEN3_8B)
    for name in ("dapo-math-17k", "aime-2024", "prompts", "held_out"):
        write_lines(tmp_path / f"data/{name}.jsonl", row, row)
    metadata = tmp_path / "packages/sglang-0.5.23.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    python = tmp_path / ".venv-sglang/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/packages" exec "{sys.executable}" -S "$@"\n')
    os.chmod(python, 0o755)  # noqa: PTH101
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))  # the checks start Python of their own, in this folder
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name: str, *options: str) -> Topology:
    return load_topology(EXAMPLES / name, options)


@pytest.mark.parametrize("name", ["qwen3-8b-opd-sglang.yaml", "qwen3-8b-opd-megatron.yaml", "qwen3-8b-opsd.yaml"])
def test_a_dry_run_passes(inputs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    topology = read(name)
    assert validate(topology) == [] and warnings(topology) == []
    launch(parse_arguments(["--topology", str(EXAMPLES / name), "--dry-run"]))
    printed = capsys.readouterr().out
    assert "student-engine-3" in printed and "learner-0" in printed
    assert ("teacher-engine-0" in printed) is ("teacher-0" in printed) is ("sglang" in name)
    assert not (inputs / "runs").exists()


def test_a_dry_run_of_several_engines_passes(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topology = read("four-engines.yaml")
    assert validate(topology) == [] and warnings(topology) == []
    launch(parse_arguments(["--topology", str(EXAMPLES / "four-engines.yaml"), "--dry-run"]))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("student-engine-3", "teacher-engine-1", "rollout-1", "learner-0"))
    assert not (inputs / "runs").exists()


def test_both_have_the_hyperparameters_of_slimes_scripts(inputs: Path) -> None:
    for name in ("qwen3-8b-opd-sglang.yaml", "qwen3-8b-opd-megatron.yaml"):
        topology = read(name)
        schedule, rollout, optimizer = topology.schedule, topology.rollout, topology.learner.optimizer
        assert (schedule.steps, schedule.samples_per_step, rollout.group_size) == (300, 16 * 4, 4)
        assert (rollout.sampling.max_response_tokens, rollout.sampling.temperature) == (16384, 1.0)
        assert (optimizer.lr, optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (1e-6, 0.1, 0.9, 0.98)
        assert (optimizer.decay, optimizer.warmup_steps, optimizer.clip_grad) == ("constant", 0, 1.0)
        assert (topology.opd.kl_coef, topology.opd.clip_ratio, topology.opd.signal_clamp) == (1.0, 0.2, None)
        assert (topology.learner.tensor_parallel, topology.learner.ranks, topology.checkpoint.every_steps) == (2, 2, 20)
        evaluation = topology.evaluation
        assert (evaluation.samples_per_prompt, evaluation.max_response_tokens) == (16, 16384)
        assert topology.learner.loss_mean == "responses"


def test_self_distillation_has_slimes_hyperparameters(inputs: Path) -> None:
    topology, inputs_read = examine(EXAMPLES / "qwen3-8b-opsd.yaml", [], str)
    opd, sampling = topology.opd, topology.rollout.sampling
    assert (opd.type, opd.self.weights, opd.self.place, opd.loss) == ("self", "frozen", "learner", "jsd_full")
    assert (opd.jsd_beta, opd.divergence_clip, topology.learner.loss_mean) == (0.5, 0.05, "responses")
    assert (topology.learner.optimizer.lr, sampling.temperature) == (1e-6, 1.0)
    prompt = inputs_read.prompts.prompts[0]
    read = inputs_read.tokenizer.decode(prompt.teacher_ids.tolist())
    assert "abc" in read and "def" in read  # the tokenizer of the tests knows ten letters
    assert "def" not in inputs_read.tokenizer.decode(prompt.token_ids.tolist())


def test_slimes_options_turn_one_into_the_other(inputs: Path) -> None:
    plan = make_plan(read("qwen3-8b-opd-sglang.yaml", "opd.type=megatron", "opd.teacher_load=models/Qwen3-8B-megatron"))
    assert plan.of_kind(RoleKind.TEACHER_ENGINE) == plan.of_kind(RoleKind.TEACHER) == ()
    (problem,) = validate(read("qwen3-8b-opd-megatron.yaml", "opd.type=sglang", "opd.teacher_load=null"))
    assert problem.startswith("models.teacher: missing, but opd.type is sglang")
    config = json.loads((inputs / "models/Qwen3-8B/config.json").read_text())
    assert config["vocab_size"] == make_plan(read("qwen3-8b-opd-megatron.yaml")).vocab_size
