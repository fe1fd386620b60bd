"""Who may connect: roles with a key of the run, each under its own name and in one incarnation."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio
from deadlines import patience

from opd_async.errors import RoleError
from opd_async.keys import RunKeys
from opd_async.plan.free_ports import free_ports
from opd_async.transport.channels import ControlClient, ControlServer, Pull, Push
from opd_async.transport.door import LOUD_STRANGERS, Door, Passport
from opd_async.transport.messages import Failure, Hello, Stop
from opd_async.transport.wire import encode

DEADLINE_S = patience(30.0)
KEYS = RunKeys.draw()
NAMES = ("rollout-0", "rollout-1", "rank-0")


class Scene:
    """A door, an address and how many strangers it has refused."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.context = context
        self.address = f"tcp://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
        self.strangers = 0
        self.news = asyncio.Event()
        self.door = Door(context, NAMES, self._refused, KEYS)

    def _refused(self) -> None:
        self.strangers += 1
        self.news.set()

    def passport(self, name: str, keys: RunKeys = KEYS, incarnation: str = "1") -> Passport:
        return Passport(name, keys, incarnation)

    def client(self, name: str, passport: Passport | None) -> ControlClient:
        return ControlClient(self.context, self.address, name, passport=passport)

    async def refused(self, count: int) -> None:
        """Return once so many were refused."""
        while self.strangers < count:
            self.news.clear()
            await self.news.wait()


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    context = zmq.asyncio.Context()
    made = Scene(context)
    keeper = asyncio.create_task(made.door.keep())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield made
    finally:
        keeper.cancel()
        made.door.close()
        context.destroy(linger=0)


STRANGERS: dict[str, Callable[[Scene], Passport | None]] = {
    "no key": lambda made: None,
    "keys of another run": lambda made: made.passport("rollout-0", RunKeys.draw()),
    "a name that is not in the plan": lambda made: made.passport("rollout-7"),
}


@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_stranger_reaches_nobody_and_is_counted(kind: str) -> None:
    async with scene() as made:
        server = ControlServer(made.context, made.address, door=made.door, expected=lambda name: "1")
        own = made.client("rollout-0", made.passport("rollout-0"))
        await own.send(Hello("rollout-0", "1"))
        assert (await server.receive())[0] == "rollout-0"
        stranger = made.client("rollout-0", STRANGERS[kind](made))
        await stranger.send(Failure("rollout-0", "a stranger's words"))
        await made.refused(1)
        await own.send(Stop("mine"))
        assert await server.receive() == ("rollout-0", Stop("mine"))  # and nothing of the stranger before it
        assert await server.send("rollout-0", Stop("yours"))
        assert await own.receive() == Stop("yours")  # its name is its own still
        for channel in (stranger, own, server):
            channel.close()


@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_role_without_the_key_is_told(kind: str) -> None:
    async with scene() as made:
        with (
            ControlServer(made.context, made.address, door=made.door) as server,
            made.client("rollout-0", made.passport("rollout-0")) as own,
            made.client("rollout-0", STRANGERS[kind](made)) as stranger,
        ):
            waits_ms = [channel._socket.handshake_ivl for channel in (own, server)]
            assert waits_ms[0] < waits_ms[1], "a server that is slow must not look like one that refuses"
            known = asyncio.create_task(own.refused())
            with pytest.raises(RoleError, match=rf"^{made.address[6:]} does not let rollout-0 in: it has the keys of"):
                await stranger.refused()
            assert not known.done()
            known.cancel()


async def test_what_is_no_zeromq_at_all_reaches_nobody() -> None:
    async with scene() as made:
        with Pull(made.context, made.address, door=made.door) as pull:
            port = int(made.address.rsplit(":", 1)[1])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n" * 9)
            await writer.drain()
            with Push(made.context, made.address, passport=made.passport("rollout-1")) as push:
                await push.send(Stop("mine"))
                assert await pull.receive_from() == ("rollout-1", Stop("mine"))
            writer.close()


async def test_a_silent_connection_holds_nobody_up() -> None:
    async with scene() as made:
        with Pull(made.context, made.address, door=made.door) as pull:
            host, port = made.address.removeprefix("tcp://").split(":")
            passport = made.passport("rollout-0")
            with (
                socket.create_connection((host, int(port))),
                Push(made.context, made.address, passport=passport) as push,
            ):
                await push.send(Stop("mine"))
                assert await pull.receive_from() == ("rollout-0", Stop("mine"))


async def test_a_role_speaks_for_itself_and_in_the_incarnation_that_was_started() -> None:
    current = {"rollout-0": "2", "rollout-1": "1"}

    async with scene() as made:
        server = ControlServer(made.context, made.address, door=made.door, expected=current.get)
        old = made.client("rollout-0", made.passport("rollout-0"))
        await old.send(Failure("rollout-0", "I am dead"))
        new = made.client("rollout-0", made.passport("rollout-0", incarnation="2"))
        await new.send(Hello("rollout-0", "2"))
        assert (await server.receive())[1] == Hello("rollout-0", "2")
        impostor = made.context.socket(zmq.DEALER)  # a role of the run under another's name
        impostor.routing_id = b"rollout-0"
        made.passport("rollout-1").show(impostor)
        impostor.connect(made.address)
        await impostor.send_multipart(encode(Failure("rollout-0", "not me")))
        nameless = made.context.socket(zmq.DEALER)
        made.passport("rollout-1").show(nameless)
        nameless.routing_id = b"\xff\xfe"
        nameless.connect(made.address)
        await nameless.send_multipart(encode(Failure("rollout-0", "not me")))
        while made.strangers < 3:  # `receive` looks at claims
            await new.send(Stop("mine"))
            assert await server.receive() == ("rollout-0", Stop("mine"))
        for each in (impostor, nameless):
            each.close(linger=0)
        for channel in (old, new, server):
            channel.close()


async def test_without_a_launcher_the_first_claimant_has_a_name() -> None:
    async with scene() as made:
        with ControlServer(made.context, made.address, door=made.door) as server:
            first = made.client("rank-0", made.passport("rank-0"))
            await first.send(Hello("learner-0", "1"))
            assert (await server.receive())[0] == "rank-0"
            second = made.client("rank-0", made.passport("rank-0", incarnation="2"))
            await second.send(Hello("learner-0", "2"))
            await asyncio.sleep(0.1)
            await first.send(Stop("mine"))
            while made.strangers < 1:
                role, message = await server.receive()
                assert (role, message) == ("rank-0", Stop("mine"))
                await first.send(Stop("mine"))
            assert await server.send("rank-0", Stop("yours")) and await first.receive() == Stop("yours")
            first.close()
            second.close()


async def test_only_the_first_strangers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with scene() as made:
        for _ in range(100):
            made.door.refuse("a socket", "a reason")
    assert len(caplog.records) == LOUD_STRANGERS and "only counted" in caplog.records[-1].message
