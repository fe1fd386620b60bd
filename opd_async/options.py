"""What the command line of a run may say: `opd run`, `opd check`, `opd plan` and `python -m opd_async.launch` alike."""

from __future__ import annotations

import argparse

from opd_async.config.slime_flags import add_opd_arguments
from opd_async.forecast.flags import add_plan_arguments


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything but the topology itself."""
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run of this name first")
    parser.add_argument("--change-lr", action="store_true", help="with --resume: accept another learning rate")
    add_override_arguments(parser)
    add_plan_arguments(parser)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """What wins over the file."""
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the topology")
    add_opd_arguments(parser)
