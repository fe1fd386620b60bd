"""Several teachers in one topology: which processes they become, whose a prompt is, and what cannot run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_actors import OneActor
from small_runs import make_model, topology_data, write_lines, write_topology

from opd_async.checks.inputs import read_inputs
from opd_async.checks.validation import validate
from opd_async.config.evaluating import evaluation_sets
from opd_async.config.topology import EvaluationSection, PromptsSection, Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.prompts import Prompt
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import describe_plan, make_plan
from opd_async.run.evaluator import Evaluator
from opd_async.transport.messages import EvalDone, Lease, LeaseKind

EXTERNAL = {"kind": "external", "replicas": 2, "urls": ["http://127.0.0.1:7/", "http://127.0.0.1:8"]}


def topology(root: Path, *overrides: str, **sections: Any) -> Topology:
    """`math` on two engines of its own, `code` on two that run elsewhere, `chat` with default engines."""
    data = topology_data(root)
    del data["models"]["teacher"], data["engines"]["teacher"]
    data["models"]["teachers"] = {name: {"path": str(make_model(root / name))} for name in ("math", "code", "chat")}
    small = {"context_tokens": 64, "kv_tokens": 1024}
    data["engines"]["teachers"] = {
        "math": small | {"replicas": 2, "dtype": "bfloat16", "threads": 3},
        "code": EXTERNAL | {"context_tokens": 64, "api_key": "k"},
        "chat": small,
    }
    data["data"]["teacher_key"] = "who"
    rows = [{"prompt": "abc", "metadata": {"who": name}} for name in ("math", "code", "chat", "math")]
    write_lines(root / "train.jsonl", *rows)
    return load_topology(write_topology(root, data | sections), overrides)


def test_each_teacher_has_its_engines_and_actors(tmp_path: Path) -> None:
    plan = make_plan(topology(tmp_path, "teacher.replicas=1"))
    engines = plan.of_kind(RoleKind.TEACHER_ENGINE)
    assert [(role.name, role.teacher) for role in engines] == [
        ("teacher-engine-0", "math"),
        ("teacher-engine-1", "math"),
        ("teacher-engine-2", "chat"),
    ]
    for role in engines:
        words = dict(zip(role.command, role.command[1:], strict=False))
        assert Path(words["--model-path"]).name == role.teacher
        assert words["--dtype"] == ("bfloat16" if role.teacher == "math" else "float32")
    ports = [role.ports["http"] for role in engines]
    assert plan.teacher_urls == {
        "math": (f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"),
        "code": ("http://127.0.0.1:7", "http://127.0.0.1:8"),
        "chat": (f"http://127.0.0.1:{ports[2]}",),
    }
    actors = plan.of_kind(RoleKind.TEACHER)
    assert [role.teacher for role in actors] == ["math", "code", "chat"]
    assert [plan.engines_of(role) for role in actors] == list(plan.teacher_urls.values())
    assert plan.section("http://127.0.0.1:8").api_key == "k" and plan.section(plan.teacher_engines[0]).threads == 3
    assert plan.section(plan.student_engines[0]) == plan.topology.engines.student
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_actors_of_a_teacher_share_its_engines(tmp_path: Path) -> None:
    values = {name: {"replicas": 2, "context_tokens": 64, "kv_tokens": 1024} for name in ("math", "chat")}
    replaced = {"student": {"context_tokens": 64, "kv_tokens": 1024}, "teachers": values | {"code": EXTERNAL}}
    plan = make_plan(topology(tmp_path, "teacher.replicas=2", engines=replaced))
    actors = plan.of_kind(RoleKind.TEACHER)
    assert [role.teacher for role in actors] == ["math", "math", "code", "code", "chat", "chat"]
    urls = [url for role in actors for url in plan.engines_of(role)]
    assert urls == list(plan.teacher_engines) and len(urls) == 6


def test_the_table_names_the_teachers(tmp_path: Path) -> None:
    text = describe_plan(make_plan(topology(tmp_path)))
    for words in ("teacher-engine-2 (chat)", "teacher-0 (math)", "code-engine-1", "http://127.0.0.1:8"):
        assert words in text


def test_a_valid_one(tmp_path: Path) -> None:
    valid = topology(tmp_path)
    assert validate(valid) == []
    assert [prompt.teacher for prompt in read_inputs(valid).prompts.prompts] == ["math", "code", "chat", "math"]


def test_prompts_of_nobody_are_named_by_line(tmp_path: Path) -> None:
    chosen = topology(tmp_path)
    rows: list[Any] = [{"prompt": "a", "metadata": {"who": who}} for who in ("math", "poet", 3)]
    write_lines(tmp_path / "train.jsonl", *rows, {"prompt": "a"})
    with pytest.raises(InputError) as caught:
        read_inputs(chosen)
    text = str(caught.value)
    for line, there in ((2, "'poet'"), (3, "3"), (4, "missing")):
        assert f"train.jsonl:{line}: the teacher, 'who' of its metadata, is {there}; write math or code or chat" in text


def test_one_teacher_scores_everything(tmp_path: Path) -> None:
    simple = load_topology(write_topology(tmp_path, topology_data(tmp_path)), [])
    assert {prompt.teacher for prompt in read_inputs(simple).prompts.prompts} == {"teacher"}
    assert [role.teacher for role in make_plan(simple).of_kind(RoleKind.TEACHER)] == ["teacher"]
    nobody = load_topology(write_topology(tmp_path, topology_data(tmp_path)), ["opd.use_opd=false"])
    assert {prompt.teacher for prompt in read_inputs(nobody).prompts.prompts} == {""}


WRONG = [
    (["data.teacher_key=null"], "data.teacher_key: missing, but there are 3 teachers"),
    (["models.teacher.path=x"], "models.teachers: given beside models.teacher"),
    (["engines.teacher.threads=2"], "engines.teacher: the engines of models.teacher, which is not there"),
    (["engines.teachers.poet.threads=2"], "engines.teachers.poet: no such teacher; write models.teachers.poet"),
    (["models.teachers.code.path=nowhere"], "models.teachers.code.path: no folder nowhere"),
    (
        ["engines.teachers.math.context_tokens=32"],
        "engines.teachers.math.context_tokens: 32 is less than engines.student.context_tokens",
    ),
    (
        ["engines.teachers.math={kind: external, context_tokens: 64, urls: ['http://127.0.0.1:8/']}"],
        "engines.teachers.code.urls: http://127.0.0.1:8 is another teacher's engine too",
    ),
    (["teacher.replicas=2"], "teacher.replicas: 2 actors for 1 teachers.chat engines"),
    (["engines.teachers.math.devices=[cuda:0]"], "engines.teachers.math.devices: cuda:0 is given to teachers.math"),
    (["opd.type=megatron", "opd.teacher_load=x"], "models.teachers: the learner holds one teacher"),
]


@pytest.mark.parametrize(("overrides", "text"), WRONG, ids=[text.partition(";")[0] for _, text in WRONG])
def test_what_cannot_run(overrides: list[str], text: str, tmp_path: Path) -> None:
    found = validate(topology(tmp_path, *overrides))
    assert any(text in problem for problem in found), found


def test_a_key_without_several_teachers(tmp_path: Path) -> None:
    simple = load_topology(write_topology(tmp_path, topology_data(tmp_path)), ["data.teacher_key=who"])
    assert [problem.partition(";")[0] for problem in validate(simple)] == [
        "data.teacher_key: given, but there is one teacher"
    ]


def test_another_vocabulary_is_named(tmp_path: Path) -> None:
    chosen = topology(tmp_path)
    make_model(tmp_path / "code", vocab_size=31)  # one row less, and none of a token
    make_model(tmp_path / "chat", words=["<pad>", "<bos>", "<eos>", *"jihgfedcba", *"0123456789"])
    (line,) = validate(chosen)
    assert line.startswith("models.teachers.chat.path: tokens differ from the student's at 10 ids: 3 is 'a'")
    assert make_plan(chosen).vocab_size == 31


async def test_a_teacher_is_evaluated_on_its_own_prompts(tmp_path: Path) -> None:
    leases: list[Lease] = []

    def send(lease: Lease) -> None:
        leases.append(lease)
        evaluator.deliver(
            EvalDone(sample_id=lease.sample_id, finish="stop", weight_version=0, token_ids=np.array([4, 2], np.int32))
        )

    prompts = [Prompt(n, np.array([1, 3], np.int32), "b", {}, "math" if n % 3 else "code") for n in range(6)]
    tokenizer = Tokenizer(make_model(tmp_path / "model"))
    sets = evaluation_sets(EvaluationSection(), PromptsSection(path=Path("x.jsonl")), 32, 64)
    evaluator = Evaluator(sets, {"held_out": prompts}, tokenizer, 8, OneActor(send))
    found = await evaluator.evaluate(LeaseKind.EVAL_TEACHER, "held_out", 5, 0, 10.0, evaluator.slots(), "code")
    assert found.prompts == 2 and {(lease.prompt_id, lease.teacher) for lease in leases} == {(0, "code"), (3, "code")}
    assert evaluator.prompts_of("held_out", 5, "poet") == []
