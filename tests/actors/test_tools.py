"""Tools in processes of their own: what they answer, and that nothing that they do ends more than their own call."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from deadlines import patience
from fake_role import fake_role, make_plan, until, value
from talking_engine import END, START, VOCAB
from talking_rollout import rollout

from opd_async.actors.rollout import tool_pool
from opd_async.actors.rollout.session import Session
from opd_async.actors.rollout.tool_calls import ToolCall
from opd_async.actors.rollout.tool_pool import ToolPool
from opd_async.actors.rollout.tool_worker import frame
from opd_async.errors import RoleError
from opd_async.plan.plan import RoleKind
from opd_async.role import Role

TOOLS = '''
import os, subprocess, sys, time
from pathlib import Path


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    print("a word for the log")
    return a + b

async def later(word: str) -> str:
    return word + "\\ud800"

def listed() -> list:
    return [1, {"a": None}]

def megabytes() -> str:
    return "x" * 5_000_000

def raises(a: int) -> None:
    raise ValueError("no number today")

def leaves() -> None:
    sys.exit(3)

def hangs(file: str) -> None:
    child = subprocess.Popen(["sleep", "3600"])
    Path(file).write_text(str(child.pid))
    time.sleep(3600)

def dies() -> None:
    os._exit(3)

def greedy() -> int:
    return len(bytearray(64 << 30))

def answers(port: int) -> bool:
    import socket
    try:
        socket.create_connection(("127.0.0.1", port), 5.0).close()
    except OSError:
        return False
    return True
'''
NAMES = ("add", "later", "listed", "megabytes", "raises", "leaves", "hangs", "dies", "greedy", "answers")
CONTAINER = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable)
"""Python in namespaces of its own: what a container is made of, without an image."""


def write_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "tools_of_mine.py").write_text(TOOLS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return {"functions": [f"tools_of_mine:{name}" for name in NAMES], "workers": 1, "result_characters": 100}


@asynccontextmanager
async def pool_of(**tools: Any) -> AsyncIterator[tuple[ToolPool, Role]]:
    plan = make_plan(VOCAB, ("http://127.0.0.1:9",), (), rollout={"function": "a:b", "tools": tools})
    async with fake_role(plan, RoleKind.ROLLOUT) as (role, _):
        pool = ToolPool(role, plan.topology.rollout.tools)
        role.spawn(pool.run(), "tools")
        yield pool, role


def counted(role: Role, result: str) -> float:
    return value(role, "opd_rollout_tool_calls_total", result=result)


async def test_schemas_come_of_signature_and_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(**write_tools(tmp_path, monkeypatch)) as (pool, _):
        add, *_ = await pool.schemas()
        assert (add["function"]["name"], add["function"]["description"]) == ("add", "Add two numbers.")
        parameters = add["function"]["parameters"]
        assert parameters["required"] == ["a"] and parameters["properties"]["b"]["type"] == "integer"


ANSWERS: list[tuple[str, dict[str, Any], str, str]] = [
    ("add", {"a": 2, "b": 3}, "answered", "5"),
    ("add", {"a": "2"}, "answered", "3"),
    ("later", {"word": "soon"}, "answered", "soon?"),
    ("listed", {}, "answered", '[1, {"a": null}]'),
    ("megabytes", {}, "cut", "x" * 100 + "\n[4999900 more characters]"),
    ("add", {"a": "two"}, "raised", "error: ValidationError: 1 validation error"),
    ("add", {"a": 1, "c": 2}, "raised", "error: ValidationError: 1 validation error"),
    ("raises", {"a": 1}, "raised", "error: ValueError: no number today"),
    ("leaves", {}, "raised", "error: SystemExit: 3"),
    ("greedy", {}, "raised", "error: MemoryError"),
    ("nothing", {}, "unknown", "error: there is no tool 'nothing'; there are add, later"),
    ("dies", {}, "died", "error: the process of the tool has ended"),
    ("add", {"a": 4}, "answered", "5"),
]


async def test_every_call_has_an_answer_and_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(**write_tools(tmp_path, monkeypatch), deadline_s=patience(20.0)) as (pool, role):
        for name, arguments, kind, text in ANSWERS:
            before = counted(role, kind)
            said = await pool.call(ToolCall(name, arguments))
            assert said.startswith(text) and len(said) < 200, (name, said)
            assert counted(role, kind) == before + 1


async def test_a_tool_that_hangs_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine may need several calls until one gets so far as to start a child, and until one is answered."""
    child, calls = tmp_path / "child", 0
    async with pool_of(**write_tools(tmp_path, monkeypatch), deadline_s=1.0) as (pool, role):
        while not (child.exists() and child.read_text()):
            said, calls = await pool.call(ToolCall("hangs", {"file": str(child)})), calls + 1
            assert said.startswith("error: no answer within") and counted(role, "deadline") == calls
        while (said := await pool.call(ToolCall("add", {"a": 4}))) != "5":
            assert said.startswith("error: no answer within"), "another process is there"
        stat = Path(f"/proc/{child.read_text()}/stat")
        await until(lambda: not stat.exists() or stat.read_text().split()[2] == "Z", "the child is gone")


def is_container(process: psutil.Process) -> bool:
    """Whether this process has started it to be one."""
    return process.info["name"] == "unshare" and process.info["ppid"] == os.getpid()


def sleepers(folder: Path) -> list[dict[str, str]]:
    """The environments of what the tools of a test have left sleeping."""
    there = [one.info for one in psutil.process_iter(["cmdline", "environ"])]
    sleeping = [one["environ"] or {} for one in there if one["cmdline"] == ["sleep", "3600"]]
    return [one for one in sleeping if str(folder) in one.get("PYTHONPATH", "")]


async def test_tools_in_a_container_see_no_network_and_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = write_tools(tmp_path, monkeypatch)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    call = ToolCall("answers", {"port": server.sockets[0].getsockname()[1]})
    async with server, pool_of(**tools) as (pool, _):
        assert await pool.call(call) == "true"
        async with pool_of(**tools, command=CONTAINER, deadline_s=patience(2.0)) as (inside, _):
            assert await inside.call(call) == "false"
            child = tmp_path / "child"
            (waits,) = [one for one in psutil.process_iter(["name", "ppid"]) if is_container(one)]
            assert (await inside.call(ToolCall("hangs", {"file": str(child)}))).startswith("error: no answer within")
            assert int(child.read_text()) < 100, "it has a number of its own in there"
            assert await inside.call(ToolCall("add", {"a": 4})) == "5", "another container is there"
            await until(lambda: not waits.is_running() or waits.status() == psutil.STATUS_ZOMBIE, "the first is gone")
            # the kernel ends what is in a container after the process that it was made for
            await until(lambda: not sleepers(tmp_path), "what it had started is gone")


@pytest.mark.parametrize("command", [CONTAINER, (sys.executable,)], ids=["container", "process"])
async def test_a_tool_that_hangs_ends_with_the_actor_that_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """However the actor ends, its end of the line is closed; a container's first process is not its child."""
    write_tools(tmp_path, monkeypatch)
    child, limits = tmp_path / "child", ("--memory-mib", "4096", "--characters", "100")
    worker = await asyncio.create_subprocess_exec(
        *(*command, "-m", tool_pool.MODULE, *limits, "tools_of_mine:hangs"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(frame(["hangs", json.dumps({"file": str(child)})]))
    await until(lambda: child.exists() and bool(sleepers(tmp_path)), "the tool hangs")
    worker.stdin.close()
    await asyncio.wait_for(worker.wait(), patience(20.0))
    await until(lambda: not sleepers(tmp_path), "what it had started is gone")


async def test_tools_that_cannot_be_loaded_end_the_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_pool, "MAX_FALSE_STARTS", 1)
    with pytest.raises(ExceptionGroup) as caught:
        async with pool_of(functions=["no_such_module:add"], workers=1):
            await asyncio.Event().wait()
    assert caught.group_contains(RoleError, match="ended before they were ready")


CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


async def test_a_student_that_calls_tools_until_it_calls_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        last = await session.use_tools()
        assert [tool["function"]["name"] for tool in await session.tools()] == list(NAMES)
        return float(last.text == "is 5" and not last.calls)

    tools = write_tools(tmp_path, monkeypatch)
    answers = (f"I add{CALL}{CALL}", "<tool_call>broken", "is 5")
    async with rollout(episode, tmp_path, monkeypatch, *answers, tools=tools) as (running, _):
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward) == ("stop", 0.0), "a call that is broken is no call, and ends the loop"
        result = f"{START}tool\n5{END}\n"
        assert running.text(sampled=True) == [answers[0] + END, answers[1] + END]
        assert running.text(sampled=False) == [f"\n{result}{result}{START}assistant\n"]


async def test_the_loop_ends_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        last = await session.use_tools(max_turns=2)
        assert last.calls == (ToolCall("add", {"a": 2, "b": 3}),)
        return 1.0

    tools = write_tools(tmp_path, monkeypatch)
    async with rollout(episode, tmp_path, monkeypatch, CALL, CALL, CALL, tools=tools) as (running, engine):
        await running.lease()
        assert (await running.end()).reward == 1.0
        assert len(engine.read()) == 2
