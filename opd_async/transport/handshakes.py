"""Whether the other side lets a CURVE client in: ZeroMQ by itself tells it nothing, and would try for ever.

    wrong             what the client sees
    its own key       EVENT_HANDSHAKE_FAILED_AUTH
    the other's key   the connection breaks in each handshake
    one has no key    EVENT_HANDSHAKE_FAILED_PROTOCOL, once: ZeroMQ gives up
    nothing           the handshake times out: who stands still lets nobody in, and refuses nobody

A connection that was let in once may break as it likes: that is for heartbeats and leases to judge.
"""

from __future__ import annotations

import errno
import secrets

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from opd_async.transport.arriving import next_message

FAILURES = 3
"""A connection may break in the middle of a handshake; so many in a row, before any that succeeds, are no accident."""
BROKEN = (errno.EPIPE, errno.ECONNRESET)
"""What a failure without detail says where the other side has closed the connection; not so where time ran out."""
FINAL = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | FINAL


class Handshakes:
    """Those of one connecting socket; made before it connects."""

    def __init__(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket) -> None:
        events = f"inproc://handshakes/{secrets.token_hex(8)}"
        socket.monitor(events, FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._events = context.socket(zmq.PAIR)
        self._events.connect(events)

    async def refused(self) -> None:
        """Return once the other side has refused the key. On cancel: what was seen so far is forgotten."""
        failures, known = 0, False
        while True:
            seen = parse_monitor_message(await next_message(self._events))
            event = seen["event"]
            known = known or event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            closed = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and seen["value"] in BROKEN
            failures = failures + 1 if closed else 0
            if event & FINAL or (failures >= FAILURES and not known):
                return

    def close(self) -> None:
        """Listen no more; after the socket."""
        self._events.close(linger=0)
