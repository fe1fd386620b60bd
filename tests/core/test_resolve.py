"""Plans: every process, its ports and its command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_runs import make_model, small_topology

from opd_async.errors import InputError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import describe_plan, make_plan, port_keys


def test_roles_come_in_start_order_with_their_ports(tmp_path: Path) -> None:
    plan = make_plan(small_topology(tmp_path, "engines.student.replicas=2", "rollout.replicas=2"))
    assert [role.name for role in plan.roles] == [
        *("teacher-engine-0", "student-engine-0", "student-engine-1", "intake-0", "teacher-0"),
        *("rollout-0", "rollout-1", "learner-0"),
    ]
    assert {role.kind: tuple(role.ports) for role in plan.roles} == {
        RoleKind.TEACHER_ENGINE: ("http", "metrics"),
        RoleKind.STUDENT_ENGINE: ("http", "metrics"),
        RoleKind.INTAKE: ("scored", "batches", "metrics"),
        RoleKind.TEACHER: ("chunks", "metrics"),
        RoleKind.ROLLOUT: ("metrics",),
        RoleKind.LEARNER: ("master", "weights", "metrics"),
    }
    ports = [port for role in plan.roles for port in role.ports.values()]
    ports += [plan.launcher_metrics_port, int(plan.control.rsplit(":", 1)[1])]
    assert len(set(ports)) == len(ports)
    intake, teacher = plan.role(RoleKind.INTAKE, 0), plan.role(RoleKind.TEACHER, 0)
    assert plan.scored[0] == f"tcp://127.0.0.1:{intake.ports['scored']}"
    assert plan.batches[0] == f"tcp://127.0.0.1:{intake.ports['batches']}"
    assert plan.chunks == (f"tcp://127.0.0.1:{teacher.ports['chunks']}",)
    assert plan.student_engines == tuple(
        f"http://127.0.0.1:{role.ports['http']}" for role in plan.of_kind(RoleKind.STUDENT_ENGINE)
    )
    assert plan.run_folder == tmp_path / "runs" / "small"


def test_several_intakes_share_the_ranks(tmp_path: Path) -> None:
    plan = make_plan(
        small_topology(tmp_path, "intake.replicas=2", "learner.data_parallel=4", "learner.tensor_parallel=2")
    )
    intakes = plan.of_kind(RoleKind.INTAKE)
    assert [role.name for role in intakes] == ["intake-0", "intake-1"]
    assert plan.intakes == 2
    assert plan.scored == tuple(f"tcp://127.0.0.1:{role.ports['scored']}" for role in intakes)
    assert plan.batches == tuple(f"tcp://127.0.0.1:{role.ports['batches']}" for role in intakes)
    plan_file = str(plan.run_folder / "plan.json")
    command = ("-m", "opd_async.actors.intake", "--plan", plan_file)
    assert [role.command[1:] for role in intakes] == [command, (*command, "--index", "1")]
    assert [plan.intake_of_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_explicit_ports_are_consecutive(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, "network.base_port=30000")
    plan = make_plan(topology)
    assert plan.control == "tcp://127.0.0.1:30000" and plan.launcher_metrics_port == 30001
    ports = [port for role in plan.roles for port in role.ports.values()]
    assert ports == list(range(30002, 30000 + len(port_keys(topology))))
    assert make_plan(topology) == plan


def test_commands(tmp_path: Path) -> None:
    overrides = ["learner.data_parallel=2", "engines.student.admin_api_key=s3cret", "seed=7", "network.base_port=30000"]
    plan = make_plan(small_topology(tmp_path, "engines.student.replicas=2", *overrides))
    engine = plan.role(RoleKind.STUDENT_ENGINE, 1)
    *command, ids_only = engine.command
    assert command[:3] == [sys.executable, "-m", "opd_async.actors.engine.server"]
    assert ids_only == "--skip-tokenizer-init"
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {
        "--model-path": str(tmp_path / "student"),
        "--host": "127.0.0.1",
        "--port": str(engine.ports["http"]),
        "--device": "cpu",
        "--dtype": "float32",
        "--max-total-tokens": "1024",
        "--max-running-requests": "16",
        "--context-length": "64",
        "--threads": "1",
        "--seed": "8",
        "--metrics-port": str(engine.ports["metrics"]),
        "--counters-file": str(plan.run_folder / "counters" / "student-engine-1.json"),
    }
    plan_file = str(plan.run_folder / "plan.json")
    assert plan.role(RoleKind.ROLLOUT, 0).command[1:] == (
        "-m",
        "opd_async.actors.rollout",
        "--plan",
        plan_file,
        "--index",
        "0",
    )
    assert plan.role(RoleKind.INTAKE, 0).command[1:] == ("-m", "opd_async.actors.intake", "--plan", plan_file)
    learner = plan.role(RoleKind.LEARNER, 0)
    assert learner.devices == ("cpu", "cpu")
    text = " ".join(learner.command[1:])
    assert text.startswith("-m opd_async.cluster.ranks --nnodes 1 --log-dir /dev/null --nproc-per-node 2 ")
    assert " --max-restarts 0 " in text
    assert f"--master-addr 127.0.0.1 --master-port {learner.ports['master']}" in text
    assert text.endswith(f"-m opd_async.learner.main --plan {plan_file}")


def test_a_rank_alone_is_started_without_a_starter_of_ranks(tmp_path: Path) -> None:
    """It is alone, whatever the environment of the launcher says of ranks."""
    plan = make_plan(small_topology(tmp_path))
    learner = plan.role(RoleKind.LEARNER, 0)
    plan_file = str(plan.run_folder / "plan.json")
    assert learner.command == (sys.executable, "-m", "opd_async.learner.main", "--plan", plan_file)
    assert (learner.env["RANK"], learner.env["LOCAL_RANK"], learner.env["WORLD_SIZE"]) == ("0", "0", "1")
    assert "RANK" not in make_plan(small_topology(tmp_path, "learner.data_parallel=2")).role(RoleKind.LEARNER, 0).env


def test_external_engines_have_no_process(tmp_path: Path) -> None:
    engine = "{kind: external, replicas: 2, context_tokens: 64, urls: ['http://h:1/', 'http://h:2']}"
    plan = make_plan(small_topology(tmp_path, f"engines.teacher={engine}"))
    assert plan.of_kind(RoleKind.TEACHER_ENGINE) == ()
    assert plan.teacher_engines == ("http://h:1", "http://h:2")
    assert "teacher-engine-1  http://h:2" in describe_plan(plan)


def test_vocabulary_and_stop_tokens_come_from_the_student(tmp_path: Path) -> None:
    topology = small_topology(tmp_path, "rollout.sampling.stop_token_ids=[9, 2]")
    plan = make_plan(topology)
    assert plan.vocab_size == 32 and plan.stop_token_ids == (2, 5, 9)
    make_model(tmp_path / "student", eos_token_id=None)
    (tmp_path / "student" / "generation_config.json").unlink()
    assert make_plan(topology).stop_token_ids == (2, 9)
    (tmp_path / "student" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        make_plan(topology)


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = make_plan(small_topology(tmp_path))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_table_is_aligned_and_hides_keys(tmp_path: Path) -> None:
    plan = make_plan(small_topology(tmp_path, "engines.student.api_key=s3cret", "learner.data_parallel=2"))
    text = describe_plan(plan)
    assert "s3cret" not in text
    lines = text.splitlines()
    assert lines[0].split() == ["role", "host", "devices", "ports", "command"]
    assert len(lines) == 2 + len(plan.roles)
    column = lines[0].index("command")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    assert "2 x cpu" in lines[-1]
