"""Validation against models, files, devices and ports: all at once, with what to write."""

from __future__ import annotations

import json
import resource
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import WORDS, make_model, small_topology, topology_data, write_json, write_lines, write_topology

from opd_async.checks.inputs import read_inputs
from opd_async.checks.validation import validate, warnings
from opd_async.config.estimators import Estimator
from opd_async.config.losses import FULL_LOSSES, GIVEN_LOSSES, LOSSES, REFUSED
from opd_async.config.rewards import RewardKind
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.errors import InputError
from opd_async.forecast.sizes import fitted

GRPO = ("advantage.estimator=grpo", "reward.kind=exact_match", "schedule.train_on=samples", "rollout.group_size=2")


@pytest.mark.parametrize("hard", [1024, resource.RLIM_INFINITY])
def test_more_responses_than_open_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, hard))
    most = 1024 if hard == 1024 else 1 << 20
    kv = "engines.student.max_running=2000000"
    assert problems(tmp_path, f"rollout.slots={most - 256}", kv) == []
    assert problems(tmp_path, f"rollout.slots={most - 255}", kv) == [
        f"rollout.slots: {most - 255} responses at once need {most + 1} open files in one process, which may have "
        f"{most} here (ulimit -Hn); write at most {most - 256}, or have the limit raised"
    ]


def problems(root: Path, *overrides: str) -> list[str]:
    return validate(small_topology(root, *overrides))


def test_a_valid_topology_has_no_problems(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    assert validate(topology) == [] and warnings(topology) == []
    assert problems(tmp_path, "network.bind=localhost") == []


WRONG = {
    "rollout.sampling.temperature=0.7": "rollout.sampling.temperature: 0.7, but teacher scores are at temperature 1",
    "rollout.sampling.top_p=0.9": "rollout.sampling.top_p: 0.9, but the behaviour logprobs would not be those",
    "rollout.sampling.top_k=20": "rollout.sampling.top_k: 20, but the behaviour logprobs would not be those",
    "rollout.sampling.stop_token_ids=[99]": "rollout.sampling.stop_token_ids: [99] not in the vocabulary",
    "learner.tensor_parallel=3": "learner.tensor_parallel: 3 does not divide the student's 4 attention heads",
    "learner.pipeline_parallel=3": "learner.pipeline_parallel: 3 does not divide the student's 4 layers; write 1, 2",
    "learner.micro_batch_tokens=63": "learner.micro_batch_tokens: 63 cannot hold one sample of",
    "engines.teacher.kv_tokens=63": "engines.teacher.kv_tokens: 63 cannot hold one full sample",
    "engines.student.urls=['http://h:1']": "engines.student.urls: 1 given, but the run starts embedded engines itself",
    "rollout.slots=17": "rollout.slots: 17, but the student engines run 16 requests at once",
    "rollout.replicas=2": "rollout.replicas: 2 actors for 1 student engines; write at most 1",
    "teacher.replicas=3": "teacher.replicas: 3 actors for 1 teacher engines; write at most 1",
    "opd.loss=k3": "opd.loss: k3 is refused: as a loss, exp(d) - d - 1 of the student's own tokens has the expected",
    "evaluation.max_response_tokens=64": "evaluation.max_response_tokens: 64 leaves no room for a prompt in",
    "learner.loss_mean=responses": "learner.loss_mean: responses, but steps take parts of them",
    "evaluation.judge=reward": "evaluation.judge: reward, but there is none; write reward.kind, or answer",
    "reward.function=my:judge": "reward.function: only for kind python, this is none; remove it",
    "evaluation.answer_pattern='('": "evaluation.answer_pattern: '(' is not a regular expression",
    "network.bind=0.0.0.0": "network.bind: 0.0.0.0 is not an IPv4 loopback address",
    "data.train.path=nowhere.jsonl": "data.train.path: no file nowhere.jsonl",
    "data.held_out.path=prompts.csv": "data.held_out.path: no file prompts.csv; write the path of a .jsonl, ",
    "data.chat_template=nowhere.jinja": "data.chat_template: no file nowhere.jinja",
}


@settings(max_examples=40, deadline=None)
@given(chosen=st.sets(st.sampled_from(sorted(WRONG)), min_size=1))
def test_every_wrong_edit_is_reported(chosen: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "wrong"
    path = root / "topology.yaml"
    if not path.exists():
        root.mkdir()
        write_topology(root, topology_data(root))
    # Parallel sizes change the number of ranks; `cpu` stands for all of them.
    found = validate(load_topology(path, sorted(chosen)))
    assert len(found) == len(chosen)
    for override in chosen:
        assert any(line.startswith(WRONG[override]) for line in found), (override, found)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.answer_pattern=abc"], "evaluation.answer_pattern: 'abc' has no group"),
        (
            ["evaluation.judge=teacher", "evaluation.temperature=0.7"],
            "compares distributions at temperature 1; write 1",
        ),
        (["evaluation.judge=teacher", "opd.use_opd=false"], "evaluation.judge: teacher, but there is none to be asked"),
        (
            ["engines.student.context_tokens=129", "engines.teacher.context_tokens=129"],
            "max_position_embeddings 128; write at most 128",
        ),
        (
            ["engines.teacher.context_tokens=32"],
            "teacher.context_tokens: 32 is less than engines.student.context_tokens 64",
        ),
        (["rollout.sampling.max_response_tokens=64"], "leaves no room for a prompt"),
        (
            ["rollout.group_size=3", "schedule.train_on=samples"],
            "schedule.samples_per_step: 8 is not a multiple of rollout.group_size 3",
        ),
        (["rollout.group_size=9"], "rollout.slots: 8 cannot hold one group"),
        (["engines.student.kind=external"], "engines.student.urls: 0 given for 1 replicas; write one URL for each"),
        (
            ["engines.student={kind: external, replicas: 2, context_tokens: 64, urls: ['http://h:1', 'http://h:1/']}"],
            "the same URL twice",
        ),
        (["learner.load=nowhere"], "learner.load: nowhere: no such folder; give the folder of a Megatron checkpoint"),
        (
            ["engines.student.tensor_parallel=2"],
            "engines.student.tensor_parallel: 2, but the embedded engine runs on one device; write 1, or kind: sglang",
        ),
        (
            [
                "engines.teacher.kind=external",
                "engines.teacher.urls=['http://h:1']",
                "engines.teacher.tensor_parallel=2",
            ],
            "engines.teacher.tensor_parallel: 2, but the external engine says itself what it has; write 1",
        ),
        (["engines.teacher.router=http://h:1"], "engines.teacher.router: requests to a teacher are routed by their"),
        (
            ["engines.student={kind: external, urls: ['http://h:1/'], context_tokens: 64, router: 'http://h:1'}"],
            "engines.student.router: http://h:1 is one of the engines; write the router's own address",
        ),
        (["learner.weight_transport=tensor"], "learner.weight_transport: tensor, which the embedded engine has not"),
        (
            [
                *("learner.weight_transport=tensor", "engines.student.kind=external"),
                "engines.student.urls=['http://10.0.0.1:1']",
            ],
            "learner.weight_transport: tensor, but http://10.0.0.1:1 is another machine; write broadcast",
        ),
        (["learner.devices=['cuda:0', 'cuda:1']"], "learner.devices: 2 devices for 1 ranks"),
        (
            ["intake.replicas=3", "learner.data_parallel=4"],
            "intake.replicas: 3 does not divide learner.data_parallel 4, whose ranks they share out; write 1, 2 or 4",
        ),
        (
            ["engines.student.devices=[cpu, cpu, cpu]", "engines.student.replicas=2"],
            "engines.student.devices: 3 devices for 2 replicas",
        ),
    ],
)
def test_problems_by_themselves(tmp_path: Path, overrides: list[str], expected: str) -> None:
    found = problems(tmp_path, *overrides)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_losses_that_estimate_something_else_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    reason, instead = REFUSED[name]
    assert problems(tmp_path, f"opd.loss={name}") == [f"opd.loss: {name} is refused: {reason}; write {instead}"]
    assert any(loss in instead for loss in LOSSES)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["opd.mismatch_low=0.1"], ["opd.mismatch_low: 0.1, but opd.mismatch is none; remove it, or write"]),
        (["opd.mismatch=tis", "opd.mismatch_low=0.1", "opd.mismatch_high=3"], []),
        (["opd.mismatch=tis", "opd.mismatch_low=2"], ["opd.mismatch_low: 2 is not below opd.mismatch_high, 2 (tis);"]),
        (["opd.mismatch=icepop", "opd.mismatch_high=0.4"], ["opd.mismatch_low: 0.5 is not below opd.mismatch_high"]),
        (
            [*GRPO, "opd.mismatch=tis", "advantage.clip_high=0.3", "advantage.dual_clip=3"],
            [
                "advantage.clip_high: 0.3, but opd.mismatch tis takes the place of the clip; write null, or bounds",
                "advantage.dual_clip: 3, but opd.mismatch tis takes the place of the clip",
            ],
        ),
        ([*GRPO, "opd.mismatch=icepop", "advantage.clip_high=0.3"], []),
    ],
)
def test_bounds_of_the_ratio(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    found = problems(tmp_path, *overrides)
    assert [line.startswith(start) for line, start in zip(found, expected, strict=True)] == [True] * len(expected), (
        found
    )


def test_only_filled_steps_of_tokens_can_do_without_a_bound(tmp_path: Path) -> None:
    unbound, filled = "schedule.max_staleness=null", "schedule.rule=filled"
    assert problems(tmp_path, unbound, filled) == problems(tmp_path, unbound) == []
    (found,) = problems(tmp_path, unbound, "schedule.rule=deadline")
    assert found.startswith("schedule.max_staleness: null, but") and found.endswith("or rule: filled")
    (found,) = problems(tmp_path, unbound, "schedule.train_on=samples")
    assert found.endswith("write a number of steps, or train_on: tokens")


def test_filled_steps_know_no_whole_step(tmp_path: Path) -> None:
    filled = ("schedule.rule=filled", "schedule.train_on=samples")
    assert problems(tmp_path, "schedule.rule=filled") == problems(tmp_path, *filled) == []
    (found,) = problems(tmp_path, *filled, "learner.loss_mean=responses")
    assert found.startswith("schedule.rule: filled, but learner.loss_mean: responses")
    rewarded = (*filled, "rollout.group_size=2", "schedule.samples_per_step=4", "reward.kind=exact_match")
    for estimator in Estimator:
        found_of = [
            line for line in problems(tmp_path, *rewarded, f"advantage.estimator={estimator}") if "rule" in line
        ]
        assert len(found_of) == estimator.startswith("reinforce")
        assert all(line.startswith("schedule.rule: filled, but advantage.estimator reinforce") for line in found_of)


def test_losses_that_exist(tmp_path: Path) -> None:
    for name in LOSSES:
        found = problems(tmp_path, f"opd.loss={name}", "opd.topk=8", "schedule.train_on=samples")
        assert [line.split(" ")[1].rstrip(",") for line in found] == [name] * (name in FULL_LOSSES | GIVEN_LOSSES)
    (found,) = problems(tmp_path, "opd.loss=minillm_topk", "opd.topk=8")
    assert found.startswith("schedule.train_on: tokens, but minillm_topk weighs a token by what follows it")
    assert problems(tmp_path, "opd.loss=kl") == [f"opd.loss: unknown loss 'kl'; write one of {', '.join(LOSSES)}"]
    # without a loss on the top-k, the default of 64 is nothing to the vocabulary of 32
    (found,) = problems(tmp_path, "opd.loss=jsd_topk")
    assert found == "opd.topk: 64, but the vocabulary has 32 tokens, and some must be left outside; write at most 31"
    assert small_topology(tmp_path, "opd.loss=jsd_topk").opd.wire_topk == 64
    assert small_topology(tmp_path).opd.wire_topk == 0


def test_accelerators_are_given_out_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "engines.student.devices=['cuda:0']",
        "engines.student.replicas=2",
        "engines.teacher.devices=['cuda:1']",
        "learner.devices=['cuda:1']",
    )
    assert found == [
        "engines.student.devices: cuda:0 is given to student-engine-0, student-engine-1; write another device for all "
        "but one of them, or list it in shared_devices",
        "learner.devices: cuda:1 is given to teacher-engine-0, learner rank 0; write another device for all but one of "
        "them, or list it in shared_devices",
    ]
    assert problems(tmp_path, "engines.student.devices=['cuda:0']", "learner.devices=['cuda:1']") == []


def test_the_same_url_on_both_sides(tmp_path: Path) -> None:
    engine = "{kind: external, context_tokens: 64, urls: ['http://h:1']}"
    found = problems(tmp_path, f"engines.student={engine}", f"engines.teacher={engine}")
    assert found == ["engines.teacher.urls: http://h:1 is a student engine too; write the teacher's own"]


def test_kv_heads_must_divide_by_tensor_parallel(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, "learner.tensor_parallel=4")
    for kv_heads, found in (
        (4, []),
        (2, ["learner.tensor_parallel: 4 does not divide the student's 2 key-value heads"]),
    ):
        for side in ("student", "teacher"):
            make_model(tmp_path / side, num_attention_heads=8, num_key_value_heads=kv_heads)
        assert [line.split(";")[0] for line in validate(topology)] == found


@pytest.mark.parametrize(
    ("experts", "overrides", "expected"),
    [
        (0, ["learner.expert_parallel=2"], "2, but no model in the learner is a mixture of experts; write 1"),
        (6, ["learner.expert_parallel=4"], "4 does not divide the student's 6 experts; write 1, 2, 3 or 6"),
        (6, ["learner.expert_parallel=2"], "2 does not divide the 1 ranks of a pipeline stage, which"),
        (6, ["learner.expert_parallel=2", "learner.data_parallel=2"], None),
        (6, ["learner.expert_parallel=2", "learner.context_parallel=2"], None),
        (6, ["learner.expert_parallel=2", "learner.tensor_parallel=2"], None),
    ],
)
def test_experts_are_shared_out_evenly(
    tmp_path: Path, experts: int, overrides: list[str], expected: str | None
) -> None:
    topology = small_topology(tmp_path, *overrides)
    make_model(tmp_path / "student", num_experts=experts)
    found = [line for line in validate(topology) if line.startswith("learner.")]
    assert bool(found) is bool(expected)
    assert expected is None or found[0].startswith(f"learner.expert_parallel: {expected}")


def test_the_embedded_engine_takes_no_updates_of_experts(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    make_model(tmp_path / "teacher", num_experts=4)
    assert validate(topology) == []
    make_model(tmp_path / "student", num_experts=4)
    assert [line[:44] for line in validate(topology)] == ["engines.student.kind: the embedded engine ta"]


def test_missing_and_broken_model_files_are_named(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (student / name).unlink()
    write_json(teacher / "config.json", {"vocab_size": 32, "num_hidden_layers": True})
    (teacher / "tokenizer.json").write_text("{}")
    found = "\n".join(validate(topology))
    for name in ("no config.json", "no tokenizer.json", "no *.safetensors"):
        assert f"models.student.path: {student} has {name}" in found
    assert "no whole number for num_hidden_layers, num_attention_heads, max_position_embeddings" in found
    assert f"models.teacher.path: {teacher / 'tokenizer.json'}: not a tokenizer" in found
    shutil.rmtree(student)
    assert f"models.student.path: no folder {student}" in "\n".join(validate(topology))


def test_weights_that_are_cut_short_or_not_all_there(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    weights = tmp_path / "student" / "model.safetensors"
    whole = weights.read_bytes()
    for content, expected in (
        (whole[:-1], "is cut short: "),
        (whole[:4], "is cut short at 4 bytes"),
        (whole[:20], "is cut short at 20 bytes"),
        (b"\x02" + b"\0" * 7 + b"[]" + b"\0" * 9, "is not a safetensors file"),
    ):
        weights.write_bytes(content)
        (line,) = validate(topology)
        assert f"models.student.path: {weights} {expected}" in line
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    write_json(tmp_path / "student" / "model.safetensors.index.json", index)
    (line,) = validate(topology)
    assert "has no model-2.safetensors, which model.safetensors.index.json names" in line


def test_a_tokenizer_belongs_to_its_model(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    for side in ("student", "teacher"):
        make_model(tmp_path / side, vocab_size=16)
    (line,) = [line for line in validate(topology) if "config.json has vocab_size" in line]
    assert "tokenizer.json has ids up to 22, config.json has vocab_size 16" in line


def test_ports_in_use_name_the_role(tmp_path: Path) -> None:
    base = _free_base()
    assert problems(tmp_path, f"network.base_port={base}") == []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", base + 2))
        taken.listen()
        (line,) = problems(tmp_path, f"network.base_port={base}")
    assert line.startswith(f"network.base_port: port {base + 2}, which teacher-engine-0 wants for http, is in use")
    many = ["engines.student.replicas=300", "network.base_port=65000"]
    assert problems(tmp_path, *many) == ["network.base_port: 65000 and 613 ports pass 65535; write a smaller one"]


def _free_base(count: int = 20) -> int:
    """The first of `count` ports that nothing listens on."""
    for base in range(21000, 60000, 97):
        listeners = [socket.socket() for _ in range(count)]
        try:
            for offset, listener in enumerate(listeners):
                listener.bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        finally:
            for listener in listeners:
                listener.close()
        return base
    raise AssertionError("no free ports")


def test_warnings(tmp_path: Path) -> None:
    def of(*overrides: str) -> list[str]:
        topology: Topology = small_topology(tmp_path, *overrides)
        assert validate(topology) == []
        return [line.split(":")[0] for line in warnings(topology)]

    assert of("schedule.max_staleness=1", "opd.clip_ratio=null") == ["opd.clip_ratio"]
    assert of("schedule.max_staleness=0", "opd.clip_ratio=null") == []
    assert of("schedule.max_staleness=1") == []
    assert of("schedule.max_staleness=2") == ["schedule.max_staleness"]
    topk = ("opd.loss=forward_kl_topk", "opd.topk=8")
    assert of(*topk, "schedule.max_staleness=4", "opd.clip_ratio=null") == []
    assert of(*topk, "opd.signal_clamp=3") == ["opd.signal_clamp"]
    assert of("schedule.max_staleness=1", "opd.clip_ratio=null", "opd.mismatch=tis") == []
    assert of("schedule.max_staleness=1", "opd.clip_ratio=null", "opd.mismatch=icepop") == ["opd.clip_ratio"]
    assert of("evaluation.every_steps=2") == ["evaluation.every_steps"]
    assert of("learner.optimizer.warmup_steps=10") == ["learner.optimizer.warmup_steps"]
    assert of(*GRPO, "advantage.estimator=gspo") == ["advantage.clip_low"]
    assert of("reward.kind=exact_match") == ["reward.kind"]


def test_a_chat_template_that_does_not_parse_is_reported_before_the_start(tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{% for %}")
    (line,) = problems(tmp_path, f"data.chat_template={json.dumps(str(template))}")
    assert line.startswith(f"models.student.path: chat template of {template}, line 1:")


def test_the_quickstart_is_valid_but_for_the_data_that_is_made_first() -> None:
    topology, _ = fitted(load_topology(Path("examples/quickstart.yaml")))
    assert [line for line in validate(topology) if not line.startswith("data.")] == []
    assert warnings(topology) == []


def test_rewards_are_loaded_before_the_start(tmp_path: Path) -> None:
    for kind in ("math", "exact_match"):
        assert problems(tmp_path, f"reward.kind={kind}", "evaluation.judge=reward") == []
    (found,) = problems(tmp_path, "reward.kind=python")
    assert found.startswith("reward.function: missing; write module:function")
    (found,) = problems(tmp_path, "reward.kind=python", "reward.function=no_such_module:judge")
    assert found.startswith("reward.function: no_such_module:judge cannot be loaded (ModuleNotFoundError")
    (found,) = problems(tmp_path, "reward.kind=exact_match", "evaluation.answer_pattern=abc")
    assert found.startswith("evaluation.answer_pattern: 'abc' has no group")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["opd.use_opd=false"], "opd.use_opd: false, and advantage.estimator is none: there is nothing to learn from"),
        (["reward.kind=none"], "advantage.estimator: grpo needs rewards, and there are none; write reward.kind"),
        (
            ["schedule.train_on=tokens"],
            "schedule.train_on: tokens, but grpo weighs a token by the rewards of its whole",
        ),
        (["rollout.group_size=1"], "rollout.group_size: 1, but grpo compares the responses to one prompt with one"),
        (
            ["advantage.reference_kl_coef=0.1", "advantage.reference_load=nowhere"],
            "advantage.reference_load: nowhere: no such folder; give",
        ),
        (["advantage.gamma=0.9"], "advantage.gamma: 0.9, but grpo does not discount; write 1"),
        (["advantage.estimator=cispo", "advantage.dual_clip=3"], "advantage.dual_clip: cispo truncates the ratio on"),
        (["advantage.estimator=gspo", "opd.mismatch=tis"], "opd.mismatch: tis truncates a token's ratio, and gspo"),
        (
            ["advantage.estimator=reinforce_plus_plus", "schedule.train_on=tokens"],
            "schedule.train_on: tokens, but reinforce_plus_plus weighs a token by the reward of its response",
        ),
        (
            ["advantage.estimator=ppo", "schedule.train_on=tokens"],
            "schedule.train_on: tokens, but ppo weighs a token by what followed it until the reward",
        ),
        (["advantage.lam=0.9"], "advantage.lam: 0.9, but grpo has no critic; write 1, or estimator: ppo"),
        (["advantage.critic.lr=1e-3"], "advantage.critic: given, but grpo has no critic; remove it, or"),
        (
            ["advantage.estimator=ppo", "advantage.critic.load=nowhere"],
            "advantage.critic.load: nowhere: no such folder; give",
        ),
    ],
)
def test_estimators_get_what_they_need(tmp_path: Path, overrides: list[str], expected: str) -> None:
    grpo = () if overrides == ["opd.use_opd=false"] else GRPO
    (found,) = problems(tmp_path, *grpo, *overrides)
    assert found.startswith(expected)


@pytest.mark.parametrize("use_opd", [True, False])
@pytest.mark.parametrize("estimator", [name for name in Estimator if name is not Estimator.NONE])
def test_estimators_that_exist_with_and_without_a_teacher(tmp_path: Path, estimator: str, use_opd: bool) -> None:
    options = [*GRPO, f"advantage.estimator={estimator}", "advantage.clip_low=3e-4"]
    topology = small_topology(tmp_path, *options, *([] if use_opd else ["opd.use_opd=false"]))
    assert validate(topology) == [] and warnings(topology) == []


PPO = ("advantage.estimator=ppo", "reward.kind=exact_match", "schedule.train_on=samples", "opd.use_opd=false")


def test_a_critic_of_its_own_shape_fits_student_and_ranks(tmp_path: Path) -> None:
    options = ["advantage.gamma=0.99", "advantage.lam=0.95", "rollout.group_size=1"]
    assert problems(tmp_path, *PPO, *options) == []
    critic = make_model(tmp_path / "critic", num_hidden_layers=3)
    assert problems(tmp_path, *PPO, f"advantage.critic.path={critic}") == []
    found = problems(tmp_path, *PPO, f"advantage.critic.path={critic}", "learner.pipeline_parallel=2")
    assert any("learner.pipeline_parallel: 2 does not divide the critic's 3 layers" in line for line in found)
    make_model(tmp_path / "critic", vocab_size=40)
    assert problems(tmp_path, *PPO, f"advantage.critic.path={critic}") == []
    make_model(tmp_path / "critic", vocab_size=31)
    (line,) = problems(tmp_path, *PPO, f"advantage.critic.path={critic}")
    assert line.startswith("advantage.critic.path: vocab_size 31 in its config.json, but ids up to 31 are sampled")
    make_model(tmp_path / "critic", words=[*WORDS[:-1], "z"])
    (line,) = problems(tmp_path, *PPO, f"advantage.critic.path={critic}")
    assert line.startswith("advantage.critic.path: tokens differ from the student's at 1 ids: 22 is")
    (line,) = problems(tmp_path, *PPO, "advantage.critic.path=nowhere")
    assert line.startswith("advantage.critic.path: no folder nowhere")


def test_options_of_a_critic_that_do_nothing_are_said(tmp_path: Path) -> None:
    def said(*overrides: str) -> list[str]:
        return [line.split(":")[0] for line in warnings(small_topology(tmp_path, *PPO, *overrides))]

    assert said() == said("advantage.critic.value_clip=0.1", "advantage.critic.updates=2") == []
    assert said("advantage.critic.value_clip=0.1") == ["advantage.critic.value_clip"]
    assert said("advantage.critic.only_steps=1000") == ["advantage.critic.only_steps"]


def test_the_saved_topology_of_a_run_without_a_critic_is_valid(tmp_path: Path) -> None:
    saved = Topology.model_validate(small_topology(tmp_path, *GRPO).model_dump())
    assert "critic" in saved.advantage.model_fields_set and validate(saved) == warnings(saved) == []


def test_a_temperature_other_than_one_is_refused_without_a_teacher_too(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, *GRPO, "opd.use_opd=false", "rollout.sampling.temperature=0.7")
    assert found.startswith("rollout.sampling.temperature: 0.7, but the learner's logprobs are at temperature 1")


@pytest.mark.parametrize("kind", sorted(kind for kind in RewardKind if kind.facts.label))
def test_rules_that_compare_with_labels_need_labels(tmp_path: Path, kind: str) -> None:
    topology = small_topology(tmp_path, f"reward.kind={kind}")
    assert len(read_inputs(topology).prompts.prompts) == 2
    write_lines(tmp_path / "train.jsonl", {"prompt": "abc", "label": "1"}, {"prompt": "ab"})
    with pytest.raises(InputError, match=r"1 of 2 prompts have no label under 'label', which reward.kind .* compares"):
        read_inputs(topology)
    assert read_inputs(small_topology(tmp_path, "data.train.label_key=answer")).prompts.prompts[0].label == ""
    held_out = tmp_path / "held_out.jsonl"
    write_lines(held_out, {"prompt": "abc"})
    topology = small_topology(
        tmp_path, f"reward.kind={kind}", f"data.held_out.path={held_out}", "evaluation.judge=reward"
    )
    with pytest.raises(InputError, match=r"held_out.jsonl: 1 of 1 prompts have no label"):
        read_inputs(topology)
