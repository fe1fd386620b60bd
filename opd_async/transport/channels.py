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
from opd_async.transport.wire import decode, encode

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
            return decode(frames)
        except WireError as error:
            log.warning("dropped a malformed message from %s: %s", peer, error)
            self._on_malformed(str(error))
            return None

    async def _receive(self) -> list[zmq.Frame]:
        self._received += 1
        if self._received % RECEIVED_IN_A_ROW == 0:
            await asyncio.sleep(0)
        return await self._socket.recv_multipart(copy=False)


def _bind(socket: zmq.asyncio.Socket, address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        reason = zmq.strerror(error.errno or 0)
        raise OpdError(f"{address}: cannot listen ({reason}); free the port or choose another") from None


class Push(Channel):
    """Sends to one receiver; `send` waits while the receiver's and its own queues are full: that is backpressure."""

    def __init__(self, context: zmq.asyncio.Context, address: str, high_water_mark: int = HIGH_WATER_MARK) -> None:
        socket = context.socket(zmq.PUSH)
        socket.sndhwm = high_water_mark
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
    ) -> None:
        socket = context.socket(zmq.PULL)
        socket.rcvhwm = high_water_mark
        _bind(socket, address)
        super().__init__(socket, address, on_malformed)

    async def receive(self) -> Any:
        """The next well-formed message; waits as long as there is none."""
        while True:
            frames = await self._receive()
            message = self._decode([frame.buffer for frame in frames], self.address)
            if message is not None:
                return message


class ControlServer(Channel):
    """One end for every role: messages go out by role name and come in with it."""

    def __init__(self, context: zmq.asyncio.Context, address: str, on_malformed: OnMalformed = _ignore) -> None:
        socket = context.socket(zmq.ROUTER)
        socket.router_mandatory = 1  # a message to a role that is not there must fail, not vanish
        socket.router_handover = 1  # a restarted role takes its name over from the dead one
        socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
        _bind(socket, address)
        super().__init__(socket, address, on_malformed)

    async def send(self, role: str, message: Any) -> bool:
        """Send to `role`; False when it is not connected.

        Never waits, or one role that does not read would hold up all others: `RoleError` when its queue is full.
        """
        try:
            await self._socket.send_multipart([role.encode(), *encode(message)], flags=zmq.NOBLOCK, copy=False)
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
            role = bytes(frames[0].buffer).decode(errors="replace")
            message = self._decode([frame.buffer for frame in frames[1:]], role)
            if message is not None:
                return role, message


class ControlClient(Channel):
    """A role's end of a `ControlServer`."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, role: str, on_malformed: OnMalformed = _ignore
    ) -> None:
        socket = context.socket(zmq.DEALER)
        socket.routing_id = role.encode()
        socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
        socket.connect(address)
        super().__init__(socket, address, on_malformed)

    async def send(self, message: Any) -> None:
        """Queue one message for the server."""
        await self._socket.send_multipart(encode(message), copy=False)

    async def receive(self) -> Any:
        """The next message of the server."""
        while True:
            frames = await self._receive()
            message = self._decode([frame.buffer for frame in frames], self.address)
            if message is not None:
                return message
