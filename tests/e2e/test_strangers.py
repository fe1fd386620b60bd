"""Who is not of the run can change nothing: engines, sockets, and what a stranger could read of the keys."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from claimed_ports import claimed_port
from deadlines import patience
from harness import ROOT, Launch, check_trained, steps, topology, write_topology

from opd_async.keys import RunKeys, is_key
from opd_async.plan.plan import Plan, RoleKind
from opd_async.transport.door import Passport
from opd_async.transport.messages import Failure, Frontier, Heartbeat, Hello, LeaseDone, ScoredChunk, Stop
from opd_async.transport.wire import encode

CHANGES = ("/update_weights_from_disk", "/update_weight_version", "/pause_generation", "/abort_request", "/generate")


def keys_of(processes: list[psutil.Process]) -> set[str]:
    """Every key in the environment of the run's processes: those that did not end meanwhile."""
    found: set[str] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {value for name, value in process.environ().items() if is_key(name)}
    return found


def status(url: str, key: str | None = None) -> int:
    """Of a POST with a small body."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps({"model_path": "/tmp"}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=patience(30)) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def speak(plan: Plan, run: Launch, heard: Callable[[], bool]) -> None:
    """Well-formed messages of a leftover role of another run, and of somebody without keys, to every port of the run;
    who sends them stays until they were `heard`."""
    none, empty = np.zeros(0, np.int32), np.zeros(0, np.int64)
    words = [
        Hello("rollout-0", "1"),
        Heartbeat("nobody", {"tokens": 1.0}),
        Failure("intake-0", "a stranger's words"),
        LeaseDone(7, 0, 3, "stop"),
        Frontier(5, np.zeros((0, 2), np.int64), empty, none, none),
        Stop("a stranger's reason"),
    ]
    ports = [
        (plan.control, zmq.DEALER),
        (plan.batches[0], zmq.DEALER),
        (plan.scored[0], zmq.PUSH),
        (plan.chunks[0], zmq.PUSH),
    ]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []
    for address, kind in ports:
        for name in ("rollout-0", "rank-0", b"\xff\xfe"):
            for passport in (None, Passport(str(name), RunKeys.draw(), "1")):
                sender = context.socket(kind)
                sender.routing_id = name.encode() if isinstance(name, str) else name
                if passport is not None:
                    passport.show(sender)
                sender.connect(address)
                with suppress(zmq.Again):  # who has been refused by now can send no more
                    for word in words:
                        sender.send_multipart(encode(word), flags=zmq.NOBLOCK)
                sockets.append(sender)
    time.sleep(3.0)  # while the run goes on: whatever a stranger can do, it has the time to
    while not heard():
        assert run.process.poll() is None, run.text()
        time.sleep(0.1)
    for sender in sockets:
        sender.close(linger=0)
    context.term()


def strangers(port: int, role: str, what: str = "strangers") -> float:
    """The counter of refused strangers of one process, or another one."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=patience(30)) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"opd_{role}_{what}_total"))


def counted(plan: Plan, kind: RoleKind, what: str) -> float:
    """A counter of the first process of a kind."""
    return strangers(plan.role(kind, 0).ports["metrics"], kind.value, what)


def role_of_another_run(plan: Plan, place: Path) -> subprocess.CompletedProcess[str]:
    """A rollout actor with other keys, which ends by itself."""
    mine = plan.role(RoleKind.ROLLOUT, 0)
    with claimed_port() as port:
        moved = mine.model_copy(update={"ports": mine.ports | {"metrics": port}})
        others = [role for role in plan.roles if role != mine]
        place.write_text(plan.model_copy(update={"roles": (moved, *others)}).model_dump_json())
        command = [sys.executable, "-m", "actors.rollout", "--plan", str(place)]
        environment = dict(os.environ) | RunKeys.draw().environment()
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(30), check=False
        )


def test_a_run_among_strangers(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path, schedule__steps=1000, schedule__tokens_per_step=512)
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        folder = tmp_path / "run"
        run.wait_for_steps(folder, 1)
        plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
        family = run.family()
        keys = keys_of(family)
        assert len(keys) >= 2
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        assert not any(key in line for key in keys for line in lines)
        for engine in (*plan.student_engines, *plan.teacher_engines):
            assert {status(engine + path) for path in CHANGES} == {401}
            assert {status(engine + path, "guessed") for path in CHANGES} == {401}
        counters = {"launcher": plan.launcher_metrics_port}
        counters |= {kind: plan.role(RoleKind(kind), 0).ports["metrics"] for kind in ("teacher", "intake")}
        speak(plan, run, lambda: all(strangers(port, role) > 0 for role, port in counters.items()))
        ended = role_of_another_run(plan, tmp_path / "stranger.json")
        assert ended.returncode == 1, ended.stderr
        assert f"{plan.control.removeprefix('tcp://')} does not let rollout-0 in: it has the keys of" in ended.stderr
        run.interrupt()  # it goes on until it was looked at
        assert run.wait() == 130, run.text()
    report = json.loads((folder / "report.json").read_text())
    assert report["counters"]["strangers"] >= 3 and report["restarts"] == {}
    assert not any("a stranger's" in path.read_text() for path in (folder / "logs").iterdir())
    check_trained(folder, 1, len(steps(folder)))
    files = [path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert not any(key.encode() in path.read_bytes() for key in keys for path in files)
    assert not any(key in run.text() for key in keys)
    private = [folder / "plan.json", folder / "topology.yaml", *(folder / "logs").iterdir()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)


@pytest.mark.long
def test_open_chunks_are_taken_only_with_the_grant_of_a_lease(inputs: Path, tmp_path: Path) -> None:
    """`network.encrypt: control`: what a stranger pushes where chunks arrive is counted, and dropped."""
    values = topology(inputs, tmp_path, schedule__steps=1000, schedule__tokens_per_step=512, network__encrypt="control")
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        folder = tmp_path / "run"
        run.wait_for_steps(folder, 1)
        plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
        forged = ScoredChunk(
            sample_id=1,
            attempt=0,
            actor=0,
            prompt_id=0,
            prompt_tokens=4,
            start=0,
            weight_version=0,
            finish=None,
            label=None,
            teacher_id="teacher-0",
            latency_s=0.0,
            token_ids=np.zeros(4, np.int32),
            behaviour_logprobs=np.zeros(4, np.float32),
            teacher_logprobs=np.zeros(4, np.float32),
            context=None,
        )
        before = counted(plan, RoleKind.INTAKE, "malformed")
        with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.connect(plan.scored[0])
            stranger.send_multipart(encode(forged))
            while counted(plan, RoleKind.INTAKE, "malformed") <= before:
                assert run.process.poll() is None, run.text()
                time.sleep(0.1)
        # commands are behind keys all the same
        speak(plan, run, lambda: strangers(plan.launcher_metrics_port, "launcher") > 0)
        run.wait_for_steps(folder, len(steps(folder)) + 2)
        run.interrupt()
        assert run.wait() == 130, run.text()
    check_trained(folder, 1, len(steps(folder)))
    assert json.loads((folder / "report.json").read_text())["restarts"] == {}
