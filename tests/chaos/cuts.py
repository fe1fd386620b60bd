"""Faults of the network: packets of some ports, or all, vanish for a while."""

from __future__ import annotations

import random
import time

from live import Live, hang_s

from opd_async.plan.plan import Plan

FOR_S = (0.5, 4.0)


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def ports(plan: Plan, of: str) -> list[int]:
    """The ports that carry one kind of traffic."""
    if of == "control":
        return [_port(plan.control)]
    addresses = {
        "chunks": plan.chunks,
        "scored": plan.scored,
        "batches": plan.batches,
        "students": plan.student_engines,
        "teachers": plan.teacher_engines,
    }[of]
    return [_port(address) for address in addresses]


def cut(live: Live, chance: random.Random, of: str) -> None:
    """One kind of traffic is cut for a moment: everybody waits, and goes on."""
    live.island.cut(ports(live.plan(), of))
    time.sleep(chance.uniform(*FOR_S))
    live.island.heal()
    live.alive()


def cut_all(live: Live, chance: random.Random) -> None:
    """All traffic of the machine is cut for a moment."""
    live.island.cut_all()
    time.sleep(chance.uniform(*FOR_S))
    live.island.heal()
    live.alive()


def long_cut(live: Live, _: random.Random, of: str) -> None:
    """Traffic is cut for longer than a process may be silent: those that seem dead are replaced."""
    live.settled("intake")
    live.island.cut(ports(live.plan(), of))
    time.sleep(hang_s() + 4.0)
    live.island.heal()
    live.alive()
