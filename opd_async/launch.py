"""Start a run: check everything, then supervise it to its report.

    python -m opd_async.launch --topology cluster.yaml [--set a.b=c ...] [--dry-run] [--resume | --overwrite]
                               [--plan --device H100 --link NVLink --lengths 2000,8000,16384]
                               [--use-opd --opd-type sglang|megatron --opd-kl-coef 1.0
                                --opd-teacher-load DIR --opd-teacher-ckpt-step N]

The options of distillation have slime's names; they stand for keys under `opd` and win over the file.

Exit codes: 0 the run did what was asked; 2 the input cannot be used and nothing was started; 1 the run failed;
130 it was stopped by a signal and can be resumed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
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
from opd_async.run.lifecycle import Inputs, InterruptedRun, Lifecycle, Signals
from opd_async.run.run_folder import prepare
from opd_async.telemetry.plots import learning_curve
from opd_async.telemetry.report import Report, render, write


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; argparse ends the process with code 2 for what it does not know."""
    parser = argparse.ArgumentParser(prog="python -m opd_async.launch", description="Run an on-policy distillation.")
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="what to run, and where (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the topology")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run of this name first")
    add_opd_arguments(parser)
    add_plan_arguments(parser)
    return parser.parse_args(argv)


def check(path: Path, overrides: Sequence[str]) -> Topology:
    """The topology, with nothing wrong in it; `InputError` lists everything that is."""
    topology = load_topology(path, overrides)
    if problems := validate(topology):
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{path}: {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    for warning in warnings(topology):
        echo(f"warning: {warning}")
    return topology


def read_inputs(topology: Topology) -> Inputs:
    """Prompts and tokenizer, read before anything starts; `InputError` names the line that is broken."""
    tokenizer = Tokenizer(topology.models.student.path, topology.data.chat_template)
    limit = topology.max_prompt_tokens
    choice = TeacherChoice(tuple(topology.teachers) or ("",), topology.data.teacher_key)
    prompts = load_prompts(topology.data.train, tokenizer, limit, choice)
    require_labels(prompts, topology.data.train, topology.reward.kind)
    if prompts.skipped_too_long:
        echo(f"{topology.data.train.path}: skipped {prompts.skipped_too_long} prompts longer than {limit} tokens")
    section, limit = topology.data.held_out, topology.max_held_out_tokens
    held_out = load_prompts(section, tokenizer, limit, choice) if section else None
    if section and held_out and topology.evaluation.judge == "reward":
        require_labels(held_out, section, topology.reward.kind)
    return Inputs(prompts, held_out, tokenizer, read_completions(topology, tokenizer, choice))


def read_completions(topology: Topology, tokenizer: Tokenizer, choice: TeacherChoice) -> CompletionSet:
    """The responses that a data set gives; none where the topology names no such file."""
    section = topology.data.completions
    if section is None:
        return CompletionSet()
    limits = topology.max_prompt_tokens, topology.rollout.sampling.max_response_tokens
    ends = read_model(topology.models.student.path).eos_token_ids
    found = load_completions(section, tokenizer, limits, ends, choice)
    if found.skipped_too_long:
        echo(f"{section.path}: skipped {found.skipped_too_long} rows longer than {limits[0]} + {limits[1]} tokens")
    return found


def echo(line: str) -> None:
    """Print one line at once, also into a pipe."""
    print(line, flush=True)


async def conduct(lifecycle: Lifecycle, signals: Signals) -> Report:
    """Run with both signals taken over."""
    signals.install(asyncio.get_running_loop())
    return await lifecycle.run()


def launch(arguments: argparse.Namespace) -> None:
    """Everything that the command line asks for; raises `OpdError`."""
    overrides = [*arguments.set, *opd_overrides(arguments)]
    if arguments.plan:
        echo(plan_text(load_topology(arguments.topology, overrides), site(arguments)))
        return
    topology = check(arguments.topology, overrides)
    inputs = read_inputs(topology)
    with ExitStack() as claims:
        plan = make_plan(topology, claims)
        if arguments.dry_run:
            echo(describe_plan(plan))
        else:
            execute(plan, inputs, arguments)


def execute(plan: Plan, inputs: Inputs, arguments: argparse.Namespace) -> None:
    """Run the plan to its end."""
    if arguments.resume:
        checkpoints.latest(plan.run_folder / "checkpoints")  # a checkpoint that was cut short is an error by itself
    with prepare(plan, arguments.resume, arguments.overwrite) as folder:
        signals = Signals()
        lifecycle = Lifecycle(plan, inputs, echo, signals)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(conduct(lifecycle, signals))
        finish(report, lifecycle, folder.path)


def finish(report: Report, lifecycle: Lifecycle, folder: Path) -> None:
    """Write report and learning curve, and print what a person wants to know."""
    ledger = lifecycle.ledger
    assert ledger is not None
    files = [("report", write(report, folder))]
    if ledger.evaluations:
        curve = folder / "learning_curve.png"
        learning_curve(curve, ledger.evaluations, ledger.teachers.get("teacher"), ledger.reverse_kl)
        files.append(("learning curve", curve))
    files += [("figures of every step", folder / "metrics.jsonl"), ("logs", folder / "logs")]
    if (folder / "export" / "config.json").is_file():
        files.append(("trained student", folder / "export"))
    commands = [
        ("more steps", f"python -m opd_async.launch --topology {folder}/topology.yaml --resume --set schedule.steps=N")
    ]
    echo(render(report, files, commands))


def main() -> None:
    """Entry point; ends the process with the exit code of the run."""
    arguments = parse_arguments()
    configure_logging("launch")
    try:
        launch(arguments)
    except Exception as error:  # the edge of the process: every error becomes an exit code
        sys.exit(explain(error))


def explain(error: BaseException) -> int:
    """Print why the run ended, with line breaks where the message has them; returns the exit code."""
    causes = list(leaves(error))
    if not all(isinstance(cause, OpdError) for cause in causes):
        return report_failure(error)
    first = next((cause for cause in causes if not isinstance(cause, InterruptedRun)), causes[0])
    for message in dict.fromkeys(str(cause) for cause in causes):
        print(message if isinstance(first, InterruptedRun) else f"error: {message}", file=sys.stderr, flush=True)
    assert isinstance(first, OpdError)
    return first.exit_code


if __name__ == "__main__":
    main()
