"""What each command of `opd` does. Heavy parts are imported where they are used."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from opd_async.errors import InputError, OpdError
from opd_async.extras import need
from opd_async.signals import EXIT_INTERRUPTED, answered, unwinding
from opd_async.telemetry.terminal import show

DEFAULT_TOPOLOGY = "topology.yaml"
Handler = Callable[[argparse.Namespace], int]


def in_words(handler: Callable[[argparse.Namespace], None]) -> Handler:
    """Turn an `OpdError` into one message and its exit code."""

    @wraps(handler)
    def handled(arguments: argparse.Namespace) -> int:
        try:
            handler(arguments)
        except OpdError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0

    return handled


def topology_file(arguments: argparse.Namespace, here: Path = Path()) -> Path:
    """The topology that was named, or the one that is here. Raises `InputError` where that is not clear."""
    named = [path for path in (arguments.file, arguments.topology) if path is not None]
    if len(named) > 1:
        raise InputError(f"two topologies, {named[0]} and {named[1]}; name one")
    if named:
        return Path(named[0])
    found = sorted(here.glob("*.yaml"))
    if (default := here / DEFAULT_TOPOLOGY) in found:
        return default
    if len(found) == 1:
        return found[0]
    there = ", ".join(path.name for path in found) if found else "no .yaml file"
    raise InputError(
        f"no topology was named, and in {here.absolute()} there is {there}; name one, as in: opd check FILE"
    )


def run(arguments: argparse.Namespace) -> int:
    """`opd run`, which is `python -m opd_async.launch`."""
    with answered():
        try:
            arguments.topology = topology_file(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        from opd_async.command import carry_out

        return carry_out(arguments)


def check(arguments: argparse.Namespace) -> int:
    """`opd check`, which is `opd run --dry-run`."""
    arguments.dry_run, arguments.plan, arguments.resume, arguments.overwrite = True, False, False, False
    return run(arguments)


def plan(arguments: argparse.Namespace) -> int:
    """`opd plan`, which is `opd run --plan`."""
    arguments.dry_run, arguments.plan, arguments.resume, arguments.overwrite = False, True, False, False
    return run(arguments)


@in_words
def report(arguments: argparse.Namespace) -> None:
    """`opd report`: the table of `report.json`."""
    from pydantic import ValidationError

    from opd_async.telemetry.report import Report
    from opd_async.telemetry.report_table import render

    file = arguments.folder / "report.json" if arguments.folder.is_dir() else arguments.folder
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{file}: {reason}; a run writes it at its end, into its own folder") from None
    try:
        show(render(Report.model_validate_json(text)))
    except ValidationError as error:
        raise InputError(f"{file}: is no report of this version: {error.errors()[0]['msg']}") from None


@in_words
def samples(arguments: argparse.Namespace) -> None:
    """`opd samples`: the page of a run's responses."""
    from opd_async.telemetry.samples_page import PAGE_FILE, write_page

    out = arguments.output or arguments.folder / PAGE_FILE
    try:
        count = write_page(arguments.folder, out, arguments.most)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; give another place with --output") from None
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{arguments.folder}: its responses are not of this version ({error!r})") from None
    show(f"{count:,} responses: {out}")
    if arguments.open:
        webbrowser.open(out.resolve().as_uri())


@in_words
def trace(arguments: argparse.Namespace) -> None:
    """`opd trace`: the timeline of a run."""
    from opd_async.telemetry.trace_file import TRACE_FILE, write_trace

    out = arguments.output or arguments.folder / TRACE_FILE
    try:
        count = write_trace(arguments.folder, out, arguments.samples)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; give another place with --output") from None
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{arguments.folder}: its trace is not of this version ({error!r})") from None
    show(f"{count:,} events: {out}; open it in https://ui.perfetto.dev")


@in_words
def drain(arguments: argparse.Namespace) -> None:
    """`opd drain`: a host leaves a run, or may come back."""
    from opd_async.run.leaving import ask

    with unwinding():
        try:
            show(ask(arguments.folder, arguments.host, float(arguments.wait_s), arguments.undo))
        except KeyboardInterrupt:
            print("stopped by a signal; the run is asked no more", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)


@in_words
def schema(arguments: argparse.Namespace) -> None:
    """`opd schema`, which is `python -m opd_async.config.reference --json-schema`."""
    from opd_async.config.reference import json_schema_text

    show(json_schema_text().rstrip("\n"))


@in_words
def completion(arguments: argparse.Namespace) -> None:
    """`opd completion`: a script for the shell."""
    from opd_async.cli.main import make_parser

    show(need("shtab", "completion", "opd completion").complete(make_parser(), shell=arguments.shell))
