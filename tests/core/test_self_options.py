"""The student as its own teacher: slime's options and defaults, every wrong combination, and what is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import topology_data, write_lines, write_topology
from test_opd_options import make_checkpoint

from opd_async.checks.inputs import examine
from opd_async.checks.teacher import teacher_limits
from opd_async.checks.validation import validate, warnings
from opd_async.command import parse_arguments
from opd_async.config.learning import OpdSection, SelfSection
from opd_async.config.slime_flags import opd_overrides
from opd_async.config.topology import ONE_TEACHER, Topology
from opd_async.config.topology_file import load_topology
from opd_async.errors import InputError
from opd_async.forecast.advice import uncovered
from opd_async.forecast.sizes import Longest, fitted
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run.fingerprints import fingerprints

LIVE = {"place": "engines", "weights": "live"}
SELF = ("--use-opd", "--opd-type", "self", "--opsd-privileged-info-key", "solution")


def launched(root: Path, *options: str, **opd: Any) -> Topology:
    """What the launcher makes of options and a topology without a teacher, with these keys under `opd`."""
    data = topology_data(root)
    del data["models"]["teacher"]
    if opd.get("self") == LIVE:
        del data["engines"]["teacher"]
    write_lines(root / "train.jsonl", {"prompt": "abc", "solution": "de"}, {"prompt": "ab", "solution": "d"})
    path = write_topology(root, data | ({"opd": opd} if opd else {}))
    arguments = parse_arguments(["--topology", str(path), *options])
    return load_topology(path, [*arguments.set, *opd_overrides(arguments)])


def test_options_and_defaults_are_slimes(tmp_path: Path) -> None:
    topology = launched(tmp_path, *SELF)
    opd = topology.opd
    assert validate(topology) == [] and warnings(topology) == []
    assert (opd.loss, opd.jsd_beta, opd.divergence_clip) == ("jsd_full", 0.5, 0.05)
    assert (opd.self.weights, opd.self.place, topology.data.privileged_key) == ("frozen", "learner", "solution")
    for beta, loss, mixed in (("0", "forward_kl_full", 0.5), ("1", "reverse_kl_full", 0.5), ("0.25", "jsd_full", 0.25)):
        opd = launched(tmp_path, *SELF, "--opsd-beta", beta, "--opsd-jsd-clip", "0.2", loss="jsd_topk").opd
        assert (opd.loss, opd.jsd_beta, opd.divergence_clip) == (loss, mixed, 0.2)
    load = make_checkpoint(tmp_path / "first", 3)
    topology = launched(tmp_path, *SELF, "--opd-teacher-load", str(load))
    assert topology.opd.teacher_load == load and validate(topology) == []


@pytest.mark.parametrize(
    ("weights", "place", "problems"),
    [("frozen", "learner", 0), ("live", "learner", 1), ("ema", "learner", 1), ("live", "engines", 1)],
)
def test_a_teacher_whose_weights_move_is_no_judge(tmp_path: Path, weights: str, place: str, problems: int) -> None:
    own = {"weights": weights, "place": place}
    topology = launched(tmp_path, *SELF, "--set", "evaluation.judge=teacher", self=own)
    found = [line for line in validate(topology) if line.startswith("evaluation.judge")]
    words = f"evaluation.judge: teacher, but with opd.self.weights {weights} the teacher moves with the student"
    assert len(found) == problems and all(line.startswith(words) for line in found)


def test_what_is_written_wins_over_the_defaults_of_self(tmp_path: Path) -> None:
    assert launched(tmp_path, *SELF, divergence_clip=None).opd.divergence_clip is None
    opd = launched(tmp_path, *SELF, loss="reverse_kl").opd
    assert (opd.loss, opd.divergence_clip) == ("reverse_kl", None)  # a bound that would do nothing is not set
    engines = OpdSection(type="self", self={"place": "engines"})
    assert (engines.loss, engines.on_engines, engines.in_learner) == ("jsd_topk", True, False)
    assert OpdSection(type="self", self=SelfSection(place="engines")).loss == "jsd_topk"
    assert OpdSection().divergence_clip is None and OpdSection().loss == "reverse_kl"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--opd-type", "sglang", "--opsd-beta", "0.5"], "--opsd-beta: given, but --opd-type is sglang; remove it, or"),
        (["--opd-type", "megatron", "--opsd-jsd-clip", "1"], "--opsd-jsd-clip: given, but --opd-type is megatron"),
        ([*SELF, "--opsd-beta", "1.5"], "--opsd-beta: 1.5; write a number from 0"),
        ([*SELF, "--opsd-jsd-clip", "0"], "opd.divergence_clip: "),
    ],
)
def test_options_that_say_nothing_sensible_are_refused(tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        launched(tmp_path, *options)


WRONG: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (("--opd-type", "self"), {}, "data.privileged_key: missing, but opd.type is self"),
    ((*SELF, "--set", "models.teacher.path=x"), {}, "models.teacher: given, but opd.type is self and the teacher is"),
    ((*SELF, "--opd-teacher-load", "nowhere"), {}, "opd.teacher_load: nowhere: no such folder; give"),
    (SELF, {"self": {"weights": "ema", "place": "engines"}}, "opd.self.weights: ema, but no engine holds an average"),
    (
        (*SELF, "--set", "engines.teacher.threads=1"),
        {"self": LIVE},
        "engines.teacher: given, but live weights are scored",
    ),
    ((*SELF, "--set", "teacher.replicas=2"), {"self": LIVE}, "teacher.replicas: 2 actors for 1 student engines; write"),
    (
        (*SELF, "--set", "rollout.slots=8", "--set", "engines.student.max_running=8"),
        {"self": LIVE},
        "engines.student.max_running: 8, but the engines generate 8 responses (rollout.slots) and score as many",
    ),
    (SELF, {"self": LIVE, "teacher_offload": True}, "opd.teacher_offload: given, but live weights are the student's"),
    (
        SELF,
        {"self": {"place": "engines"}, "teacher_load": "x"},
        "opd.teacher_load: given, but opd.self.place is engines",
    ),
    (SELF, {"self": {"weights": "live"}, "teacher_offload": True}, "opd.teacher_offload: given, but live weights are"),
    (SELF, {"self": {"decay": 0.9}}, "opd.self.decay: 0.9, but the weights are frozen; write weights: ema"),
    (SELF, {"self": {"weights": "live"}, "plain_kl_every": 2}, "opd.plain_kl_every: 2, but it is for a teacher in the"),
    (SELF, {"self": {"place": "engines"}, "loss": "jsd_full"}, "opd.loss: jsd_full needs the teacher's whole distribu"),
    (SELF, {"loss": "jsd_topk"}, "opd.loss: jsd_topk is for a teacher behind an engine"),
    (
        ("--opd-type", "sglang", "--set", "models.teacher.path=student"),
        {"self": {"weights": "live"}},
        "opd.self: given, but opd.type is sglang; remove it, or write type: self",
    ),
]


@pytest.mark.parametrize(("options", "opd", "expected"), WRONG)
def test_wrong_combinations_say_what_to_do(
    tmp_path: Path, options: tuple[str, ...], opd: dict[str, Any], expected: str
) -> None:
    key = expected.partition(":")[0] + ":"
    found = [line for line in validate(launched(tmp_path, *options, **opd)) if line.startswith(key)]
    assert len(found) == 1 and found[0].startswith(expected), found


def roles(plan: Plan) -> set[RoleKind]:
    return {role.kind for role in plan.roles}


def test_what_is_started(tmp_path: Path) -> None:
    inside = make_plan(launched(tmp_path, *SELF))
    assert not roles(inside) & {RoleKind.TEACHER, RoleKind.TEACHER_ENGINE} and inside.teacher_urls == {}
    topology = launched(tmp_path, *SELF, self={"place": "engines"}, topk=8)
    assert validate(topology) == []
    plan = make_plan(topology)
    assert roles(plan) >= {RoleKind.TEACHER, RoleKind.TEACHER_ENGINE} and list(plan.teacher_urls) == [ONE_TEACHER]
    engine = plan.role(RoleKind.TEACHER_ENGINE, 0)
    assert str(topology.models.student.path) in engine.command
    assert plan.section(plan.teacher_engines[0]) == topology.engines.teacher


def test_live_weights_on_engines_start_none_of_their_own(tmp_path: Path) -> None:
    """The student's engines hold what the teacher reads too, have room for both, and are dealt to the teacher's actors
    as to the student's."""
    sizes = (f"engines.student.{key}=auto" for key in ("context_tokens", "kv_tokens", "max_running"))
    wanted = (*sizes, "engines.student.replicas=3", "teacher.replicas=2")
    options = (part for one in wanted for part in ("--set", one))
    topology, _ = fitted(launched(tmp_path, *SELF, *options, self=LIVE, topk=8), Longest(train=10, teachers=20))
    assert validate(topology) == []
    plan = make_plan(topology)
    assert RoleKind.TEACHER_ENGINE not in roles(plan)
    actors = plan.of_kind(RoleKind.TEACHER)
    assert [plan.engines_of(actor) for actor in actors] == [plan.student_engines[::2], plan.student_engines[1::2]]
    assert all(plan.section(url) == topology.engines.student for url in plan.teacher_engines)
    student, response = topology.engines.student, topology.rollout.sampling.max_response_tokens
    assert student.context_tokens == 20 + response
    assert student.max_running * 3 >= 2 * topology.rollout.slots
    assert student.kv_tokens >= student.max_running * student.context_tokens
    assert set(teacher_limits(topology, response).values()) == {(20, "engines.student.context_tokens")}
    assert "of its own" in str(uncovered(topology))


def test_a_run_that_goes_on_needs_the_weights_that_teach(tmp_path: Path) -> None:
    """Those of the student's folder, where they do: else the checkpoint has all that is needed."""

    launched(tmp_path, type="self")
    keys = ["data.privileged_key=solution"]
    runs = [
        examine(tmp_path / "topology.yaml", [*keys, f"opd.self.weights={weights}"], str)
        for weights in ("frozen", "live", "ema")
    ]

    def digests() -> list[str]:
        return [fingerprints(run, one.prompts, {}, one.completions)["models.student"] for run, one in runs]

    before = digests()
    with (tmp_path / "student/model.safetensors").open("ab") as stream:
        stream.write(b"0")
    after = digests()
    assert before[1:] == after[1:] and before[0] != after[0]
