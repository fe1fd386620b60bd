"""Check that the user's own functions can be loaded, and called with the arguments that roles will pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from opd_async.config.losses import FULL_LOSSES
from opd_async.config.topology import Topology, TrainOn
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.hooks import ANY, away_from_here

LOAD_DEADLINE_S = 60.0


def hook_problems(topology: Topology) -> Iterator[str]:
    """List everything that is wrong with the user's functions, those of rewards apart.

    A process of its own loads the functions, as roles will. Nothing of them is imported here.
    """
    if topology.opd.function is not None and topology.opd.loss in FULL_LOSSES:
        yield (
            f"opd.function: opd.loss is {topology.opd.loss}, on the whole vocabulary, whose rows no function gets; "
            "write reverse_kl, or a loss on the top-k"
        )
    if topology.schedule.filter is not None and topology.schedule.train_on is TrainOn.TOKENS:
        yield "schedule.filter: chooses among finished groups, but steps take parts of them; write train_on: samples"
    yield from _endpoint_problems(topology)
    yield from _tool_problems(topology)
    hooks = {
        "data.function": (topology.data.function, ""),
        "opd.function": (topology.opd.function, "rows"),
        "schedule.filter": (topology.schedule.filter, "group"),
        "tracking.function": (topology.tracking.function, "kind,row"),
        "rollout.function": (topology.rollout.function, "session,row"),
    }
    words = [word for key, (path, given) in hooks.items() if path is not None for word in (key, path, given)]
    words += [word for path in topology.rollout.tools.functions for word in ("rollout.tools.functions", path, ANY)]
    if words:
        yield from _unloadable(words)


def _endpoint_problems(topology: Topology) -> Iterator[str]:
    if not topology.rollout.endpoint:
        return
    if topology.rollout.function is None:
        yield "rollout.endpoint: true, but no rollout.function has an agent that would ask there; name one"
    if topology.data.informs_teachers:
        yield (
            "rollout.endpoint: agents write the prompts, which data.teacher_prompt, data.privileged_key and "
            "data.contrast_prompt cannot replace; remove one of them"
        )
    try:
        tokenizer = Tokenizer(topology.models.student.path, topology.data.chat_template)
    except InputError as error:
        yield f"rollout.endpoint: {error}"
        return
    if not tokenizer.template.texts:
        yield (
            f"rollout.endpoint: {topology.models.student.path} has no chat template, which messages need; give one in "
            "data.chat_template"
        )


def _tool_problems(topology: Topology) -> Iterator[str]:
    names = [path.partition(":")[2] for path in topology.rollout.tools.functions]
    if names and topology.rollout.function is None:
        yield "rollout.tools.functions: no rollout.function has an episode that would call them; name one"
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"rollout.tools.functions: {', '.join(twice)} stands there twice; a tool is called by its name alone"


def _unloadable(words: list[str]) -> list[str]:
    """Return what `python -m opd_async.hooks` says of (key, path, arguments) triples."""
    environment = {**os.environ, **away_from_here()}
    command = [sys.executable, "-m", "opd_async.hooks", *words]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=LOAD_DEADLINE_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return [f"{words[0]}: {words[1]} was not loaded within {LOAD_DEADLINE_S:.0f} s; import less in its module"]
    if ended.returncode not in (0, 1):
        last = (ended.stderr.strip().splitlines() or ["no word of it"])[-1]
        return [f"{words[0]}: {words[1]} ends the process that loads it with code {ended.returncode} ({last})"]
    return [line.removeprefix(MARK) for line in ended.stdout.splitlines() if line.startswith(MARK)]


MARK = "problem: "
"""Begins a line that is a problem; what the user's modules print has other beginnings."""
