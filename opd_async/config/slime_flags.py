"""The launcher's options of distillation: slime's names, each standing for a key of the topology's `opd`.

    --use-opd --opd-type sglang  ->  opd.use_opd=true opd.type=sglang  ->  over the file's values

An option that is not given leaves the file's value, so none has a default here; the schema's defaults are slime's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from opd_async.config.learning import OpdType
from opd_async.errors import InputError

_KEYS = {
    "use_opd": "opd.use_opd",
    "opd_type": "opd.type",
    "opd_kl_coef": "opd.kl_coef",
    "opd_teacher_load": "opd.teacher_load",
    "opd_teacher_ckpt_step": "opd.teacher_ckpt_step",
    "opsd_privileged_info_key": "data.privileged_key",
    "opsd_jsd_clip": "opd.divergence_clip",
}
_OF_SELF = ("opsd_privileged_info_key", "opsd_beta", "opsd_jsd_clip")


def add_opd_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the launcher's parser."""
    group = parser.add_argument_group("distillation", "keys under `opd` in the topology; what is given here wins")
    group.add_argument(
        "--use-opd", action=argparse.BooleanOptionalAction, default=None, help="distil from a teacher, or do not"
    )
    group.add_argument("--opd-type", choices=[kind.value for kind in OpdType], help="where the teacher runs")
    group.add_argument("--opd-kl-coef", type=float, metavar="C", help="weight of the distillation term (1.0)")
    group.add_argument("--opd-teacher-load", type=Path, metavar="DIR", help="megatron: the teacher's checkpoint")
    group.add_argument("--opd-teacher-ckpt-step", type=int, metavar="N", help="which step of it; the newest if absent")
    group.add_argument(
        "--opsd-privileged-info-key", metavar="KEY", help="self: what only the teacher is shown of a row"
    )
    group.add_argument(
        "--opsd-beta", type=float, metavar="B", help="self: 0 forward KL, 1 reverse KL, between: JSD (0.5)"
    )
    group.add_argument("--opsd-jsd-clip", type=float, metavar="C", help="self: most that a token counts, nats (0.05)")


def opd_overrides(arguments: argparse.Namespace) -> list[str]:
    """The options that were given as overrides of the topology, `key=value` with YAML values."""
    given = [(key, getattr(arguments, name)) for name, key in _KEYS.items()]
    own = [f"--{name.replace('_', '-')}" for name in _OF_SELF if getattr(arguments, name) is not None]
    if own and arguments.opd_type not in (None, OpdType.SELF.value):
        raise InputError(
            f"{own[0]}: given, but --opd-type is {arguments.opd_type}; remove it, or write --opd-type self"
        )
    return [f"{key}={_yaml(value)}" for key, value in given if value is not None] + _of_beta(arguments.opsd_beta)


def _of_beta(beta: float | None) -> list[str]:
    """The loss that slime's beta stands for. Raises `InputError` for one outside of 0 to 1."""
    if beta is None:
        return []
    if not 0.0 <= beta <= 1.0:
        raise InputError(f"--opsd-beta: {beta:g}; write a number from 0 (forward KL) to 1 (reverse KL)")
    if beta in (0.0, 1.0):
        return [f"opd.loss={'reverse' if beta else 'forward'}_kl_full"]
    return ["opd.loss=jsd_full", f"opd.jsd_beta={beta!r}"]


def _yaml(value: object) -> str:
    """JSON is YAML; a path goes in as text."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
