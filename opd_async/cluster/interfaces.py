"""Which address and which network interface of this host the others can reach.

A name that leads to loopback (Debian writes `127.0.1.1 NAME` into /etc/hosts) and an interface that does not exist are
found here, with one message each, instead of as a hang of gloo or NCCL minutes later.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

import psutil

from opd_async.errors import InputError

SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_DISCARD = 9
_ELSEWHERE = "192.0.2.1"
"""An address that belongs to nobody (RFC 5737): the way to it is the default route."""


class Face(NamedTuple):
    """What this host shows to the others."""

    interface: str
    address: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which gloo and NCCL find the interface."""
        return dict.fromkeys(SOCKET_VARIABLES, self.interface)


def faces() -> list[Face]:
    """Every IPv4 address of this host, with its interface."""
    return [
        Face(name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]


def own_face(wanted: str | None, towards: str | None = None) -> Face:
    """Choose this host's face: the `wanted` interface or network, else the one that leads `towards` an address.

    Without either it is the only one that is not loopback, or that of the default route. Raises `InputError` where
    there is no such interface, and where it is not clear which one is meant.
    """
    found = faces()
    if wanted is not None:
        return _wanted(wanted, found)
    if (address := _way_to(towards or _ELSEWHERE)) is not None:
        return next((face for face in found if face.address == address), Face("lo", address))
    outside = [face for face in found if not ipaddress.ip_address(face.address).is_loopback]
    if len(outside) == 1:
        return outside[0]
    raise InputError(
        f"cluster.interface: {socket.gethostname()} has {_listed(outside)}, and no way that says which one the other "
        "hosts are on; write one of them, or their network"
    )


def _wanted(wanted: str, found: list[Face]) -> Face:
    if "/" in wanted:
        try:
            network = ipaddress.ip_network(wanted, strict=False)
        except ValueError:
            raise InputError(f"cluster.interface: {wanted} is no network; write one such as 10.0.0.0/8") from None
        chosen = [face for face in found if ipaddress.ip_address(face.address) in network]
    else:
        chosen = [face for face in found if face.interface == wanted]
    if not chosen:
        raise InputError(
            f"cluster.interface: {socket.gethostname()} has no interface {wanted} with an IPv4 address, but "
            f"{_listed(found)}; write one that every host has, or their network"
        )
    return chosen[0]


def _listed(found: list[Face]) -> str:
    return ", ".join(f"{face.interface} ({face.address})" for face in found) or "no interface with an IPv4 address"


def _way_to(address: str) -> str | None:
    """The address of this host on the way to another; None where no way leads there. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _DISCARD))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def resolve(place: str) -> tuple[str, int]:
    """`HOST:PORT` as address and port. Raises `InputError` for what is neither, and for a name that is this host's own
    loopback."""
    host, colon, port = place.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--join {place}: not HOST:PORT; write the launcher's host and cluster.port, as in h0:19999")
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise InputError(f"--join {place}: {host} cannot be resolved ({error.strerror}); write an address") from None
    given = host in (address, "localhost")
    if ipaddress.ip_address(address).is_loopback and not given:
        raise InputError(
            f"--join {place}: {host} is {address} here, which leads back to this host (see /etc/hosts); write the "
            "launcher's address on the network"
        )
    return str(address), int(port)
