"""Ports are different, free, and not among those that the kernel gives to outgoing connections."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from opd_async.plan.free_ports import CANDIDATES, free_ports


def test_ports_can_be_bound_and_differ() -> None:
    ports = free_ports("127.0.0.1", 40)
    assert len(set(ports)) == 40 and set(ports) <= set(CANDIDATES)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))


def test_a_port_in_use_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    [taken, free] = free_ports("127.0.0.1", 2)
    monkeypatch.setattr("opd_async.plan.free_ports.CANDIDATES", [taken, free])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        assert free_ports("127.0.0.1", 1) == [free]
        with pytest.raises(OSError, match="in use"):
            free_ports("127.0.0.1", 2)


def test_a_claimed_port_is_free_to_bind_and_given_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers that start in one second: neither has bound anything yet when the other looks."""
    monkeypatch.setattr("opd_async.plan.free_ports.CANDIDATES", free_ports("127.0.0.1", 2))
    with ExitStack() as claims:
        [mine] = free_ports("127.0.0.1", 1, claims)
        [other] = free_ports("127.0.0.1", 1)
        assert other != mine
        with pytest.raises(OSError, match="in use"):
            free_ports("127.0.0.1", 2)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", mine))
    assert len(free_ports("127.0.0.1", 2)) == 2
