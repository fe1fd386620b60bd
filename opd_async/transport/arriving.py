"""Waiting for a socket's next message, also where the socket said that one was there and had none."""

from __future__ import annotations

import asyncio
from typing import Any

import zmq
import zmq.asyncio


async def next_message(socket: zmq.asyncio.Socket, *, copy: bool = True) -> list[Any]:
    """The frames of the next message: bytes, or `zmq.Frame` without `copy`.

    Of a connection that showed a key ZeroMQ queues the key's owner first, for itself, and only then the first message:
    a socket that is looked at in between is readable, and a read finds nothing. pyzmq hands on what the read says,
    `zmq.Again`. Nothing has been taken by then: the wait goes on.
    On cancel: nothing is lost, the message stays in the socket.
    """
    while True:
        try:
            return list(await socket.recv_multipart(copy=copy))
        except zmq.Again:
            await asyncio.sleep(0)  # pyzmq tries at once: others must have their turn
