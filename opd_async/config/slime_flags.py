"""The launcher's options of distillation: slime's names, each standing for a key of the topology's `opd`.

    --use-opd --opd-type sglang  ->  opd.use_opd=true opd.type=sglang  ->  over the file's values

An option that is not given leaves the file's value, so none has a default here; the schema's defaults are slime's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from opd_async.config.learning import OpdType

_KEYS = {
    "use_opd": "opd.use_opd",
    "opd_type": "opd.type",
    "opd_kl_coef": "opd.kl_coef",
    "opd_teacher_load": "opd.teacher_load",
    "opd_teacher_ckpt_step": "opd.teacher_ckpt_step",
}


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


def opd_overrides(arguments: argparse.Namespace) -> list[str]:
    """The options that were given as overrides of the topology, `key=value` with YAML values."""
    given = [(key, getattr(arguments, name)) for name, key in _KEYS.items()]
    return [f"{key}={_yaml(value)}" for key, value in given if value is not None]


def _yaml(value: object) -> str:
    """JSON is YAML; a path goes in as text."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
