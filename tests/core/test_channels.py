"""Channels over real sockets on the loopback: order, backpressure, garbage, absent and restarted roles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest
import zmq
import zmq.asyncio
from deadlines import patience

from opd_async.errors import OpdError, RoleError
from opd_async.plan.free_ports import free_ports
from opd_async.transport import channels
from opd_async.transport.channels import ControlClient, ControlServer, Pull, Push
from opd_async.transport.messages import Failure, Hello, Lease, Stop
from opd_async.transport.wire import encode

WAIT_S = patience(20.0)


def free_address() -> str:
    return f"tcp://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"


@contextmanager
def sockets() -> Iterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def wired() -> AsyncIterator[tuple[zmq.asyncio.Context, str]]:
    """A context and a free address."""
    with sockets() as context:
        async with asyncio.timeout(WAIT_S):
            yield context, free_address()


def lease(sample_id: int, tokens: int = 3) -> Lease:
    ids = np.arange(tokens, dtype=np.int32)
    return Lease(
        sample_id=sample_id, attempt=0, prompt_id=0, kind="train", temperature=1.0, label="", prompt=ids, prefix=ids[:0]
    )


async def hello(client: ControlClient, server: ControlServer, name: str, incarnation: str) -> None:
    """Introduce a client, as roles do: from then on the server can reach it."""
    await client.send(Hello(name, incarnation))
    assert await server.receive() == (name, Hello(name, incarnation))


async def test_a_message_that_is_announced_too_early_ends_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a connection that showed a key, ZeroMQ queues the key's owner a moment before the first message."""
    read, lost = zmq.Socket.recv_multipart, iter(range(3))

    def late(socket: zmq.Socket[bytes], *args: object, **options: object) -> object:
        if next(lost, None) is not None:
            raise zmq.Again
        return read(socket, *args, **options)  # type: ignore[call-overload]

    async with wired() as (context, address):
        with Pull(context, address) as pull, Push(context, address) as push:
            monkeypatch.setattr(zmq.Socket, "recv_multipart", late)
            await push.send(lease(1))
            assert (await pull.receive()).sample_id == 1
            assert next(lost, None) is None


async def test_pushed_messages_arrive_whole_and_in_order() -> None:
    async with wired() as (context, address):
        with Pull(context, address) as pull, Push(context, address) as push:
            for number in range(50):
                await push.send(lease(number, tokens=number))
            got = [await pull.receive() for _ in range(50)]
        assert [one.sample_id for one in got] == list(range(50))
        assert [one.prompt.tolist() for one in got] == [list(range(n)) for n in range(50)]


async def test_waiting_messages_leave_others_their_turn() -> None:
    async with wired() as (context, address):
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        count = 10 * channels.RECEIVED_IN_A_ROW
        with Pull(context, address) as pull, Push(context, address) as push:
            for number in range(count):
                await push.send(lease(number))
            await asyncio.sleep(0.2)  # all of them wait in the socket now
            task = asyncio.create_task(other())
            for _ in range(count):
                await pull.receive()
            task.cancel()
        assert turns >= 10


async def test_received_arrays_outlive_the_channel() -> None:
    async with wired() as (context, address):
        with Pull(context, address) as pull, Push(context, address) as push:
            await push.send(lease(1, tokens=100_000))
            got = await pull.receive()
        assert int(got.prompt[-1]) == 99_999


async def test_malformed_frames_are_counted_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    reasons: list[str] = []

    async with wired() as (context, address):
        with Pull(context, address, reasons.append) as pull:
            stranger = context.socket(zmq.PUSH)
            stranger.connect(address)
            good = encode(lease(4))
            for frames in ([b""], [b"\x00garbage"], [good[0]], [*good, b"more"], good):
                await stranger.send_multipart(frames)
            assert (await pull.receive()).sample_id == 4
            stranger.close(linger=0)
    assert len(reasons) == 4
    assert caplog.text.count("dropped a malformed message") == 4


async def test_the_control_server_survives_garbage() -> None:
    reasons: list[str] = []

    async with wired() as (context, address):
        with ControlServer(context, address, reasons.append) as server:
            stranger = context.socket(zmq.DEALER)
            stranger.routing_id = b"\xff\xfe"
            stranger.connect(address)
            await stranger.send_multipart([b"what", b"is this"])
            await stranger.send(b"")
            await stranger.send_multipart(encode(Hello("x", "1")))
            role, message = await server.receive()
            assert message == Hello("x", "1")
            assert role == "\ufffd\ufffd"
            stranger.close(linger=0)
    assert len(reasons) == 2


async def test_a_client_drops_garbage_too() -> None:
    reasons: list[str] = []

    async with wired() as (context, address):
        with (
            ControlServer(context, address) as server,
            ControlClient(context, address, "teacher-0", reasons.append) as client,
        ):
            await hello(client, server, "teacher-0", "1")
            await server._socket.send_multipart([b"teacher-0", b"garbage"])
            assert await server.send("teacher-0", Stop("over"))
            assert await client.receive() == Stop("over")
    assert len(reasons) == 1


async def test_a_full_receiver_holds_its_sender_back() -> None:
    async with wired() as (context, address):
        with Pull(context, address, high_water_mark=1) as pull, Push(context, address, high_water_mark=1) as push:
            sent = 0

            async def send_all() -> None:
                nonlocal sent
                for number in range(200):
                    await push.send(lease(number, tokens=250_000))  # larger than the kernel's buffers
                    sent += 1

            async with asyncio.TaskGroup() as group:
                group.create_task(send_all())
                first = await pull.receive()
                await asyncio.sleep(0.3)
                held_back_at = sent
                rest = [await pull.receive() for _ in range(199)]
            assert held_back_at < 150
            assert [first.sample_id, *(one.sample_id for one in rest)] == list(range(200))


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with wired() as (context, address):
        with Pull(context, address) as pull, Push(context, address) as push:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await pull.receive()
            await push.send(lease(1))
            await push.send(lease(2))
            assert [(await pull.receive()).sample_id for _ in range(2)] == [1, 2]


async def test_sending_to_an_absent_role_says_so() -> None:
    async with wired() as (context, address):
        with ControlServer(context, address) as server:
            assert not await server.send("rollout-0", Stop("nobody is there"))
            with ControlClient(context, address, "rollout-0") as client:
                await hello(client, server, "rollout-0", "1")
                assert await server.send("rollout-0", Stop("hello"))
                assert await client.receive() == Stop("hello")
            while await server.send("rollout-0", Stop("gone")):  # noqa: ASYNC110  until the socket has heard of it
                await asyncio.sleep(0.01)


async def test_roles_are_told_apart() -> None:
    async with wired() as (context, address):
        with (
            ControlServer(context, address) as server,
            ControlClient(context, address, "rollout-0") as one,
            ControlClient(context, address, "rollout-1") as two,
        ):
            await hello(one, server, "rollout-0", "1")
            await hello(two, server, "rollout-1", "2")
            await server.send("rollout-1", Stop("b"))
            await server.send("rollout-0", Stop("a"))
            assert (await one.receive(), await two.receive()) == (Stop("a"), Stop("b"))
            await two.send(Failure("rollout-1", "x"))
            assert await server.receive() == ("rollout-1", Failure("rollout-1", "x"))


async def test_a_restarted_role_takes_its_name_over() -> None:
    async with wired() as (context, address):
        with ControlServer(context, address) as server, ControlClient(context, address, "teacher-0") as dead:
            await hello(dead, server, "teacher-0", "1")
            with ControlClient(context, address, "teacher-0") as alive:
                await hello(alive, server, "teacher-0", "2")
                assert await server.send("teacher-0", Stop("for the living"))
                assert await alive.receive() == Stop("for the living")


async def test_a_role_that_does_not_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not hold up the others, and what was accepted for it still arrives."""
    monkeypatch.setattr(channels, "HIGH_WATER_MARK", 2)

    async with wired() as (context, address):
        with (
            ControlServer(context, address) as server,
            ControlClient(context, address, "rollout-0") as idle,
            ControlClient(context, address, "rollout-1") as busy,
        ):
            await hello(idle, server, "rollout-0", "1")
            await hello(busy, server, "rollout-1", "2")
            accepted = 0
            with pytest.raises(RoleError, match="rollout-0 has left 2 messages unread"):
                while True:
                    await server.send("rollout-0", lease(accepted, tokens=1_000_000))
                    accepted += 1
            assert await server.send("rollout-1", Stop("you are not meant"))
            assert await busy.receive() == Stop("you are not meant")
            assert [(await idle.receive()).sample_id for _ in range(accepted)] == list(range(accepted))


async def test_a_taken_address_is_a_clear_error() -> None:
    async with wired() as (context, address):
        with (
            Pull(context, address),
            pytest.raises(OpdError, match=rf"{address}: cannot listen \(Address already in use\); free the port"),
        ):
            ControlServer(context, address)
