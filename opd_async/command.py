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

from opd_async.checks.reward import require_labels
from opd_async.checks.validation import validate, warnings
from opd_async.config.slime_flags import add_opd_arguments, opd_overrides
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.completions import CompletionSet, load_completions
from opd_async.data.model_folder import read_model
from opd_async.data.prompts import TeacherChoice, load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError, OpdError
from opd_async.forecast.advice import plan_text
from opd_async.forecast.flags import add_plan_arguments, site
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import describe_plan, make_plan
from opd_async.process import configure_logging, leaves, report_failure
from opd_async.run import checkpoints
from opd_async.run.closing import InterruptedRun, finish
from opd_async.run.fingerprints import fingerprints
from opd_async.run.lifecycle import Inputs, Lifecycle
from opd_async.run.run_folder import prepare
from opd_async.signals import Signals, answered
from opd_async.telemetry.report import Report
from opd_async.telemetry.terminal import Terminal

Say = Callable[[str], None]
"""Print a line, or several."""


def echo(line: str) -> None:
    """Print one line at once, also into a pipe."""
    print(line, flush=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 for what it does not know."""
    parser = argparse.ArgumentParser(prog="python -m opd_async.launch", description="Run an on-policy distillation.")
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="what to run, and where (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the topology")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run of this name first")
    parser.add_argument("--change-lr", action="store_true", help="with --resume: accept another learning rate")
    add_opd_arguments(parser)
    add_plan_arguments(parser)
    return parser.parse_args(argv)


def check(path: Path, overrides: Sequence[str], say: Say) -> Topology:
    """The topology, with nothing wrong in it; `InputError` lists everything that is."""
    topology = load_topology(path, overrides)
    if problems := validate(topology):
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{path}: {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    for warning in warnings(topology):
        say(f"warning: {warning}")
    return topology


def read_inputs(topology: Topology, say: Say = echo) -> Inputs:
    """Prompts and tokenizer, read before anything starts; `InputError` names the line that is broken."""
    tokenizer = Tokenizer(topology.models.student.path, topology.data.chat_template)
    limit = topology.max_prompt_tokens
    choice = TeacherChoice(tuple(topology.teachers) or ("",), topology.data.teacher_key)
    prompts = load_prompts(topology.data.train, tokenizer, limit, choice)
    require_labels(prompts, topology.data.train, topology.reward.kind)
    if prompts.skipped_too_long:
        say(f"{topology.data.train.path}: skipped {prompts.skipped_too_long} prompts longer than {limit} tokens")
    section, limit = topology.data.held_out, topology.max_held_out_tokens
    held_out = load_prompts(section, tokenizer, limit, choice) if section else None
    if section and held_out and topology.evaluation.judge == "reward":
        require_labels(held_out, section, topology.reward.kind)
    return Inputs(prompts, held_out, tokenizer, read_completions(topology, tokenizer, choice, say))


def read_completions(topology: Topology, tokenizer: Tokenizer, choice: TeacherChoice, say: Say) -> CompletionSet:
    """The responses that a data set gives; none where the topology names no such file."""
    section = topology.data.completions
    if section is None:
        return CompletionSet()
    limits = topology.max_prompt_tokens, topology.rollout.sampling.max_response_tokens
    ends = read_model(topology.models.student.path).eos_token_ids
    found = load_completions(section, tokenizer, limits, ends, choice)
    if found.skipped_too_long:
        say(f"{section.path}: skipped {found.skipped_too_long} rows longer than {limits[0]} + {limits[1]} tokens")
    return found


async def conduct(lifecycle: Lifecycle, signals: Signals) -> Report:
    """Run with the signals taken over."""
    signals.install(asyncio.get_running_loop())
    return await lifecycle.run()


def launch(arguments: argparse.Namespace, terminal: Terminal | None = None) -> None:
    """Everything that the command line asks for; raises `OpdError`."""
    say = echo if terminal is None else terminal.say
    overrides = [*arguments.set, *opd_overrides(arguments)]
    if arguments.plan:
        say(plan_text(load_topology(arguments.topology, overrides), site(arguments)))
        return
    topology = check(arguments.topology, overrides, say)
    inputs = read_inputs(topology, say)
    with ExitStack() as claims:
        plan = make_plan(topology, claims)
        if arguments.dry_run:
            say(describe_plan(plan))
        else:
            execute(plan, inputs, arguments, terminal)


def execute(plan: Plan, inputs: Inputs, arguments: argparse.Namespace, terminal: Terminal | None = None) -> None:
    """Run the plan to its end; raises `InterruptedRun` behind the report when a signal has ended it."""
    say = echo if terminal is None else terminal.say
    if arguments.resume:
        checkpoints.latest(plan.run_folder / "checkpoints")  # a checkpoint that was cut short is an error by itself
    found = fingerprints(plan.topology, inputs.prompts, inputs.held_out, inputs.completions)
    with prepare(plan, arguments.resume, arguments.overwrite, found, arguments.change_lr) as folder:
        if terminal is not None:
            terminal.keep_in(folder.path / "logs" / "launcher.log")
        signals = Signals()
        lifecycle = Lifecycle(plan, inputs, say, signals)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(conduct(lifecycle, signals))
        with answered("stopped by a signal while the report was written\n"):
            finish(report, lifecycle, plan, say)


def command(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    arguments = parse_arguments(argv)
    with Terminal() as terminal:
        configure_logging("launch", stream=terminal.errors)
        try:
            launch(arguments, terminal)
        except Exception as error:  # the edge of the process: every error becomes an exit code
            return explain(error, terminal)
    return 0


def explain(error: BaseException, terminal: Terminal) -> int:
    """Say why the run ended, with line breaks where the message has them; returns the exit code."""
    causes = list(leaves(error))
    expected = [cause for cause in causes if isinstance(cause, OpdError)]
    if len(expected) != len(causes):
        return report_failure(error)
    for message in dict.fromkeys(str(cause) for cause in expected):
        terminal.complain(message if isinstance(expected[0], InterruptedRun) else f"error: {message}")
    return expected[0].exit_code
