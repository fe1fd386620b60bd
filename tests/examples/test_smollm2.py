"""The example with a real pair: what is made of a model and of subjects; the models themselves are `make smollm2`'s."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opd_async.config.topology import Topology

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"


def script(name: str) -> ModuleType:
    """A script of the example as a module."""
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_student_is_its_teacher_without_some_layers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    teacher = LlamaForCausalLM(config)
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    script("make_pair").make_student(teacher, tmp_path / "teacher", tmp_path / "student", {1, 3})
    student = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 3
    for new, old in enumerate((0, 2, 4)):
        name = "self_attn.q_proj.weight"
        torch.testing.assert_close(
            student.state_dict()[f"model.layers.{new}.{name}"], weights[f"model.layers.{old}.{name}"]
        )
    assert (tmp_path / "student" / "tokenizer.json").exists()


def test_held_out_instructions_are_about_other_subjects(tmp_path: Path) -> None:
    made = [sys.executable, str(EXAMPLE / "make_prompts.py"), "--out", str(tmp_path)]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    first = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("train", "held_out")}
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    assert first == {name: (tmp_path / f"{name}.jsonl").read_text() for name in first}
    subjects = script("make_prompts").SUBJECTS
    assert len(set(subjects)) == len(subjects)
    texts = {
        name: {json.loads(line)["prompt"][0]["content"] for line in text.splitlines()} for name, text in first.items()
    }
    assert {name: len(found) for name, found in texts.items()} == {"train": 672, "held_out": 96}
    assert not texts["train"] & texts["held_out"]


def test_the_topology_leaves_every_size_open() -> None:
    topology = Topology.load(EXAMPLE / "smollm2.yaml")
    assert topology.evaluation.judge == "teacher"
    assert str(topology.models.student.path) == "examples/smollm2/models/student"
