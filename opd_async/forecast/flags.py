"""Options of the launcher that say what `--plan` plans for."""

from __future__ import annotations

import argparse

from opd_async.forecast.advice import Site
from opd_async.forecast.devices import CPU, DEVICES, LINKS, device_named
from opd_async.forecast.lengths import parse_lengths

LENGTHS = "2000,8000,16384"
PROMPT_TOKENS = 200


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """`--plan` and what it needs to know beside the topology."""
    group = parser.add_argument_group("planning")
    group.add_argument("--plan", action="store_true", help="predict step time, memory, the best split")
    add_site_arguments(group)


def add_site_arguments(group: argparse._ActionsContainer) -> None:
    """What is planned for."""
    group.add_argument(
        "--device", choices=[*sorted(DEVICES), CPU], default="H100", help="every role's device; cpu: this host"
    )
    group.add_argument("--link", choices=sorted(LINKS), default="NVLink", help="what weights travel over")
    group.add_argument(
        "--lengths",
        default=LENGTHS,
        metavar="L",
        help="response lengths: MEDIAN,P99,CAP, zipf:SHORTEST,EXPONENT,CAP, or a file with one length a line",
    )
    group.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help=f"mean length of a prompt; that of the topology's, or {PROMPT_TOKENS} where they cannot be read",
    )


def site(arguments: argparse.Namespace, prompt_tokens: int | None) -> Site:
    """What the options describe; `prompt_tokens` is the mean of the topology's prompts, None where it is not known.

    Raises `InputError` if `--lengths` cannot be read.
    """
    device, link = device_named(arguments.device), LINKS[arguments.link]
    mean = arguments.prompt_tokens or prompt_tokens or PROMPT_TOKENS
    return Site(device, link, parse_lengths(arguments.lengths), mean)
