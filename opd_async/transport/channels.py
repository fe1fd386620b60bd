"""Typed ZeroMQ channels: what a role sends and receives are messages, never frames.

    class           socket   high-water mark    on cancel
    Push            PUSH     blocks `send`      the message may or may not have left
    Pull            PULL     peers' `send`      nothing is lost: the message stays in the socket
    ControlServer   ROUTER   fails `send`       nothing is lost: `send` never waits
    ControlClient   DEALER   blocks `send`      as Push and Pull

A frame that does not decode is counted by its error, logged with its peer and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio

from opd_async.errors import OpdError, RoleError, WireError
from opd_async.transport.arriving import next_message
from opd_async.transport.bounds import receive
from opd_async.transport.door import Door, Passport, sender_of
from opd_async.transport.handshakes import Handshakes
from opd_async.transport.wire import encode

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 4096
RECEIVED_IN_A_ROW = 16
"""Messages that wait already are received without a turn of the event loop; after so many the others have theirs."""
LINGER_MS = 2000
"""How long a closing socket may still deliver what it holds."""

OnMalformed = Callable[[str], None]


def _ignore(_: str) -> None:
    """Default for channels whose owner keeps no count."""


class Channel:
    """A socket with its address in messages; closes with its `with` block."""

    def __init__(self, socket: zmq.asyncio.Socket, address: str, on_malformed: OnMalformed = _ignore) -> None:
        self._socket = socket
        self.address = address
        self._on_malformed = on_malformed
        self._received = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; what is queued may take `LINGER_MS` to leave."""
        self._socket.close(linger=LINGER_MS)

    def _decode(self, frames: list[bytes | memoryview], peer: str) -> Any | None:
        try:
            return receive(frames)
        except WireError as error:
            log.warning("dropped a malformed message from %s: %s", peer, error)
            self._on_malformed(str(error))
            return None

    async def _receive(self) -> list[zmq.Frame]:
        self._received += 1
        if self._received % RECEIVED_IN_A_ROW == 0:
            await asyncio.sleep(0)
        return await next_message(self._socket, copy=False)


def bind(socket: zmq.asyncio.Socket, address: str) -> None:
    """Have `socket` listen at `address`; where it cannot it is closed, and an `OpdError` says why."""
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        reason = zmq.strerror(error.errno or 0)
        raise OpdError(f"{address}: cannot listen ({reason}); free the port or choose another") from None


class Push(Channel):
    """Sends to one receiver; `send` waits while the receiver's and its own queues are full: that is backpressure."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        high_water_mark: int = HIGH_WATER_MARK,
        passport: Passport | None = None,
    ) -> None:
        """Shows `passport` where the launcher gave keys."""
        socket = context.socket(zmq.PUSH)
        socket.sndhwm = high_water_mark
        if passport is not None:
            passport.show(socket)
        socket.connect(address)
        super().__init__(socket, address)

    async def send(self, message: Any) -> None:
        """Queue one message; arrays are not copied, so they must not be written to afterwards."""
        await self._socket.send_multipart(encode(message), copy=False)


class Pull(Channel):
    """Receives from any number of senders."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        on_malformed: OnMalformed = _ignore,
        high_water_mark: int = HIGH_WATER_MARK,
        door: Door | None = None,
    ) -> None:
        """Only roles that `door` knows may connect; anybody without one."""
        socket = context.socket(zmq.PULL)
        socket.rcvhwm = high_water_mark
        if door is not None:
            door.guard(socket, address)
        bind(socket, address)
        super().__init__(socket, address, on_malformed)

    async def receive(self) -> Any:
        """The next well-formed message; waits as long as there is none."""
        return (await self.receive_from())[1]

    async def receive_from(self) -> tuple[str | None, Any]:
        """The same with the role whose key came with it, None where there is no door."""
        while True:
            frames = await self._receive()
            sender = sender_of(frames[0])
            message = self._decode([frame.buffer for frame in frames], sender or self.address)
            if message is not None:
                return sender, message


class ControlServer(Channel):
    """One end for every role: messages go out by role name and come in with it.

    With a `door` a name belongs to the role whose key came with the connection, and to one incarnation of it: the one
    that `expected` says was started, else the first that speaks. What any other says in that name is counted by the
    door and dropped. Without a door whoever connects last has the name.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        on_malformed: OnMalformed = _ignore,
        door: Door | None = None,
        expected: Callable[[str], str | None] | None = None,
    ) -> None:
        socket = context.socket(zmq.ROUTER)
        socket.router_mandatory = 1  # a message to a role that is not there must fail, not vanish
        socket.router_handover = 1  # a role that reconnects takes its name over from a connection that is half dead
        socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
        if door is not None:
            door.guard(socket, address)
        self._door = door if door is not None and door.keys is not None else None
        self._expected = expected
        self._routes: dict[str, bytes] = {}
        bind(socket, address)
        super().__init__(socket, address, on_malformed)

    async def send(self, role: str, message: Any) -> bool:
        """Send to `role`; False when it is not connected.

        Never waits, or one role that does not read would hold up all others: `RoleError` when its queue is full.
        """
        try:
            route = self._routes.get(role, role.encode())
            await self._socket.send_multipart([route, *encode(message)], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise RoleError(f"{role} has left {HIGH_WATER_MARK} messages unread; see its log") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    async def receive(self) -> tuple[str, Any]:
        """The next (role, message)."""
        while True:
            frames = await self._receive()
            role = self._claim(frames[0])
            message = self._decode([frame.buffer for frame in frames[1:]], role) if role is not None else None
            if role is not None and message is not None:
                return role, message

    def _claim(self, identity: zmq.Frame) -> str | None:
        """The role that a connection speaks for; None if the name is not its own."""
        route = bytes(identity.buffer)
        role, _, incarnation = route.decode(errors="replace").partition("/")
        if self._door is None:
            return role
        expected = incarnation if self._expected is None else self._expected(role)
        bound = self._routes.get(role) if self._expected is None else None
        if role != sender_of(identity) or incarnation != expected or bound not in (None, route):
            self._door.refuse(self.address, f"it claims to be {role!r:.60}, which it is not, or not any more")
            return None
        self._routes[role] = route
        return role


class ControlClient(Channel):
    """A role's end of a `ControlServer`."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        role: str,
        on_malformed: OnMalformed = _ignore,
        passport: Passport | None = None,
    ) -> None:
        """Shows `passport` where the launcher gave keys, else the name alone."""
        socket = context.socket(zmq.DEALER)
        socket.routing_id = role.encode()
        if passport is not None:
            socket.routing_id = passport.routing_id
            passport.show(socket)
        socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
        self._role, self._handshakes = role, Handshakes(context, socket)
        socket.connect(address)
        super().__init__(socket, address, on_malformed)

    async def refused(self) -> None:
        """Wait until the server has refused this role's key: `RoleError`. Returns never. On cancel: ask again."""
        await self._handshakes.refused()
        where = self.address.removeprefix("tcp://")
        raise RoleError(
            f"{where} does not let {self._role} in: it has the keys of another run, or of none, "
            "or no launcher of opd_async listens there; launchers and agents start roles and hand them the keys"
        )

    def close(self) -> None:
        """Close the socket; what is queued may take `LINGER_MS` to leave."""
        super().close()
        self._handshakes.close()

    async def send(self, message: Any) -> None:
        """Queue one message for the server; it is sent once the server is there."""
        await self._socket.send_multipart(encode(message), copy=False)

    async def receive(self) -> Any:
        """The next message of the server."""
        while True:
            frames = await self._receive()
            message = self._decode([frame.buffer for frame in frames], self.address)
            if message is not None:
                return message
