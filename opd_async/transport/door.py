"""Who may connect: ZeroMQ CURVE on every socket, with one key pair for each role of the run.

    bound socket      curve server --- ZAP request ---> Door: is this key that of a role of the run? -> its name
    connected socket  curve client, with the key of its role and the incarnation that the launcher started

Whoever has no key of the run never completes the handshake: its messages reach nobody and it can take nobody's name. It
is counted. Without keys in the environment (a test, a measurement) sockets are open, as ZeroMQ's are.

    loop                         waits for                       unblocked by
    zap                          a peer that has shown its key   a role, a stranger
    monitor, of each bound one   a failed handshake              a stranger
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from opd_async.keys import RunKeys, incarnation
from opd_async.transport.arriving import next_message

log = logging.getLogger(__name__)

ZAP_ADDRESS = "inproc://zeromq.zap.01"
DOMAIN = b"opd_async"
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
LOUD_STRANGERS = 3
"""Of each socket the first few are logged: a stranger that tries for ever would fill the log."""
MAX_SERVERS = 16
HANDSHAKE_MS = 60_000
"""Twice as long as a client waits: one that this process is too slow for gives up by itself, and tries again, where a
connection that is closed means that its key was refused (`handshakes.py`)."""


@dataclass(frozen=True, slots=True)
class Passport:
    """What a connecting socket shows: the key of `name`, and which start of that role it is."""

    name: str
    keys: RunKeys
    incarnation: str

    @classmethod
    def of_environment(cls, name: str) -> Passport | None:
        """That of this process as role `name`; None without a launcher."""
        keys = RunKeys.of_environment()
        return None if keys is None else cls(name, keys, incarnation())

    @property
    def routing_id(self) -> bytes:
        """The name under which a ROUTER knows the socket: new for each incarnation, so that no two can meet in it."""
        return f"{self.name}/{self.incarnation}".encode()

    def show(self, socket: zmq.Socket[Any]) -> None:
        """Make `socket` a CURVE client; before it connects."""
        secret = self.keys.secret(self.name)
        socket.curve_serverkey = public(self.keys.secret(SERVER))
        socket.curve_publickey, socket.curve_secretkey = public(secret), z85.encode(secret)


SERVER = "server"
"""Whose key all bound sockets have."""


def public(secret: bytes) -> bytes:
    """The public key of a secret one, as Z85 text."""
    key: bytes = zmq.curve_public(z85.encode(secret))
    return key


class Door:
    """Lets the roles of a run into the bound sockets of one context; `keep` must run while they are used."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        names: Iterable[str],
        on_stranger: Callable[[], None] = lambda: None,
        keys: RunKeys | None = None,
    ) -> None:
        """`names`: who may connect. `keys` None takes those of the environment; if there are none the door is open."""
        self.keys = keys or RunKeys.of_environment()
        self._context = context
        self._on_stranger = on_stranger
        self._guarded: asyncio.Queue[tuple[str, zmq.asyncio.Socket]] = asyncio.Queue(MAX_SERVERS)
        self._seen: Counter[str] = Counter()
        self._monitors: list[zmq.asyncio.Socket] = []
        self._zap: zmq.asyncio.Socket | None = None
        if self.keys is not None:
            self._roles = {z85.decode(public(self.keys.secret(name))): name for name in names}
            self._zap = context.socket(zmq.REP)
            self._zap.bind(ZAP_ADDRESS)

    def guard(self, socket: zmq.asyncio.Socket, what: str) -> None:
        """Make `socket` a CURVE server that admits the run's roles only; before it binds."""
        if self.keys is None:
            return
        socket.handshake_ivl = HANDSHAKE_MS
        socket.curve_server = True
        socket.curve_secretkey = z85.encode(self.keys.secret(SERVER))
        socket.zap_domain = DOMAIN
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an answer of ours nobody is let in
        address = f"inproc://monitor/{secrets.token_hex(8)}"
        socket.monitor(address, _REFUSED)
        monitor = self._context.socket(zmq.PAIR)
        monitor.connect(address)
        self._monitors.append(monitor)
        self._guarded.put_nowait((what, monitor))

    async def keep(self) -> None:
        """Answer and count until cancelled."""
        if self._zap is None:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._answer(self._zap), name="zap")
            while True:
                what, monitor = await self._guarded.get()
                group.create_task(self._count(what, monitor), name=f"strangers of {what}")

    async def _answer(self, zap: zmq.asyncio.Socket) -> None:
        while True:
            version, request, _domain, _address, _identity, mechanism, *credentials = await next_message(zap)
            name = self._roles.get(credentials[0]) if mechanism == b"CURVE" and credentials else None
            status, text = (b"400", b"no key of this run") if name is None else (b"200", b"OK")
            await zap.send_multipart([version, request, status, text, (name or "").encode(), b""])

    async def _count(self, what: str, monitor: zmq.asyncio.Socket) -> None:
        while True:
            if parse_monitor_message(await next_message(monitor))["event"] & _REFUSED:
                self.refuse(what, "it has no key of this run")

    def refuse(self, what: str, reason: str) -> None:
        """Count a stranger at `what`; the first few are logged with the reason."""
        self._on_stranger()
        self._seen[what] += 1
        if self._seen[what] <= LOUD_STRANGERS:
            more = "; further ones are only counted" if self._seen[what] == LOUD_STRANGERS else ""
            log.warning("refused a stranger at %s: %s%s", what, reason, more)

    def close(self) -> None:
        """Close what the door has opened; after the sockets that it guards."""
        for socket in (*self._monitors, *([self._zap] if self._zap else [])):
            socket.close(linger=0)


def sender_of(frame: zmq.Frame) -> str | None:
    """Whose key the connection of a received frame has shown; None on an open socket."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return None
