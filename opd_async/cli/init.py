"""`opd init`: a topology for two models and a file of prompts, checked, and short because all sizes are left open."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from opd_async.checks.inputs import examine
from opd_async.cli.commands import DEFAULT_TOPOLOGY, in_words
from opd_async.data.hub_data import is_data_set, name_of
from opd_async.errors import InputError
from opd_async.telemetry.terminal import show

RESPONSE = 512
STEPS = 100
_TEXT = """\
# Made by `opd init`. Every key: docs/topology.md. Sizes that are left out are chosen: `opd check` prints them.
# Engines and learner run on the CPU of this machine; docs/sglang.md says what to write for GPUs.

name: {name}

models:
  student:
    path: {student}
  teacher:
    path: {teacher}

data:
  train:
{train}
{held_out}
rollout:
  sampling:
    max_response_tokens: {response}   # the longest response; it is cut there

schedule:
  steps: {steps}
  tokens_per_step: 4096       # more is steadier and slower
  max_staleness: 1            # no trained token is more than one optimizer step old

learner:
  optimizer:
    lr: 1.0e-5                # models below a billion weights take up to ten times as much
    warmup_steps: {warmup}

opd:
  loss: jsd_topk              # whole distributions are compared: docs/learning.md
  topk: 16                    # the teacher's most likely tokens, and the rest as one

checkpoint:
  every_steps: 50
{evaluation}"""
_HELD_OUT = """\
  held_out:                   # {what} before and after training
{prompts}
"""
_JUDGES = {
    "answer": ("prompts with labels: the share of right responses", ""),
    "teacher": (
        "prompts without labels: the distance to the teacher",
        "\nevaluation:\n  judge: teacher              # docs/data.md#evaluation-sets has others, and several sets\n",
    ),
}
"""By judge: what the held-out prompts are for, and what the topology says of it."""
_NOT_WRITTEN = (
    "\nno topology was written; --response, --prompt-key, --label-key and --judge teacher are what `opd init` has for "
    "these keys"
)


def make_text(arguments: argparse.Namespace) -> str:
    """The topology that the arguments of `opd init` describe."""
    what, evaluation = _JUDGES[arguments.judge]
    held_out = ""
    if arguments.held_out is not None:
        held_out = _HELD_OUT.format(what=what, prompts=_prompts(arguments, arguments.held_out))
    return _TEXT.format(
        name=arguments.name,
        student=_written(arguments.student),
        teacher=_written(arguments.teacher),
        train=_prompts(arguments, arguments.train),
        held_out=held_out,
        evaluation=evaluation if held_out else "",
        response=arguments.response,
        steps=arguments.steps,
        warmup=min(10, arguments.steps // 10),
    )


def _prompts(arguments: argparse.Namespace, path: Path) -> str:
    """The keys of a section of prompts, a line each."""
    name = f"hf://{name_of(path)}" if is_data_set(path) else str(path)
    keys = {"path": name, "prompt_key": arguments.prompt_key, "label_key": arguments.label_key}
    return "\n".join(f"    {key}: {_written(value)}" for key, value in keys.items() if value is not None)


def _written(value: Path | str) -> str:
    """A path or a name as YAML takes it, whatever it is made of."""
    return json.dumps(str(value), ensure_ascii=False)


@in_words
def init(arguments: argparse.Namespace) -> None:
    """`opd init`: write the topology and check it; what cannot run is not left behind."""
    out: Path = arguments.output
    if out.exists():
        raise InputError(f"{out} exists already; remove it, or give another name with --output")
    try:
        out.write_text(make_text(arguments), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; give another name with --output") from None
    try:
        examine(out, (), show, details=True)
    except InputError as error:
        out.unlink()
        raise InputError(f"{error}{_NOT_WRITTEN}") from None
    except BaseException:
        out.unlink()
        raise
    show(f"next: opd run{'' if out == Path(DEFAULT_TOPOLOGY) else f' {out}'}")
