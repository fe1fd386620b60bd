"""Which host may leave a running run, and how its user asks for that, or wants it back: by a file in the run's folder.

    opd drain FOLDER HOST -> FOLDER/drain/HOST -> the next weight update -> FOLDER/drain/HOST.answer -> opd drain
    opd drain --undo      -> FOLDER/drain/HOST.undo -> the same

Whoever may write into the run's folder may ask, whatever has started the agents. The folder `drain` is there while a
run takes requests: who finds none is told so, and so is who waits when it goes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from opd_async.errors import DeadlineError, InputError
from opd_async.files import storing, write_atomically
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import PLAN_FILE

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


def take_requests(run_folder: Path) -> None:
    """Have a run that begins take requests; those of an earlier launch are forgotten. Raises `StorageError`."""
    forget_requests(run_folder)
    folder = run_folder / FOLDER
    with storing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)


def forget_requests(run_folder: Path) -> None:
    """Take no requests: whoever waits for an answer is told that the run is over."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


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

    Raises `InputError` when the run refuses, or is over, or there is none on several hosts, and `DeadlineError` after
    `wait_s`. Whatever ends the wait takes the request back, Ctrl-C too.
    """
    folder = run_folder / FOLDER
    if not host or "/" in host or host.startswith(".") or host.endswith((ANSWER, UNDO)):
        raise InputError(f"{host!r} is no name of a host; write one that the run's table of hosts has")
    _require_run(run_folder)
    request, answered = Request(host, undo), folder / f"{host}{ANSWER}"
    try:
        with storing(folder):
            answered.unlink(missing_ok=True)
            write_atomically(folder / request.file, "")
        found = _await_answer(folder, request, answered, wait_s)
    finally:
        (folder / request.file).unlink(missing_ok=True)
    if not found["done"]:
        raise InputError(found["text"])
    return str(found["text"])


def _require_run(run_folder: Path) -> None:
    """Raise `InputError` for a folder with no run that takes requests."""
    plan = run_folder / PLAN_FILE
    if not plan.is_file():
        raise InputError(f"{run_folder}: no run; name the folder of one, such as runs/quickstart")
    try:
        topology = Plan.model_validate_json(plan.read_bytes()).topology
    except (OSError, ValueError) as error:
        raise InputError(f"{plan}: no plan of this version can be read: {str(error).splitlines()[0]}") from None
    if topology.on_one_host:
        raise InputError(f"{run_folder}: a run on one host, which cannot leave it (cluster.backend: local)")
    if not (run_folder / FOLDER).is_dir():
        raise InputError(f"{run_folder}: the run has not started its processes yet, or is over; no host can leave it")


def _await_answer(folder: Path, request: Request, answered: Path, wait_s: float) -> Any:
    """The answer to a request. Raises `InputError` once the run is over, `DeadlineError` after `wait_s`."""
    give_up = time.monotonic() + wait_s
    while True:
        waiting = (folder / request.file).exists()  # looked at before the answer, which comes before it goes
        if answered.exists():
            return json.loads(answered.read_text(encoding="utf-8"))
        if not waiting:
            raise InputError(
                f"{folder.parent}: no answer for {request.host}: the run has ended, or somebody has taken the request "
                "back"
            )
        if time.monotonic() >= give_up:
            raise DeadlineError(
                f"{folder.parent}: no weight update has come in {wait_s:.0f} s, at which {request.host} could have "
                f"{'come back' if request.undo else 'left'}; see whether the run goes on, and give it more with "
                "--wait-s"
            )
        time.sleep(LOOK_S)
