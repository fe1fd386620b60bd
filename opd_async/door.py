"""Runs from Python: the command's way from a topology to its report, without the command.

    Topology -> checks, prompts, models -> plan -> run folder -> Lifecycle -> Report

Nothing is installed that outlives a run: no logging, no event loop policy, no signal handler. Every error that the
command prints is raised instead.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from opd_async.checks.inputs import examine_source
from opd_async.cluster.hosting import hosted
from opd_async.config.topology import Topology
from opd_async.config.topology_file import TopologySource
from opd_async.config.yaml_source import YamlDocument
from opd_async.errors import InputError
from opd_async.freed_memory import give_back_regularly
from opd_async.plan.plan import Plan
from opd_async.process import raise_cause
from opd_async.run.closing import finish
from opd_async.run.fingerprints import fingerprints
from opd_async.run.inputs import Inputs
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import RunFolder, prepare
from opd_async.run.uploads import settle
from opd_async.signals import Signals, stop_signals
from opd_async.telemetry.report import Report

Say = Callable[[str], None]


def run(topology: Topology, *, resume: bool = False, overwrite: bool = False, say: Say = print) -> Report:
    """Run a topology to its end and return the report, from a script or a thread.

    `resume` goes on from the run's last checkpoint, `overwrite` removes an earlier run of this name first; `say` gets
    the lines that the command would print. In the main thread, Ctrl-C and SIGTERM save and end the run as they do for
    the command: `InterruptedRun`; elsewhere signals are left alone. Raises `InputError` for everything that is wrong
    before a start, another `OpdError` if the run fails, and `RuntimeError` inside a running event loop, where
    `run_async` is what to write.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError("run() was called inside a running event loop; write `await run_async(...)` there")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        signals = Signals()
        give_back_regularly(runner.get_loop())
        with raise_cause(), _stopped_by_signals(runner.get_loop(), signals):
            return runner.run(_run(topology, resume, overwrite, say, signals))


async def run_async(topology: Topology, *, resume: bool = False, overwrite: bool = False, say: Say = print) -> Report:
    """As `run`, inside a running event loop, such as that of a notebook. Signals are left alone.

    On cancel: every process of the run is stopped at once; what the last checkpoint holds can be resumed.
    """
    with raise_cause():
        return await _run(topology, resume, overwrite, say, Signals())


async def _run(topology: Topology, resume: bool, overwrite: bool, say: Say, signals: Signals) -> Report:
    # reading prompts takes seconds, during which the caller's loop has other things to do
    topology, inputs = await asyncio.to_thread(check, topology, say)
    return await carry_through(topology, inputs, say, signals, resume=resume, overwrite=overwrite)


async def carry_through(
    topology: Topology,
    inputs: Inputs,
    say: Say,
    signals: Signals,
    *,
    resume: bool,
    overwrite: bool,
    change_lr: bool = False,
    on_folder: Callable[[Path], None] = lambda folder: None,
) -> Report:
    """Run a checked topology to its end, on one host or on several; raises as `run`.

    `on_folder` is told of the run's folder once it is this process's. On cancel: as `run_async`.
    """
    with ExitStack() as claims:
        async with hosted(topology, claims, say) as (plan, supervise):
            found = await asyncio.to_thread(fingerprints, topology, inputs.prompts, inputs.held_out, inputs.completions)
            await settle(topology, plan.run_folder, say, resume)
            preparing = asyncio.to_thread(prepare, plan, resume, overwrite, found, change_lr)
            with await _prepared(preparing) as folder:
                on_folder(folder.path)
                lifecycle = Lifecycle(plan, inputs, say, signals, folder.checkpoint, supervise=supervise)
                return await _live(lifecycle, plan, say)


async def _prepared(preparing: Coroutine[Any, Any, RunFolder]) -> RunFolder:
    """The run's folder, which is taken in a thread: verifying a checkpoint reads all of it.

    On cancel: the folder is let go of once the thread has it.
    """
    task = asyncio.create_task(preparing)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_release)
        raise


def _release(preparing: asyncio.Task[RunFolder]) -> None:
    if not preparing.cancelled() and preparing.exception() is None:
        preparing.result().release()


async def _live(lifecycle: Lifecycle, plan: Plan, say: Say) -> Report:
    report = await lifecycle.run()
    # drawing the learning curve takes a second
    await asyncio.to_thread(finish, report, lifecycle, plan, say)
    return report.model_copy(update={"folder": plan.run_folder})


def check(topology: Topology, say: Say) -> tuple[Topology, Inputs]:
    """The topology and what it names, with nothing wrong in it; `InputError` lists everything that is."""
    if not isinstance(topology, Topology):
        raise InputError(f"run: a Topology was expected, not {type(topology).__name__}; write Topology.load(path)")
    return examine_source(TopologySource("topology", YamlDocument({}), topology=topology), say)


@contextmanager
def _stopped_by_signals(loop: asyncio.AbstractEventLoop, signals: Signals) -> Iterator[None]:
    """Let signals stop the run, in the main thread; what they did before is put back at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    loop.call_soon(partial(signals.install, loop))
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
