"""The shipped teacher and student: they load, share one tokenizer, and answer as the README says."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import make_models
import pytest
import sample
import torch
from evaluate import pass_at_1
from make_models import STUDENT, TEACHER, Recipe, build_model, example, save, train
from safetensors.torch import load_file
from task import Problem, held_out_problems
from tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, build_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_async.data.tokenizer import Tokenizer as OurTokenizer

MODELS = ["teacher", "student"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """These models are too small to share between threads."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_loads_as_written(addition: Path, name: str) -> None:
    path = addition / "models" / name
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == VOCAB_SIZE
    assert model.generation_config.eos_token_id == EOS_ID
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_config_serves_old_and_new_readers(addition: Path, name: str) -> None:
    config = json.loads((addition / "models" / name / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0


def test_both_models_ship_the_tokenizer_that_the_code_builds(addition: Path) -> None:
    built = json.loads(build_tokenizer().to_str())
    for name in MODELS:
        assert json.loads((addition / "models" / name / "tokenizer.json").read_text()) == built
    configs = [(addition / "models" / name / "tokenizer_config.json").read_bytes() for name in MODELS]
    assert configs[0] == configs[1]


def test_both_libraries_give_the_same_ids_and_text(addition: Path) -> None:
    path = addition / "models" / "student"
    hugging_face, bare = AutoTokenizer.from_pretrained(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    for problem in held_out_problems(20):
        for text in (problem.prompt, problem.prompt + problem.answer, problem.prompt + problem.answer + "<eos>"):
            ids = bare.encode(text).ids
            assert hugging_face(text)["input_ids"] == ids
            assert ids[0] == BOS_ID
            assert bare.decode(ids, skip_special_tokens=True) == text.removesuffix("<eos>")
            assert hugging_face.decode(ids, skip_special_tokens=True) == text.removesuffix("<eos>")
    assert bare.encode("347+589=").ids == [1, 6, 7, 10, 13, 8, 11, 12, 14]
    assert bare.encode("347+589=", add_special_tokens=False).ids == hugging_face.encode(
        "347+589=", add_special_tokens=False
    )


def test_foreign_text_becomes_unknown_tokens(addition: Path) -> None:
    bare = Tokenizer.from_file(str(addition / "models" / "teacher" / "tokenizer.json"))
    assert bare.encode("1 a\n").ids == [BOS_ID, 4, 17, 17, 17]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_both_forms_of_a_prompt_are_the_same_tokens(addition: Path, side: str) -> None:
    """Text, and chat messages: the second must not lack the token that the first begins with."""
    tokenizer = OurTokenizer(addition / "models" / side)
    assert tokenizer.encode_chat([{"role": "user", "content": "347+589="}]) == tokenizer.encode("347+589=")


def test_chat_template_leaves_a_user_message_bare(addition: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(addition / "models" / "student")
    turn = [{"role": "user", "content": "347+589="}]
    assert tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == "<bos>347+589="
    answered = [*turn, {"role": "assistant", "content": "x"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "<bos>347+589=x<eos>"


def greedy_share(path: Path, problems: list[Problem]) -> float:
    model = AutoModelForCausalLM.from_pretrained(path)
    return pass_at_1(model, Tokenizer.from_file(str(path / "tokenizer.json")), problems, greedy=True)


def test_teacher_adds_and_student_has_something_to_learn(addition: Path) -> None:
    problems = held_out_problems(100)
    teacher = greedy_share(addition / "models" / "teacher", problems)
    student = greedy_share(addition / "models" / "student", problems)
    assert teacher >= 0.97
    assert 0.4 <= student <= teacher - 0.1


def test_responses_of_the_teacher_are_written_for_supervised_training(addition: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "given" / "out.jsonl"
    problems = held_out_problems(6)
    prompts.write_text("".join(json.dumps(problem.row()) + "\n" for problem in problems))
    options = ["--prompts", str(prompts), "--count", "4", "--per-prompt", "3", "--out", str(out)]
    assert sample.main([str(addition / "models" / "teacher"), *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [problem.prompt for problem in problems[:4] for _ in range(3)]
    right = [
        row["completion"] == problem.answer
        for problem in problems[:4]
        for row in rows
        if row["prompt"] == problem.prompt
    ]
    assert sum(right) >= 10  # the teacher is right in 99 of 100
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_variants_of_the_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "student", "--hidden", "16", "--steps", "2", "--digits", "4", "--fresh", "--other-way", "0.5"]
    assert make_models.main(["--out", str(tmp_path), *options]) == 0
    assert "5,216 parameters" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    with pytest.raises(SystemExit):
        make_models.main(["--out", str(tmp_path), *options[:-1], "50"])
    assert "--other-way is a share, from 0 to 1; got 50" in capsys.readouterr().err


def test_a_teacher_may_write_in_two_ways() -> None:
    problem, ways = Problem(347, 589), random.Random(0)
    for share, low, high in ((0.0, 0, 0), (0.5, 150, 250), (1.0, 400, 400)):
        recipe = dataclasses.replace(TEACHER, other_way=share)
        texts = [example(problem, recipe, ways) for _ in range(400)]
        others = sum(text == f"{problem.prompt}{problem.other_answer}<eos>" for text in texts)
        assert low <= others <= high
        assert texts.count(f"{problem.prompt}{problem.answer}<eos>") == 400 - others


@pytest.mark.parametrize("recipe", [STUDENT, TEACHER], ids=lambda recipe: recipe.name)
def test_training_is_deterministic_and_round_trips(tmp_path: Path, recipe: Recipe) -> None:
    short = dataclasses.replace(recipe, steps=3)
    tokenizer, states = build_tokenizer(), []
    for _ in range(2):
        model = build_model(short, seed=5)
        train(model, tokenizer, short, seed=5)
        states.append(model.state_dict())
    save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, loaded[name])
