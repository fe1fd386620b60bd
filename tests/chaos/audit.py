"""What a run's folder must be after any faults: counted, not asserted, so that a table can say how much is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import rows

from opd_async.errors import InputError
from opd_async.plan.plan import Plan
from opd_async.run import checkpoints
from opd_async.run.trained import TrainedStep, read_trained
from opd_async.scheduling.further import is_further


@dataclass(slots=True)
class Audit:
    """Figures of one run; everything but `tokens` and `given` should be 0."""

    tokens: int = 0
    """Sampled ones that were trained."""
    given: int = 0
    """Tokens between them that tools have said."""
    twice: int = 0
    """Tokens that lie in two ranges, of sampled tokens or of given ones."""
    lost: int = 0
    """Tokens before or between the ranges of a sample, and samples that were passed over."""
    too_old: int = 0
    """Ranges with a token beyond the bound on staleness, or of weights that did not exist yet."""
    first_too_old: str = ""
    """The first of these, in words."""
    steps_wrong: int = 0
    """Steps that are missing in trained.jsonl, there twice, or out of order."""
    left: list[str] = field(default_factory=list)
    """Processes, ports, files, shared memory that the run has left behind; damaged checkpoints."""

    @property
    def wrong(self) -> list[str]:
        """In words."""
        names = ("twice", "lost", "too_old", "first_too_old", "steps_wrong")
        return [f"{name}: {getattr(self, name)}" for name in names if getattr(self, name)] + self.left


def audit_steps(steps: Iterable[TrainedStep], bound: int | None, in_flight: int, last: int) -> Audit:
    """Count over what each step trained. `bound` on staleness, None without one; `last` is the number of steps.

    `in_flight` is how many samples may be under way, and so untrained, below the newest one.
    """
    found, ends = Audit(), dict[int, int]()
    versions: list[int] = []
    newest: dict[int, int] = defaultdict(int)
    for step in steps:
        versions.append(step.version)
        # given tokens stand between those that were sampled, and whoever took them says so in the same step
        for sample, start, end, *by in sorted([*step.ranges.tolist(), *step.given], key=lambda one: tuple(one[:2])):
            before = ends.get(sample, 0)
            found.twice += max(0, before - start)
            found.lost += max(0, start - before)
            ends[sample] = max(before, end)
            if not by:
                found.given += end - start
                continue
            oldest, youngest = by
            found.tokens += end - start
            late = bound is not None and step.version - oldest > bound
            if late or youngest > step.version or oldest < newest[sample] or oldest > youngest:
                found.too_old += 1
                found.first_too_old = found.first_too_old or (
                    f"step {step.version} trained [{start}, {end}) of sample {sample}, made by weights {oldest} to "
                    f"{youngest}, behind tokens of {newest[sample]}"
                )
            newest[sample] = youngest
    leased = [sample for sample in ends if not is_further(sample)]
    passed_over = max(leased, default=-1) + 1 - len(leased)
    found.lost += max(0, passed_over - in_flight)
    found.steps_wrong = sum(one != two for one, two in zip(versions, range(last), strict=False))
    found.steps_wrong += abs(len(versions) - last)
    return found


def audit_run(folder: Path, bound: int | None, in_flight: int) -> Audit:
    """Count over a run that has ended orderly, with a checkpoint of its last step."""
    try:
        newest = checkpoints.newest(folder / "checkpoints")
    except InputError as error:
        return Audit(left=[f"checkpoints: {error}"])
    found = audit_steps(read_trained(folder), bound, in_flight, newest.step)
    found.left += [f"damaged checkpoint: {problem}" for _, problem in newest.damaged]
    metrics = [row["step"] for row in rows(folder / "metrics.jsonl") if "evaluation" not in row]
    if metrics != sorted(set(metrics)):
        found.left.append("metrics.jsonl has steps twice or out of order")
    found.left += [f"temporary file: {path.name}" for path in folder.rglob("*.tmp")]
    return found


def left_of(family: Collection[psutil.Process]) -> list[str]:
    """Processes of a launch that are still alive."""
    alive = []
    for process in family:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(f"process {process.pid}: {' '.join(process.cmdline())[:120]}")
        except psutil.NoSuchProcess:
            continue
    return alive


def ports_in_use(plan: Plan) -> list[str]:
    """Ports of a plan on which something listens."""
    ours = {port for role in plan.roles for port in role.ports.values()} | {int(plan.control.rsplit(":", 1)[1])}
    heard = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return [f"port {one.laddr.port} of process {one.pid}" for one in heard if one.laddr.port in ours]
