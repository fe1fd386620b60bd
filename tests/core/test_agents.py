"""Launcher and agents of a cluster over loopback, without torch: joining, processes, refusals, secrets, addresses."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.cluster import agents as launching
from opd_async.cluster import line
from opd_async.cluster.agent import Agent
from opd_async.cluster.agents import DRAINED, Agents
from opd_async.cluster.hosting import share_files, versions
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.interfaces import Face, faces, own_face, resolve
from opd_async.cluster.nodes import Node, natural
from opd_async.cluster.secret import SECRET_ENV, SECRET_FILE_ENV, take_secret
from opd_async.cluster.service import HostFacts, look_at, visible_devices
from opd_async.cluster.supervisor import Exit, ProcessSpec, Supervisor
from opd_async.config.clustering import Backend, ClusterSection
from opd_async.errors import DeadlineError, InputError, RoleError
from opd_async.keys import INCARNATION_ENV, RunKeys
from opd_async.plan.free_ports import free_ports
from opd_async.transport import messages as m
from opd_async.transport.handshakes import FAILURES

LOOPBACK = Face("lo", "127.0.0.1")
VERSIONS = {"opd_async": "1", "torch": "2"}
MARK = f"a process of test_agents in {os.getpid()}"
SLEEPER = "import time\nprint('12:00:00 WARNING ready', flush=True)\ntime.sleep(600)"


def keys(secret: str = "a secret of the cluster") -> RunKeys:
    return RunKeys(secret, secret, secret)


def cluster(**changes: Any) -> ClusterSection:
    """A cluster of two hosts whose leases outlast any busy machine, unless a test changes that."""
    (port,) = free_ports("127.0.0.1", 1)
    lasting = {"fence_s": patience(60), "lost_s": patience(90), "join_s": patience(60), "node_back_s": patience(60)}
    return ClusterSection(**{"backend": Backend.AGENTS, "nodes": 2, "port": port, **lasting, **changes})


def agent_of(section: ClusterSection, name: str = "h1", said: list[str] | None = None, **facts: Any) -> Agent:
    """An agent that has not begun yet."""
    known = {"face": LOOPBACK, "gpus": 0, "cores": 1, "versions": VERSIONS, **facts}
    place = f"127.0.0.1:{section.port}"
    own = known.pop("keys", keys())
    say = (said if said is not None else []).append
    wall = known.pop("wall", time.time)
    return Agent(place, own, HostFacts(name=name, **known), patience(60), say, wall)


@asynccontextmanager
async def launcher(section: ClusterSection, said: list[str] | None = None) -> AsyncIterator[Agents]:
    """The launcher's side."""
    say = (said if said is not None else []).append
    async with Agents(section, patience(10), keys(), LOOPBACK, VERSIONS, say=say) as agents:
        yield agents


async def no_files(node: Node) -> None:
    """Most of these hosts share none."""


def hosts_of(
    agents: Agents,
    said: list[str],
    where: dict[str, str],
    node_back_s: float = 600.0,
    share: Callable[[Node], Awaitable[None]] = no_files,
) -> Hosts:
    local = Supervisor(said.append, patience(10))
    return Hosts(
        agents,
        local,
        where=where,
        environment={"OF": "all"},
        own_environment={"OWN": "here"},
        node_back_s=node_back_s,
        share=share,
        echo=said.append,
        on_unwritten=lambda lines: None,
    )


def spec(folder: Path, name: str, code: str) -> ProcessSpec:
    env = {INCARNATION_ENV: f"start of {name}"}
    return ProcessSpec(name, (sys.executable, "-c", code), env, folder / f"{name}.log", ("s3cret",))


async def agent_process(section: ClusterSection, folder: Path, out: int, errors: int) -> asyncio.subprocess.Process:
    """A real agent of h1, started in this folder as `nohup` starts programs."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from opd_async import agent\n"
        f"agent.versions = lambda: {VERSIONS}\n"
        f"agent.main(['--join', '127.0.0.1:{section.port}', '--name', 'h1', '--interface', 'lo'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), SECRET_ENV: keys().run}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), cwd=folder, env=environment, stdout=out, stderr=errors
    )


async def until(true: Any, what: str) -> None:
    """Look again and again, with a deadline that names what was waited for."""
    give_up = time.monotonic() + patience(60)
    while not true():
        assert time.monotonic() < give_up, f"not in {patience(60):.0f} s: {what}"
        await asyncio.sleep(0.02)


async def next_exit(hosts: Hosts) -> Exit:
    async with asyncio.timeout(patience(60)):
        return await hosts.exits.get()


async def test_processes_start_speak_end_and_stop_on_another_host(tmp_path: Path) -> None:
    section, said = cluster(), list[str]()
    agent = asyncio.create_task(agent_of(section).run())
    async with launcher(section, said) as agents:
        assert [node.name for node in await agents.gather()] == ["h1"]
        async with hosts_of(agents, said, {"far": "h1", "quick": "h1", "near": ""}) as hosts:
            await hosts.start(spec(tmp_path, "far", SLEEPER))
            await hosts.start(spec(tmp_path, "near", SLEEPER))
            assert set(hosts.running) == {"far", "near"} and not hosts.lost("far")
            await until(lambda: sum("WARNING ready" in line for line in said) == 2, "loud lines of both hosts")
            assert any(line.startswith("far | ") for line in said)

            show = (
                "import os; print('s3cret', os.environ['OF'], os.environ.get('OWN'), os.environ['GLOO_SOCKET_IFNAME'])"
            )
            await hosts.start(spec(tmp_path, "quick", f"{show}; raise SystemExit(3)"))
            ended = await next_exit(hosts)
            assert (ended.name, ended.code, ended.tail) == ("quick", 3, ("*** all None lo",))
            assert "s3cret" not in (tmp_path / "quick.log").read_text()

            hosts.kill("far")
            ended = await next_exit(hosts)
            assert (ended.name, ended.code) == ("far", -signal.SIGKILL) and "ready" in ended.tail[-1]
            await hosts.start(spec(tmp_path, "far", SLEEPER))
            stopped = await hosts.stop("far")
            assert stopped is not None and stopped.code == -signal.SIGTERM and hosts.running == ("near",)
            assert await hosts.stop("far") is None

            too_much = {f"V{number}": "x" * 60_000 for number in range(60)}
            with pytest.raises(RoleError, match=r"h1: cannot start far: .*Argument list too long"):
                await hosts.start(ProcessSpec("far", ("true",), too_much, tmp_path / "far.log"))
            await hosts.start(spec(tmp_path, "far", SLEEPER))
    async with asyncio.timeout(patience(60)):
        await agent  # the run is over: it ends by itself, with its processes


async def test_processes_know_how_far_their_hosts_clock_is_from_the_launchers(tmp_path: Path) -> None:
    ahead_s = 1000.0
    section, said = cluster(fence_s=patience(1), lost_s=patience(90)), list[str]()
    agent = asyncio.create_task(agent_of(section, wall=lambda: time.time() + ahead_s).run())
    code = (
        "import time; from opd_async.clock import WALL\n"
        f"offset, give_up = 0.0, time.monotonic() + {patience(60)}\n"
        "while offset > -1 and time.monotonic() < give_up:\n"
        "    WALL.refresh(); offset = WALL.now() - time.time(); time.sleep(0.02)\n"
        "print('offset', offset)"
    )
    async with launcher(section, said) as agents:
        await agents.gather()
        async with hosts_of(agents, said, {"far": "h1", "near": ""}) as hosts:
            await hosts.start(spec(tmp_path, "far", code))
            word, offset = (await next_exit(hosts)).tail[-1].split()
            # but for half a round trip, which on a busy machine may take a while
            assert word == "offset" and abs(float(offset) + ahead_s) < patience(0.1)
            await hosts.start(spec(tmp_path, "near", "from opd_async.clock import WALL; print(WALL._offset_s)"))
            assert (await next_exit(hosts)).tail == ("0.0",), "the launcher's own host has its clock"
    async with asyncio.timeout(patience(60)):
        await agent


async def test_another_secret_is_an_error_where_it_is() -> None:
    section, said = cluster(), list[str]()
    async with launcher(section, said) as agents:
        with pytest.raises(RoleError, match="does not let this agent in: the cluster's secret differs"):
            async with asyncio.timeout(patience(60)):
                await agent_of(section, keys=keys("another secret altogether")).run()
        assert agents.nodes == {}


async def test_a_launcher_that_stands_still_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel takes connections, and nothing answers on them: that is no refusal, however often it is tried."""
    monkeypatch.setattr(line, "HANDSHAKE_MS", 400)
    section, still = cluster(), list[socket.socket]()

    async def stand(standing: socket.socket) -> None:
        while len(still) <= FAILURES + 1:  # each comes once the handshake before has timed out
            still.append((await asyncio.get_running_loop().sock_accept(standing))[0])

    with socket.create_server(("127.0.0.1", section.port)) as standing:
        standing.setblocking(False)
        tried, agent = asyncio.create_task(stand(standing)), asyncio.create_task(agent_of(section).run())
        await asyncio.wait((tried, agent), timeout=patience(60), return_when=asyncio.FIRST_COMPLETED)
        assert not agent.done() and tried.done()
    for connection in still:
        connection.close()
    async with launcher(section) as agents:
        assert [node.name for node in await agents.gather()] == ["h1"]
    await agent


@pytest.mark.parametrize("end", ["run", "hangup"])
async def test_an_agent_outlives_its_terminal(tmp_path: Path, end: str) -> None:
    """Nobody reads what it prints; and `nohup` says that a lost terminal does not matter."""
    section = cluster()
    reading, writing = os.pipe()
    os.close(reading)
    process = await agent_process(section, tmp_path, writing, asyncio.subprocess.PIPE)
    os.close(writing)
    async with launcher(section) as agents:
        (node,) = await agents.gather()
        if end == "hangup":
            process.send_signal(signal.SIGHUP)
        answer = await agents.ask(node, lambda number: m.FindPorts(number, 1, []))
        assert len(answer.numbers) == 1
    async with asyncio.timeout(patience(60)):
        _, errors = await process.communicate()
    assert process.returncode == 0
    assert b"stdout is gone (Broken pipe); the run goes on without it" in errors and b"Traceback" not in errors


async def test_a_second_agent_of_one_name_is_refused_and_the_first_serves_on(tmp_path: Path) -> None:
    section = cluster(fence_s=patience(1), lost_s=patience(60))
    agent = asyncio.create_task(agent_of(section).run())
    async with launcher(section) as agents:
        await agents.gather()
        with pytest.raises(InputError, match=r"another agent, at 127.0.0.1, serves h1 already; give this host another"):
            async with asyncio.timeout(patience(60)):
                await agent_of(section).run()
        async with hosts_of(agents, [], {"far": "h1"}) as hosts:
            await hosts.start(spec(tmp_path, "far", SLEEPER))
            assert hosts.running == ("far",)
    await agent


async def test_a_port_that_is_taken_on_another_host_is_named_with_it() -> None:
    section = cluster()
    agent = asyncio.create_task(agent_of(section).run())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with launcher(section) as agents:
            (node,) = await agents.gather()
            words = (
                rf"h1: network.base_port: port {port} of 127.0.0.1 .*write another base_port, or 0 to take free ones"
            )
            with pytest.raises(RoleError, match=words):
                await agents.ask(node, lambda number: m.FindPorts(number, 0, [port]))
    await agent


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"versions": {**VERSIONS, "torch": "3"}},
            "h1 has torch 3, the launcher's host 2; install the same on every host",
        ),
        ({"versions": {"opd_async": "1"}}, "h1 has torch none, the launcher's host 2"),
        ({"gpus": 1}, "h1 has 1 GPUs, and cluster.gpus_per_node says 2"),
    ],
)
async def test_a_host_that_cannot_serve_is_refused_on_both_sides(facts: dict[str, Any], words: str) -> None:
    section = cluster(gpus_per_node=2)
    async with launcher(section) as agents:
        agent = asyncio.create_task(agent_of(section, **{"gpus": 2, **facts}).run())
        with pytest.raises(InputError, match=words):
            await agents.gather()
        with pytest.raises(InputError, match=words):
            await agent


async def test_who_is_missing_is_counted_and_named() -> None:
    section, said = cluster(nodes=3, join_s=0.2), list[str]()
    agent = asyncio.create_task(agent_of(section).run())
    async with launcher(section, said) as agents:
        await until(lambda: "h1" in agents.nodes, "h1 to join")
        with pytest.raises(DeadlineError, match=r"cluster.nodes: 1 of 2 agents \(h1\) have joined at 127.0.0.1:"):
            await agents.gather()
    await agent


async def test_an_agent_whose_launcher_is_gone_ends_its_processes(tmp_path: Path) -> None:
    section, agent_said = cluster(fence_s=patience(0.4), lost_s=patience(120)), list[str]()
    agent = asyncio.create_task(agent_of(section, said=agent_said).run())
    async with launcher(section) as agents:
        await agents.gather()
        hosts = hosts_of(agents, [], {"far": "h1"})
        await hosts.__aenter__()
        await hosts.start(spec(tmp_path, "far", f"{SLEEPER} # {MARK}"))
        await until(lambda: "ready" in (tmp_path / "far.log").read_text(), "the process")
        first = agents.nodes["h1"].incarnation
        agents._loops[0].cancel()  # it reads no message any more, as one that hangs
        await until(lambda: any("was not heard" in line for line in agent_said), "the end of the lease")
        agent.cancel()
        with suppress(asyncio.CancelledError):
            await agent
        # whatever the launcher believes: the process is gone
        assert agents.nodes["h1"].incarnation == first
        assert not any(MARK in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


async def test_a_host_that_comes_back_is_given_its_processes_again(tmp_path: Path) -> None:
    section, said = cluster(), list[str]()
    agent = asyncio.create_task(agent_of(section).run())
    async with launcher(section, said) as agents:
        (node,) = await agents.gather()
        async with hosts_of(agents, said, {"far": "h1"}) as hosts:
            await hosts.start(spec(tmp_path, "far", SLEEPER))
            agents._lose(node, "it was silent")
            ended = await next_exit(hosts)
            assert ended.tail == ("its host h1 was lost",) and hosts.lost("far") and hosts.running == ()
            # its beats are answered with `Leave`: it ends everything, and joins anew
            await hosts.start(spec(tmp_path, "far", SLEEPER))
            assert hosts.running == ("far",) and not hosts.lost("far") and "h1 is back" in said
    await agent


async def test_an_agent_that_was_started_elsewhere_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder, and before a file system is mounted: nothing starts there until it shares all files again."""
    monkeypatch.setattr(launching, "UNFIT_S", 0.1)
    for name in ("launcher", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "launcher")
    topology, models = small_topology(tmp_path, "run_dir=runs"), tmp_path / "student"
    section, said, quiet = cluster(), list[str](), asyncio.subprocess.DEVNULL
    process = await agent_process(section, tmp_path / "launcher", quiet, quiet)
    async with launcher(section, said) as agents:
        nodes = await agents.gather()
        await share_files(topology, agents, nodes, said.append)

        async def share(node: Node) -> None:
            await share_files(topology, agents, [node], said.append)

        async with hosts_of(agents, said, {"far": "h1"}, patience(60), share) as hosts:
            process.kill()
            await process.wait()
            agents._lose(nodes[0], "it was killed")
            models.rename(tmp_path / "unmounted")
            process = await agent_process(section, tmp_path / "elsewhere", quiet, quiet)
            role = "import os, time; print(f'in {os.getcwd()}!', flush=True); time.sleep(600)"
            start = asyncio.create_task(hosts.start(spec(topology.run_dir, "far", role)))
            words = f"h1 is lost: h1: {models}: not there; put it on every host, or on a shared file system"
            await until(lambda: words in said or start.done(), "the host to be given up again")
            assert not start.done() and hosts.running == ()
            (tmp_path / "unmounted").rename(models)
            async with asyncio.timeout(patience(60)):
                await start
            log = tmp_path / "launcher" / "runs" / "far.log"
            await until(lambda: log.exists() and log.read_text().endswith("!\n"), "the process")
            assert f"in {tmp_path / 'launcher'}!" in log.read_text(), log.read_text()
            assert [path.name for path in log.parent.iterdir()] == ["far.log"]
    async with asyncio.timeout(patience(60)):
        assert await process.wait() == 0


async def test_a_host_that_stays_away_is_waited_for_and_named(tmp_path: Path) -> None:
    section, agent_said = cluster(), list[str]()
    agent = asyncio.create_task(agent_of(section, said=agent_said).run())
    async with launcher(section) as agents:
        (node,) = await agents.gather()
        await until(lambda: agent_said, "the agent to serve")
        agent.cancel()
        with suppress(asyncio.CancelledError):
            await agent
        await until(lambda: not node.there.is_set(), "the agent's farewell")
        async with hosts_of(agents, [], {"far": "h1"}, node_back_s=0.1) as hosts:
            with pytest.raises(RoleError, match=r"h1 has not come back in 0 s .* far was there \(its agent was told"):
                await hosts.start(spec(tmp_path, "far", SLEEPER))


async def test_a_new_host_asks_again_until_the_run_goes_on_and_takes_the_last_seat(tmp_path: Path) -> None:
    section, said, here = cluster(spare_nodes=1), list[str](), list[str]()
    first = asyncio.create_task(agent_of(section).run())
    async with launcher(section) as agents:
        (node,) = await agents.gather()
        second = asyncio.create_task(agent_of(section, "h2", said).run())
        await until(lambda: any("takes others once it goes on" in line for line in said), "h2 to be put off")
        assert agents.nodes.keys() == {"h1"} and agents.seats == 1
        agents.on_here = lambda node: here.append(node.name)
        await until(lambda: here == ["h2"], "h2 to join")
        with pytest.raises(InputError, match=r"h3 is no host of this run, which has h1, h2; it began without, and has"):
            async with asyncio.timeout(patience(60)):
                await agent_of(section, "h3").run()

        agents.on_lost = agents.on_missed = lambda node: pytest.fail("it was let go, not lost")
        agents.nodes["h2"].drained = True
        await agents.dismiss(agents.nodes["h2"], "it was drained")
        async with asyncio.timeout(patience(60)):
            await second
        assert said[-1] == "it was drained" and agents.seats == 0 and node.there.is_set()
        kept_out = asyncio.create_task(agent_of(section, "h2", said).run())
        await until(lambda: f"{DRAINED}; joining again" in said, "h2 to be put off")
        assert not agents.nodes["h2"].there.is_set() and here == ["h2"]
        kept_out.cancel()
        agents.nodes["h2"].drained = False
        with pytest.raises(InputError, match="its folder is another"):
            refused = asyncio.create_task(agent_of(section, "h2").run())
            await until(lambda: here == ["h2", "h2"], "h2 to be back")
            await agents.dismiss(agents.nodes["h2"], "its folder is another", failed=True, forget=True)
            await refused
        assert agents.seats == 1
    await first


# --- secrets and addresses -------------------------------------------------------------------------------------------


def test_the_secret_is_taken_out_of_the_environment(tmp_path: Path) -> None:
    environment = {SECRET_ENV: " 0123456789abcdef \n", "OTHER": "x"}
    assert take_secret(environment).run == "0123456789abcdef" and environment == {"OTHER": "x"}
    file = tmp_path / "secret"
    file.write_text("fedcba9876543210\n")
    file.chmod(0o600)
    environment = {SECRET_FILE_ENV: str(file)}
    assert take_secret(environment).run == "fedcba9876543210" and environment == {}
    file.chmod(0o640)
    with pytest.raises(InputError, match=r"mode 0640, so others can read it; run `chmod 600"):
        take_secret({SECRET_FILE_ENV: str(file)})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "neither is set, so no agent can be trusted"),
        ({SECRET_ENV: "short"}, "OPD_CLUSTER_SECRET: 5 characters, which can be guessed"),
        ({SECRET_FILE_ENV: "/nowhere/secret"}, r"/nowhere/secret: cannot be read \(No such file"),
    ],
)
def test_what_is_no_secret_is_refused_without_showing_it(environment: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as found:
        take_secret(dict(environment))
    assert "short" not in str(found.value)


def test_interfaces() -> None:
    assert own_face("127.0.0.0/8") in faces() and own_face("lo") == Face("lo", "127.0.0.1")
    assert own_face(None, "127.0.0.1") == Face("lo", "127.0.0.1")
    assert LOOPBACK.environment == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with pytest.raises(InputError, match=r"has no interface eth77 with an IPv4 address, but lo \(127.0.0.1\)"):
        own_face("eth77")
    with pytest.raises(InputError, match=r"10.0.0.0/8x is no network; write one such as"):
        own_face("10.0.0.0/8x")


def test_a_name_that_leads_back_to_this_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_name(*_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    assert resolve("127.0.0.1:5") == ("127.0.0.1", 5)
    monkeypatch.setattr(socket, "getaddrinfo", own_name)
    with pytest.raises(InputError, match=r"launcher-host is 127.0.1.1 here, which leads back to this host"):
        resolve("launcher-host:19999")
    for place in ("h0", "h0:", "h0:x", "h0:70000"):
        with pytest.raises(InputError, match="not HOST:PORT"):
            resolve(place)


def test_devices_are_counted_among_those_of_the_agent() -> None:
    own = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "0,2", "A": "b"}, own) == {"CUDA_VISIBLE_DEVICES": "4,6", "A": "b"}
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, own) == {"CUDA_VISIBLE_DEVICES": ""}
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "1"}, {}) == {"CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(RoleError, match="device 3 was asked for"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "3"}, own)


def test_files_that_are_not_shared_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen, mine = tmp_path / "seen", tmp_path / "mine"
    names = {"seen": str(seen), "mine": str(mine), "nonce": "n0nce"}
    request = m.LookAt(request=1, folder=str(tmp_path), paths=[], **names)
    with pytest.raises(InputError, match=rf"{tmp_path} \(run_dir\): what the launcher writes there is not seen here"):
        look_at(request)
    seen.write_text("n0nce")
    look_at(request)
    assert mine.read_text() == "n0nce"
    with pytest.raises(InputError, match=rf"{tmp_path}/model: not there; put it on every host"):
        look_at(replace(request, paths=["model"]))
    with pytest.raises(InputError, match=r"/nowhere: No such file or directory, where the launcher was started"):
        look_at(replace(request, folder="/nowhere"))


def test_every_package_of_which_hosts_must_have_one_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"opd_async": "1", "torch": "2", "nvidia-nccl-cu12": "2.27.3"}

    def version(package: str) -> str:
        if package not in there:
            raise PackageNotFoundError(package)
        return there[package]

    monkeypatch.setattr("opd_async.cluster.hosting.version", version)
    assert versions() == there


def test_hosts_are_sorted_as_people_do() -> None:
    assert sorted(["h10", "h2", "h1", "a"], key=natural) == ["a", "h1", "h2", "h10"]
