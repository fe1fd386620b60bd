"""Ports of servers that a test starts, or starts again: nobody else draws one while it is not listened to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from opd_async.plan.free_ports import free_ports


@contextmanager
def claimed_port() -> Iterator[int]:
    """A free port of this host, claimed for as long as the block lasts."""
    with ExitStack() as claims:
        (port,) = free_ports("127.0.0.1", 1, claims)
        yield port
