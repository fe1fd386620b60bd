"""The kinds of faults by name, the roles that each needs, and how often it is thrown."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cuts
import faults
import hangs
from live import Live
from outsiders import OUTSIDERS

ROLES = ("rollout", "teacher", "student-engine", "teacher-engine", "intake", "learner")
QUICK, SOON = 8, 3
"""How often kinds come that cost seconds, or one process that is loaded again; others cost half a minute."""


class Kind(NamedTuple):
    """A kind of fault, what a run must have for it, and how often it comes while each other kind comes once."""

    name: str
    act: Callable[[Live, random.Random], None]
    roles: tuple[str, ...] = ()
    often: int = 1


def _of_processes() -> list[Kind]:
    found = []
    for role in ROLES:
        often = {"rollout": QUICK, "teacher": QUICK, "teacher-engine": SOON}.get(role, 1)
        for number, name in ((signal.SIGKILL, f"kill -9 {role}"), (signal.SIGTERM, f"SIGTERM to {role}")):
            act = partial(faults.signalled, role=role, number=number)
            found.append(Kind(name, act, (role,), often))
        found.append(Kind(f"{role} frozen for a moment", partial(hangs.frozen, role=role), (role,), QUICK))
    agent = partial(faults.signalled, role="learner", number=signal.SIGKILL, first=True)
    return [
        *found,
        Kind("kill -9 the agent of the ranks", agent),
        Kind("kill -9 two roles at once", faults.two_killed),
        Kind("kill -9 the launcher", faults.launcher_killed),
        Kind("kill -9 everything", faults.everybody_killed),
        *(Kind(f"{signal.Signals(n).name} to the launcher", partial(faults.stopped, number=n)) for n in (2, 15, 1)),
        Kind("Ctrl-C twice", faults.stopped_twice),
    ]


def _of_hangs() -> list[Kind]:
    return [
        *(Kind(f"{role} hangs", partial(hangs.hung, role=role), (role,)) for role in ROLES),
        Kind("the launcher stands still", hangs.launcher_frozen),
        Kind("slow student engine", partial(hangs.slow, role="student-engine"), ("student-engine",)),
        Kind("slow teacher engine", partial(hangs.slow, role="teacher-engine"), ("teacher-engine",)),
        Kind("somebody pauses a teacher", hangs.teacher_paused, ("teacher-engine",), SOON),
        Kind("somebody pauses a student engine", hangs.student_paused, ("student-engine",), SOON),
        Kind("a teacher's weights get another name", hangs.teacher_relabelled, ("teacher-engine",)),
        Kind("a student's weights get another name", hangs.student_relabelled, ("student-engine",), SOON),
        Kind("a student gets its first weights", hangs.student_swapped, ("student-engine",), SOON),
        Kind("another teacher", hangs.teacher_swapped, ("teacher-engine",)),
        Kind("another teacher, in silence", hangs.teacher_swapped_in_silence, ("teacher-engine",)),
        Kind("an engine of others restarts", hangs.outside_restarted, ("external",), SOON),
        Kind("an engine of others hangs for a while", hangs.outside_hung, ("external",)),
    ]


def _of_networks() -> list[Kind]:
    """Those of a network that may be cut."""
    traffic = {"students": ("student-engine",), "teachers": ("teacher-engine",), "chunks": ("teacher",)}
    every = {**traffic, "control": (), "scored": (), "batches": ()}
    return [
        *(Kind(f"{of} cut for a moment", partial(cuts.cut, of=of), roles, SOON) for of, roles in every.items()),
        Kind("everything cut for a moment", cuts.cut_all, (), SOON),
        Kind("control cut for long", partial(cuts.long_cut, of="control")),
        Kind("students cut for long", partial(cuts.long_cut, of="students"), ("student-engine",)),
        Kind("teachers cut for long", partial(cuts.long_cut, of="teachers"), ("teacher-engine",)),
    ]


def _of_disks() -> list[Kind]:
    shard, sealing = "learner/*.distcp", "complete.json"
    files = {"a shard": shard, "the frontier": "frontier.msgpack", "the marker": sealing, "the books": "ledger.json"}
    files[".metadata"] = "learner/.metadata"
    flips = {name: partial(faults.damaged, pattern=pattern, harm=faults.flip_bit) for name, pattern in files.items()}
    return [
        Kind("full disk", faults.full_disk),
        Kind("full disk for a moment", faults.full_for_a_moment),
        Kind("checkpoints cannot be written", faults.read_only),
        *(Kind(f"flipped bit in {name}", act) for name, act in flips.items()),
        Kind("shard cut short", partial(faults.damaged, pattern=shard, harm=faults.cut_short)),
        Kind("shard removed", partial(faults.damaged, pattern=shard, harm=faults.removed)),
        Kind("flipped bit, then kill -9 learner", faults.damaged_under_way),
        Kind("half a row of metrics.jsonl", partial(faults.half_a_row, name="metrics.jsonl")),
        Kind("half a row of trained.jsonl", partial(faults.half_a_row, name="trained.jsonl")),
        Kind("half a checkpoint", faults.leftover),
    ]


def kinds(cuttable: bool = True) -> tuple[Kind, ...]:
    """Every kind of fault; without cuts where the network may not be cut."""
    strangers = [Kind(f"stranger: {name}", partial(faults.outsider, name=name), (), QUICK) for name in OUTSIDERS]
    networks = _of_networks() if cuttable else []
    return (*_of_processes(), *_of_hangs(), *networks, *_of_disks(), *strangers)
