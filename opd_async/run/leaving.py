"""Which host may leave a running run, and how its user asks for that, or wants it back: by a file in the run's folder.

    opd drain FOLDER HOST -> FOLDER/drain/HOST -> the next weight update -> FOLDER/drain/HOST.answer -> opd drain
    opd drain --undo      -> FOLDER/drain/HOST.undo -> the same

Whoever may write into the run's folder may ask, whatever has started the agents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from opd_async.errors import DeadlineError, InputError
from opd_async.files import storing, write_atomically
from opd_async.plan.plan import Plan, RoleKind

FOLDER = "drain"
ANSWER, UNDO = ".answer", ".undo"
LOOK_S = 0.5
GOING = (RoleKind.STUDENT_ENGINE, RoleKind.ROLLOUT)
"""What can leave: others do its work."""


def problem_of(plan: Plan, host: str, up: Collection[str], there: Collection[str]) -> str | None:
    """Say why a host cannot leave the run; None if it can. `up` are the names of the roles that are connected, `there`
    the hosts that are in the run."""
    if host not in there:
        return f"{host} is no host of this run that could leave; those are {', '.join(there) or 'none'}"
    mine = [role for role in plan.roles if role.node == host]
    if staying := [role.name for role in mine if role.kind not in GOING]:
        return f"{host} has {', '.join(staying)}; only one with student engines and rollout actors alone can leave"
    engines = {f"http://{role.host}:{role.ports['http']}" for role in mine if role.kind is RoleKind.STUDENT_ENGINE}
    for actor in plan.of_kind(RoleKind.ROLLOUT):
        if (actor in mine) != bool(engines.intersection(plan.students_of(actor))) or (
            actor in mine and not engines.issuperset(plan.students_of(actor))
        ):
            return (
                f"{actor.name} drives engines of {host} from another host, or those of another host from {host}; write "
                "rollout.replicas so that each host with student engines has an actor of its own"
            )
    names = {role.name for role in mine}
    if not [actor for actor in plan.of_kind(RoleKind.ROLLOUT) if actor.name in up and actor.name not in names]:
        return f"{host} has the only rollout actors that are there; nobody would generate"
    return None


class Request(NamedTuple):
    """A host that somebody wants to leave, or, after that, to take part again."""

    host: str
    undo: bool

    @property
    def file(self) -> str:
        """Name of the file that says so."""
        return self.host + UNDO * self.undo


def requests(run_folder: Path) -> list[Request]:
    """What somebody waits for. Looks into a folder that may be on another host: not for an event loop."""
    folder = run_folder / FOLDER
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    wanted = (name for name in names if not name.endswith(ANSWER) and not name.startswith("."))
    return [Request(name.removesuffix(UNDO), name.endswith(UNDO)) for name in wanted]


def answer(run_folder: Path, request: Request, done: bool, text: str) -> None:
    """Answer a request. Raises `StorageError`."""
    folder = run_folder / FOLDER
    with storing(folder):
        write_atomically(folder / f"{request.host}{ANSWER}", json.dumps({"done": done, "text": text}))
        (folder / request.file).unlink(missing_ok=True)


def ask(run_folder: Path, host: str, wait_s: float, undo: bool = False) -> str:
    """Ask for a host to leave, or with `undo` to come back, and wait for the answer; returns what the run says.

    Raises `InputError` when the run refuses, or there is none, and `DeadlineError` after `wait_s`.
    """
    folder = run_folder / FOLDER
    if not (run_folder / "plan.json").is_file():
        raise InputError(f"{run_folder}: no run; name the folder of one, such as runs/quickstart")
    if not host or "/" in host or host.startswith(".") or host.endswith((ANSWER, UNDO)):
        raise InputError(f"{host!r} is no name of a host; write one that the run's table of hosts has")
    request, answered = Request(host, undo), folder / f"{host}{ANSWER}"
    with storing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        answered.unlink(missing_ok=True)
        write_atomically(folder / request.file, "")
    give_up = time.monotonic() + wait_s
    while not answered.exists():
        if time.monotonic() >= give_up:
            (folder / request.file).unlink(missing_ok=True)
            raise DeadlineError(
                f"{run_folder}: no weight update has come in {wait_s:.0f} s, at which {host} could have "
                f"{'come back' if undo else 'left'}; see whether the run goes on, and give it more with --wait-s"
            )
        time.sleep(LOOK_S)
    found = json.loads(answered.read_text(encoding="utf-8"))
    if not found["done"]:
        raise InputError(found["text"])
    return str(found["text"])
