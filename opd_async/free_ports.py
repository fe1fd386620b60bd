"""Ports that a process may still bind in a minute.

The kernel gives out ports from 32768 on (Linux' default) to every outgoing connection, so a port from there that is
free now is easily taken before its role has started. These are drawn at random from below.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

CANDIDATES = range(20000, 32000)
TRIES = 500


def free_ports(host: str, count: int) -> list[int]:
    """`count` different ports that are free on `host` at this moment. Raises `OSError` when there are not enough."""
    chosen: list[int] = []
    # a source of its own: two runs with the same seed must not want the same ports
    draws = random.SystemRandom()
    with ExitStack() as stack:
        for _ in range(TRIES + count):
            if len(chosen) == count:
                return chosen
            # sockets stay open until the last port is known, so that no port is given out twice
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                listener.bind((host, draws.choice(CANDIDATES)))
            except OSError as error:
                last = error
                continue
            chosen.append(listener.getsockname()[1])
    raise last
