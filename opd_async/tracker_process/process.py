"""Obey the launcher, line by line, and check before a start that a tracker can be used.

The first line is the setup, the others are {"step": row}, {"evaluation": row}, {"sample": row}, {"rewind": step} and
{"report": report}. At the end of the lines the tracker's run is closed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from opd_async.tracker_process import mlflow, tensorboard, trackio, wandb
from opd_async.tracker_process.feeder import Feeder, known_of
from opd_async.tracker_process.sink import Row, Sink

SINKS: dict[str, Callable[[Row, str | None], Sink]] = {
    "tensorboard": tensorboard.TensorBoard,
    "wandb": wandb.WeightsAndBiases,
    "mlflow": mlflow.MlFlow,
    "trackio": trackio.Trackio,
}
LOGINS = {"wandb": wandb.problem, "mlflow": mlflow.problem, "trackio": trackio.problem}
"""Of those that send: why they could not, as far as that is known without a network."""


def problem(kind: str, offline: bool) -> str | None:
    """Say why this tracker cannot be used, None if it can, as far as that is known without a network."""
    package = {"mlflow": "mlflow-skinny"}.get(kind, kind)
    try:
        importlib.import_module(kind)
    except ImportError as error:
        return f"{kind} cannot be imported ({error}); install it (pip install {package}), or name a Python that has it"
    if offline or kind == "tensorboard":
        return None
    return LOGINS[kind]()


def follow(lines: TextIO, answers: TextIO) -> int:
    """Obey the launcher until its lines end; returns the exit code: 1 if the tracker's run could not be opened."""

    def answer(kind: str, text: str) -> None:
        try:
            print(json.dumps({kind: text}), file=answers, flush=True)
        except OSError:  # the launcher is gone: what it said before is still worth sending
            return

    setup = json.loads(next(lines))
    state = Path(setup["state"])
    try:
        known, newest = known_of(state)
        feeder = Feeder(SINKS[setup["kind"]](setup, known), state, newest)
    except BaseException as error:  # the edge of the tracker's code
        answer("dead", _named(error))
        return 1
    for line in lines:
        (message,) = json.loads(line).items()
        try:
            feeder.take(*message)
        except BaseException as error:  # the same
            answer("lost", f"{_named(error)}, for {message[0]} {_number(message[1])}")
    try:
        feeder.finish()
    except BaseException as error:  # the same
        answer("lost", f"{_named(error)}, at the end")
    return 0


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _number(row: Any) -> str:
    return str(row.get("step", "") if isinstance(row, dict) else row)


def main(words: list[str]) -> int:
    """Run the command line."""
    if words[:1] == ["--check"]:
        kind, mode = words[1:]
        found = problem(kind, offline=mode == "offline")
        print("" if found is None else f"problem: {found}", flush=True)
        return 0
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print goes to the log
    return follow(sys.stdin, answers)
