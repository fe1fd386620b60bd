"""Keys of a run: drawn anew each time, and nowhere but in environments."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
from pathlib import Path

import pytest
from small_runs import small_topology

from opd_async.checks.validation import validate
from opd_async.cluster.supervisor import ProcessSpec, Supervisor
from opd_async.command import launch, parse_arguments
from opd_async.config.topology import EngineKind
from opd_async.engines.command import engine_command
from opd_async.engines.sglang import keys_yaml
from opd_async.errors import InputError
from opd_async.keys import ADMIN_API_KEY_ENV, API_KEY_ENV, RunKeys, engine_environment, is_key
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan
from opd_async.telemetry.role_log import everything


def test_keys_are_random_and_travel_in_the_environment_only() -> None:
    one, two = RunKeys.draw(), RunKeys.draw()
    values = list(one.environment().values())
    assert len({*values, *two.environment().values()}) == 2 * len(values) and min(map(len, values)) >= 40
    assert RunKeys.of_environment(one.environment() | {"HOME": "/"}) == one
    assert RunKeys.of_environment({}) is None
    some = dict(list(one.environment().items())[1:])
    assert RunKeys.of_environment(some) is None
    assert not any(value in f"{one} {one!r}" for value in values)
    assert all(map(is_key, (*one.environment(), API_KEY_ENV, ADMIN_API_KEY_ENV))) and not is_key("PATH")


def test_engines_that_the_run_starts_have_keys_unless_the_topology_gives_them(tmp_path: Path) -> None:
    keys = RunKeys.draw()
    external = "{kind: external, context_tokens: 64, urls: ['http://127.0.0.1:9']}"
    plan = make_plan(small_topology(tmp_path, "engines.student.api_key=mine", f"engines.teacher={external}"))
    keyed = plan.with_keys(keys)
    student, teacher = (keyed.section(urls[0]) for urls in (keyed.student_engines, keyed.teacher_engines))
    assert (student.api_key, student.admin_api_key) == ("mine", keys.admin)
    assert (teacher.api_key, teacher.admin_api_key) == (None, None)
    assert keyed.with_keys(RunKeys.draw()) == keyed
    routed = make_plan(small_topology(tmp_path, "engines.student.router='http://127.0.0.1:8'")).with_keys(keys)
    section = routed.topology.engines.student
    assert (section.api_key, section.admin_api_key) == (None, keys.admin)


def test_no_command_has_a_key(tmp_path: Path) -> None:
    given = [f"engines.{side}.{key}=s3cret" for side in ("student", "teacher") for key in ("api_key", "admin_api_key")]
    plan = make_plan(small_topology(tmp_path, *given))
    assert not any("s3cret" in word for role in plan.roles for word in role.command)
    sglang = {"kind": EngineKind.SGLANG, "python": Path(sys.executable)}
    section = plan.topology.engines.student.model_copy(update=sglang)
    command = engine_command(section, Path("model"), ("cpu",), "127.0.0.1", {"http": 1}, 0, Path("keys.yaml"))
    assert "s3cret" not in command and command[command.index("--config") + 1] == "keys.yaml"
    assert json.loads(keys_yaml("a", None)) == {"api-key": "a"}
    assert engine_environment("a", None) == {API_KEY_ENV: "a"}


@pytest.mark.parametrize(("args", "remedy"), [("--api-key", "write api_key"), ("--config=a", "--config, by which")])
def test_arguments_that_would_show_or_hide_keys_are_refused(tmp_path: Path, args: str, remedy: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.5.23\n")
    python.chmod(0o755)
    engine = [f"engines.student.{line}" for line in ("kind=sglang", f"python={python}", f"args=['{args}', k]")]
    (problem,) = validate(small_topology(tmp_path, *engine))
    assert problem.startswith("engines.student.args: ") and remedy in problem


def test_a_key_on_the_launchers_own_command_line_is_refused(tmp_path: Path) -> None:
    arguments = ["--topology", str(tmp_path / "t.yaml"), "--set", "engines.student.api_key=s3cret"]
    with pytest.raises(InputError, match="command line") as caught:
        launch(parse_arguments(arguments))
    assert "s3cret" not in str(caught.value)


def test_what_a_role_prints_shows_no_key(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "engine.log"
    log.parent.mkdir()
    log.touch(0o644)  # of a run before
    said: list[str] = []

    async def main() -> tuple[str, ...]:
        async with Supervisor(said.append, 5.0, everything) as supervisor:
            code = "import os; print('args: ' + os.environ['K'], flush=True); raise SystemExit('no ' + os.environ['K'])"
            command = (sys.executable, "-c", code, "s3cret-key")
            await supervisor.start(ProcessSpec("engine", command, {"K": "s3cret-key"}, log, ("s3cret-key",)))
            return (await supervisor.exits.get()).tail

    tail = asyncio.run(main())
    assert tail == ("args: ***", "no ***")
    assert "s3cret" not in log.read_text() + "".join(said) and "***" in log.read_text().splitlines()[0]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_saved_plan_has_no_key_of_the_run(tmp_path: Path) -> None:
    plan, keys = make_plan(small_topology(tmp_path)), RunKeys.draw()
    keyed = plan.with_keys(keys)
    assert Plan.model_validate_json(plan.model_dump_json()).with_keys(keys) == keyed
    assert not any(value in plan.model_dump_json() for value in keys.environment().values())
