"""The last words of a launch: report, learning curve, what lies where, and what can be done next.

Nothing here ends a run: what cannot be written or drawn is said, and left out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from opd_async.errors import OpdError
from opd_async.plan.plan import Plan
from opd_async.run.ledger import Ledger
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import TOPOLOGY_FILE
from opd_async.run.saving import EXPORT
from opd_async.signals import EXIT_INTERRUPTED
from opd_async.telemetry.plots import learning_curve
from opd_async.telemetry.report import Report, write
from opd_async.telemetry.report_table import render
from opd_async.telemetry.samples import SAMPLES_FILE
from opd_async.telemetry.samples_page import PAGE_FILE, write_page
from opd_async.telemetry.trace import TRACE_FOLDER
from opd_async.telemetry.trace_file import TRACE_FILE, write_trace

Say = Callable[[str], None]


class InterruptedRun(OpdError):
    """The user stopped the run; the message says what is left of it."""

    exit_code = EXIT_INTERRUPTED


def finish(report: Report, lifecycle: Lifecycle, plan: Plan, say: Say) -> None:
    """Write report and learning curve, and print what a person wants to know.

    At the end raises `InterruptedRun`, or the `StorageError` that has ended the run.
    """
    saved = lifecycle.checkpointed_version()
    if report.steps or not lifecycle.interrupted:
        assert lifecycle.ledger is not None
        files = list(_files(report, lifecycle.ledger, plan.run_folder, say))
        say(render(report, files, list(_commands(plan, saved))))
    if lifecycle.unsaved is not None:
        raise lifecycle.unsaved
    if lifecycle.interrupted:
        raise InterruptedRun(f"{plan.topology.name}: {_what_is_left(report.steps, saved, plan)}")


def _what_is_left(steps: int, saved: int, plan: Plan) -> str:
    """In one sentence; it names `--resume` only where there is something to resume."""
    asked = plan.topology.schedule.steps
    if saved:
        return f"stopped by a signal, saved after step {saved} of {asked}; go on with --resume"
    if steps:
        return f"stopped by a signal before the first checkpoint, {steps} steps are lost; start afresh with --overwrite"
    return "stopped by a signal, nothing was trained; start it again with --overwrite"


def _files(report: Report, ledger: Ledger, folder: Path, say: Say) -> Iterator[tuple[str, Path]]:
    """(what it is, where) of everything that the run leaves for people."""
    try:
        yield "report", write(report, folder)
    except OSError as error:
        say(f"report.json cannot be written: {error}")
    books = ledger.books
    if books.evaluations or books.whole.steps:
        curve = folder / "learning_curve.png"
        try:
            teachers = {name: of["teacher"] for name, of in books.teachers.items() if "teacher" in of}
            learning_curve(curve, books.evaluations, teachers, ledger.reverse_kl())
            yield "learning curve", curve
        except Exception as error:  # whatever a drawing library finds: the run itself is over and done
            say(f"the learning curve cannot be drawn: {error}")
    if (folder / SAMPLES_FILE).is_file():
        try:
            write_page(folder, folder / PAGE_FILE)
            yield "responses", folder / PAGE_FILE
        except (OSError, OpdError, ValueError, LookupError) as error:  # the run itself is over and done
            say(f"the page of the responses cannot be written: {error}")
    if (folder / TRACE_FOLDER).is_dir():
        try:
            write_trace(folder, folder / TRACE_FILE)
            yield "timeline, for ui.perfetto.dev", folder / TRACE_FILE
        except (OSError, OpdError, ValueError, LookupError, TypeError) as error:  # the run itself is over and done
            say(f"the timeline cannot be written: {error}")
    yield from (("figures of every step", folder / "metrics.jsonl"), ("logs", folder / "logs"))
    if (folder / EXPORT / "config.json").is_file():
        yield "trained student", folder / EXPORT


def _commands(plan: Plan, saved: int) -> Iterator[tuple[str, str]]:
    """(what it does, command line) of what can follow, each to be pasted as it is."""
    folder, steps = plan.run_folder, plan.topology.schedule.steps
    resume = (_python(), "-m", "opd_async.launch", "--topology", str(folder / TOPOLOGY_FILE), "--resume")
    if saved >= steps:
        yield "more steps", shlex.join([*resume, "--set", f"schedule.steps={2 * steps}"])
    elif saved:
        yield "the other steps", shlex.join(resume)
    out = folder / EXPORT
    if saved and not (out / "config.json").is_file():
        out = out if not out.exists() else out / f"step_{saved:08d}"
        if not out.exists():
            convert = (_python(), "-m", "opd_async.learner.convert", "megatron-to-hf", "--checkpoint", str(folder))
            source = str(plan.topology.models.student.path)
            yield (
                "the student as it is, in Hugging Face format",
                shlex.join([*convert, "--source", source, "--out", str(out)]),
            )


def _python() -> str:
    """This interpreter, as short as it can be said from here."""
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)
