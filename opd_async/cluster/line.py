"""The line between the launcher and the agents of its hosts: messages of `transport.messages.agents`, behind CURVE.

    launcher   ROUTER, one Door for all agents       agent   DEALER, a new socket for each incarnation

Who has not the cluster's secret is not let in. ZeroMQ tells the other side of that nothing by itself, and would wait
for ever: `AgentEnd.refused` listens for it.
"""

from __future__ import annotations

import zmq
import zmq.asyncio

from opd_async.errors import RoleError
from opd_async.keys import RunKeys
from opd_async.transport import messages as m
from opd_async.transport.channels import Channel, OnMalformed, bind
from opd_async.transport.door import Door, Passport, sender_of
from opd_async.transport.handshakes import Handshakes
from opd_async.transport.wire import encode

AGENT = "agent"
"""Whose key all agents have: which host one speaks for is for the launcher to decide."""
HANDSHAKE_MS = 5000


class LauncherEnd(Channel):
    """The launcher's end: messages come in with the route of the agent that sent them, and go out by it.

    On cancel: nothing is lost, a message that was not received stays in the socket.
    """

    def __init__(
        self, context: zmq.asyncio.Context, address: str, keys: RunKeys, on_malformed: OnMalformed = lambda text: None
    ) -> None:
        """Raises `OpdError` when nothing can listen at `address`."""
        self.door = Door(context, (AGENT,), keys=keys)
        socket = context.socket(zmq.ROUTER)
        socket.router_handover = 1
        self.door.guard(socket, address)
        bind(socket, address)
        super().__init__(socket, address, on_malformed)

    async def send(self, route: bytes, message: m.Message) -> None:
        """Send to the agent at `route`; a message to one that is gone is dropped, which its lease will tell."""
        try:
            await self._socket.send_multipart([route, *encode(message)], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return

    async def receive(self) -> tuple[bytes, m.Message]:
        """The next (route, message) of an agent that has shown the key."""
        while True:
            frames = await self._receive()
            message = self._decode([frame.buffer for frame in frames[1:]], AGENT)
            if message is not None and sender_of(frames[0]) == AGENT:
                return bytes(frames[0].buffer), message

    def close(self) -> None:
        """Close the socket and its door."""
        super().close()
        self.door.close()


class AgentEnd(Channel):
    """An agent's end, for one incarnation. On cancel: a message may or may not have left; none received is lost."""

    def __init__(self, context: zmq.asyncio.Context, address: str, keys: RunKeys, incarnation: str) -> None:
        passport = Passport(AGENT, keys, incarnation)
        socket = context.socket(zmq.DEALER)
        socket.routing_id = passport.routing_id
        socket.handshake_ivl = HANDSHAKE_MS
        passport.show(socket)
        self._handshakes = Handshakes(context, socket)
        socket.connect(address)
        super().__init__(socket, address)

    async def send(self, message: m.Message) -> None:
        """Send to the launcher; waits while there is no connection."""
        await self._socket.send_multipart(encode(message), copy=False)

    async def receive(self) -> m.Message:
        """The next message of the launcher."""
        while True:
            frames = await self._receive()
            message = self._decode([frame.buffer for frame in frames], self.address)
            if message is not None:
                return message

    async def refused(self) -> None:
        """Wait until the launcher has refused this agent's key: `RoleError`. Returns never."""
        await self._handshakes.refused()
        raise RoleError(
            f"{self.address.removeprefix('tcp://')} does not let this agent in: the cluster's secret differs "
            "between the two, or what listens there is no launcher of opd_async; give both the same secret"
        )

    def close(self) -> None:
        """Close the socket; what is queued may take a moment to leave."""
        super().close()
        self._handshakes.close()
