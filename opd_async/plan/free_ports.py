"""Ports that a process may still bind in a minute.

The kernel gives out ports from 32768 on (Linux' default) to every outgoing connection, so a port from there that is
free now is easily taken before its role has started. These are drawn at random from below, and claimed: a role binds
its port seconds after the draw, or anew after it died, and until then another launcher would find it free.
"""

from __future__ import annotations

import errno
import random
import socket
from contextlib import ExitStack

CANDIDATES = range(20000, 32000)
TRIES = 500


def free_ports(host: str, count: int, claims: ExitStack | None = None) -> list[int]:
    """`count` different ports that are free on `host` at this moment and claimed by no other launcher.

    They stay claimed until `claims` is closed or this process ends; without it nothing is claimed. Raises `OSError`
    when there are not enough.
    """
    chosen: list[int] = []
    # a source of its own: two runs with the same seed must not want the same ports
    draws = random.SystemRandom()
    with ExitStack() as probes, ExitStack() as claimed:
        for _ in range(TRIES + count):
            if len(chosen) == count:
                if claims is not None:
                    claims.push(claimed.pop_all())
                return chosen
            port = draws.choice(CANDIDATES)
            try:
                # probes stay open until the last port is known, so that no port is given out twice
                probes.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)).bind((host, port))
                claimed.enter_context(_claim(port))
            except OSError as error:
                last = error
                continue
            chosen.append(port)
    raise last


def _claim(port: int) -> socket.socket:
    """A name that one process at a time can hold, in the kernel alone; `OSError` while another one does."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0opd_async/port/{port}")
    except OSError:
        claim.close()
        raise
    return claim


def unusable(host: str, port: int) -> str | None:
    """Say why nothing can listen on the port now; None if something can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As servers do: a port that only waits out an old connection is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
    return None
