"""Options of the launcher that say what `--plan` plans for."""

from __future__ import annotations

import argparse

from opd_async.forecast.advice import Site
from opd_async.forecast.cost_model import DEVICES, LINKS
from opd_async.forecast.lengths import parse_lengths

LENGTHS = "2000,8000,16384"


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """`--plan` and what it needs to know beside the topology."""
    group = parser.add_argument_group("planning")
    group.add_argument("--plan", action="store_true", help="predict step time, memory, the best split")
    add_site_arguments(group)


def add_site_arguments(group: argparse._ActionsContainer) -> None:
    """What is planned for."""
    group.add_argument("--device", choices=sorted(DEVICES), default="H100", help="every role's accelerator")
    group.add_argument("--link", choices=sorted(LINKS), default="NVLink", help="what weights travel over")
    group.add_argument(
        "--lengths",
        default=LENGTHS,
        metavar="L",
        help="response lengths: MEDIAN,P99,CAP, zipf:SHORTEST,EXPONENT,CAP, or a file with one length a line",
    )
    group.add_argument("--prompt-tokens", type=int, default=200, metavar="N", help="mean length of a prompt")


def site(arguments: argparse.Namespace) -> Site:
    """What the options describe. Raises `InputError` if `--lengths` cannot be read."""
    device, link = DEVICES[arguments.device], LINKS[arguments.link]
    return Site(device, link, parse_lengths(arguments.lengths), arguments.prompt_tokens)
