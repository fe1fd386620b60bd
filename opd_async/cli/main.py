"""The command `opd`: which commands there are, and what each takes.

    opd init STUDENT TEACHER PROMPTS       opd example NAME         opd schema
    opd check FILE      opd plan FILE      opd run FILE             opd completion SHELL
    opd report FOLDER   opd samples FOLDER  opd trace FOLDER        opd convert ...
    opd drain [--undo] FOLDER HOST

`opd run` is `python -m opd_async.launch --topology`, with the same options. Exit codes: 0 done; 2 the input cannot be
used and nothing was started; 1 the run failed; 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import opd_async

Handler = Callable[[argparse.Namespace], int]
"""Does what a command's arguments say; returns the exit code."""

SHELLS = ("bash", "zsh", "tcsh")
TOPOLOGY_HELP = "what to run, and where (YAML); topology.yaml, or the only YAML file here, if left out"


def _run_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import run
    from opd_async.options import add_run_arguments

    _topology(parser)
    add_run_arguments(parser)
    return run


def _check_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import check
    from opd_async.options import add_override_arguments

    _topology(parser)
    add_override_arguments(parser)
    return check


def _plan_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import plan
    from opd_async.forecast.flags import add_site_arguments
    from opd_async.options import add_override_arguments

    _topology(parser)
    add_override_arguments(parser)
    add_site_arguments(parser)
    return plan


def _report_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import report

    parser.add_argument("folder", type=Path, help="a run's folder, such as runs/quickstart")
    return report


def _samples_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import samples
    from opd_async.telemetry.samples_page import MOST, PAGE_FILE

    parser.add_argument("folder", type=Path, help="a run's folder, such as runs/quickstart; the run may be going on")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"where to write the page; {PAGE_FILE} in the folder"
    )
    parser.add_argument(
        "--most", type=_at_least_one, default=MOST, metavar="N", help=f"most responses in it ({MOST:,})"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return samples


def _trace_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import trace
    from opd_async.telemetry.trace_file import MOST_SAMPLES, TRACE_FILE

    parser.add_argument("folder", type=Path, help="a run's folder, such as runs/quickstart; the run may be going on")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"where to write it; {TRACE_FILE} in the folder")
    parser.add_argument(
        "--samples",
        type=_at_least_one,
        default=MOST_SAMPLES,
        metavar="N",
        help=f"samples in lanes of their own ({MOST_SAMPLES})",
    )
    return trace


def _drain_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import drain

    parser.add_argument("folder", type=Path, help="the folder of a run on several hosts that goes on")
    parser.add_argument("host", help="name of the host, as the run's table of hosts has it")
    parser.add_argument("--undo", action="store_true", help="let a host that was drained take part again")
    parser.add_argument(
        "--wait-s", type=_at_least_one, default=3600, metavar="S", help="how long to wait (%(default)s)"
    )
    return drain


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; write a number, at least 1")
    return int(text)


def _schema_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import schema

    return schema


def _example_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.examples import example, names

    parser.add_argument("name", nargs="?", choices=names(), help="which one; without it they are listed")
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="folder to write to; this one if absent")
    return example


def _init_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import DEFAULT_TOPOLOGY
    from opd_async.cli.init import RESPONSE, STEPS, init

    parser.add_argument("student", type=Path, help="the model that is trained: folder, name of the hub, or GGUF file")
    parser.add_argument("teacher", type=Path, help="the model that scores, likewise")
    parser.add_argument(
        "train", type=Path, metavar="PROMPTS", help="prompts to train on: JSONL, parquet, or hf://owner/name"
    )
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="prompts for evaluations")
    parser.add_argument(
        "--judge",
        choices=("answer", "teacher"),
        default="answer",
        help="who judges responses to them: their labels (answer), or the teacher, which needs none",
    )
    parser.add_argument("--prompt-key", metavar="KEY", help="key of the rows' prompts (prompt)")
    parser.add_argument("--label-key", metavar="KEY", help="key of the rows' labels (label)")
    parser.add_argument("--name", default="run", help="the run's name (run)")
    parser.add_argument("--steps", type=_at_least_one, default=STEPS, metavar="N", help=f"optimizer steps ({STEPS})")
    parser.add_argument(
        "--response",
        type=_at_least_one,
        default=RESPONSE,
        metavar="N",
        help=f"tokens of the longest response ({RESPONSE})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(DEFAULT_TOPOLOGY),
        metavar="FILE",
        help=f"file to write ({DEFAULT_TOPOLOGY})",
    )
    return init


def _no_arguments(parser: argparse.ArgumentParser) -> Handler:
    return lambda arguments: 0


def _completion_arguments(parser: argparse.ArgumentParser) -> Handler:
    from opd_async.cli.commands import completion

    parser.add_argument("shell", choices=SHELLS)
    return completion


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Handler]]] = {
    "init": ("write a topology for two models and a file of prompts, and check it", _init_arguments),
    "run": ("run a topology to its report", _run_arguments),
    "check": ("say everything that is wrong with a topology, or print its processes; start nothing", _check_arguments),
    "plan": ("predict step time, memory and the best split, without a GPU", _plan_arguments),
    "convert": ("Hugging Face folders to Megatron checkpoints and back", _no_arguments),
    "report": ("print the report of a finished run", _report_arguments),
    "samples": ("make a page of a run's responses, coloured token by token", _samples_arguments),
    "trace": ("make a timeline of a run that was traced, for ui.perfetto.dev", _trace_arguments),
    "drain": ("have a host leave a run in order, at the next weight update", _drain_arguments),
    "schema": ("print the JSON schema of topologies, for editors", _schema_arguments),
    "example": ("write an example to start from", _example_arguments),
    "completion": ("print a script that completes this command in a shell", _completion_arguments),
}
"""By name: what a command does, and what adds its arguments and returns its handler."""


def _topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=TOPOLOGY_HELP)
    parser.add_argument("--topology", type=Path, metavar="FILE", help=argparse.SUPPRESS)


class _Version(argparse.Action):
    """`--version`: the package is asked only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"opd {opd_async.__version__}")
        parser.exit()


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command `only`, or of all commands."""
    parser = argparse.ArgumentParser(prog="opd", description="Asynchronous on-policy distillation.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (what, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if only in (None, name):
            command.set_defaults(handler=add_arguments(command))
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point; ends the process with the exit code of the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), "")
    if words[:1] == ["convert"]:  # it has a parser of its own, which argparse would not let see every option
        from opd_async.cli.convert import convert

        sys.exit(convert(words[1:], prog="opd convert"))
    arguments = make_parser(command).parse_args(words)
    sys.exit(arguments.handler(arguments))


if __name__ == "__main__":
    main()
