"""What the command line asks for: read, check, plan, run, report.

arguments -> topology -> prompts, models -> plan -> run folder -> Lifecycle -> report, learning curve
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import uvloop

from opd_async.checks.inputs import examine, ready_to_plan
from opd_async.config.slime_flags import opd_overrides
from opd_async.config.topology import Topology
from opd_async.door import carry_through
from opd_async.errors import InputError, OpdError
from opd_async.forecast.advice import plan_text
from opd_async.forecast.flags import site
from opd_async.freed_memory import give_back_regularly
from opd_async.options import add_run_arguments
from opd_async.plan.placement import describe_hosts
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import describe_plan, make_plan
from opd_async.process import configure_logging, known, leaves, report_failure
from opd_async.run.closing import InterruptedRun, finish
from opd_async.run.fingerprints import fingerprints
from opd_async.run.inputs import Inputs
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import prepare
from opd_async.run.uploads import settle
from opd_async.signals import Signals, answered
from opd_async.telemetry.report import Report
from opd_async.telemetry.terminal import Terminal, show

Say = Callable[[str], None]
"""Print a line, or several."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 for what it does not know."""
    parser = argparse.ArgumentParser(prog="python -m opd_async.launch", description="Run an on-policy distillation.")
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="what to run, and where (YAML)")
    add_run_arguments(parser)
    return parser.parse_args(argv)


async def conduct(lifecycle: Lifecycle, signals: Signals) -> Report:
    """Run with the signals taken over. On cancel: as a second signal, every role is stopped."""
    signals.install(asyncio.get_running_loop())
    return await lifecycle.run()


def launch(arguments: argparse.Namespace, terminal: Terminal | None = None) -> None:
    """Everything that the command line asks for; raises `OpdError`."""
    say = show if terminal is None else terminal.say
    overrides = [*arguments.set, *opd_overrides(arguments)]
    for setting in arguments.set:
        if (key := setting.partition("=")[0].strip()).endswith("api_key"):
            raise InputError(
                f"--set {key}: every process of this machine can read it in the command line; write it into the file"
            )
    if arguments.plan:
        topology, prompt_tokens = ready_to_plan(arguments.topology, overrides, say)
        say(plan_text(topology, site(arguments, prompt_tokens)))
        if not topology.on_one_host:
            say(f"\n{describe_hosts(topology)}")
        return
    topology, inputs = examine(arguments.topology, overrides, say, details=arguments.dry_run)
    if not topology.on_one_host:
        if arguments.dry_run:
            say(describe_hosts(topology))
        else:
            execute_on_hosts(topology, inputs, arguments, terminal)
        return
    with ExitStack() as claims:
        plan = make_plan(topology, claims)
        if arguments.dry_run:
            say(describe_plan(plan))
        else:
            execute(plan, inputs, arguments, terminal)


def execute(plan: Plan, inputs: Inputs, arguments: argparse.Namespace, terminal: Terminal | None = None) -> None:
    """Run the plan to its end; raises `InterruptedRun` behind the report when a signal has ended it."""
    say = show if terminal is None else terminal.say
    found = fingerprints(plan.topology, inputs.prompts, inputs.held_out, inputs.completions)
    asyncio.run(settle(plan.topology, plan.run_folder, say, arguments.resume))
    with prepare(plan, arguments.resume, arguments.overwrite, found, arguments.change_lr) as folder:
        if terminal is not None:
            terminal.keep_in(folder.path / "logs" / "launcher.log")
        signals = Signals()
        lifecycle = Lifecycle(plan, inputs, say, signals, folder.checkpoint)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            give_back_regularly(runner.get_loop())
            report = runner.run(conduct(lifecycle, signals))
        with answered("stopped by a signal while the report was written\n"):
            finish(report, lifecycle, plan, say)


def execute_on_hosts(
    topology: Topology, inputs: Inputs, arguments: argparse.Namespace, terminal: Terminal | None = None
) -> None:
    """Run the topology on several hosts to its end; raises as `execute`."""
    say = show if terminal is None else terminal.say
    signals = Signals()

    def started(folder: Path) -> None:
        if terminal is not None:
            terminal.keep_in(folder / "logs" / "launcher.log")
        signals.install(asyncio.get_running_loop())

    work = carry_through(
        topology,
        inputs,
        say,
        signals,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        change_lr=arguments.change_lr,
        on_folder=started,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def command(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    return carry_out(parse_arguments(argv))


def carry_out(arguments: argparse.Namespace) -> int:
    """Do what has been read from a command line; returns the exit code."""
    with Terminal() as terminal:
        configure_logging("launch", stream=terminal.errors)
        try:
            launch(arguments, terminal)
        except Exception as error:  # the edge of the process: every error becomes an exit code
            return explain(error, terminal)
    return 0


def explain(error: BaseException, terminal: Terminal) -> int:
    """Say why the run ended, with line breaks where the message has them; returns the exit code."""
    causes = [known(cause) for cause in leaves(error)]
    expected = [cause for cause in causes if isinstance(cause, OpdError)]
    if len(expected) != len(causes):
        return report_failure(error)
    for message in dict.fromkeys(str(cause) for cause in expected):
        terminal.complain(message if isinstance(expected[0], InterruptedRun) else f"error: {message}")
    return expected[0].exit_code
