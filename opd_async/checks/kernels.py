"""Check that the kernels of `learner.kernels` are installed and can compute the models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from opd_async.config.topology import Topology
from opd_async.data.decoder import read_shape
from opd_async.data.kernel_limits import PACKAGES, PARTS, kernel_problem
from opd_async.data.model_folder import try_model
from opd_async.errors import InputError

DEADLINE_S = 180.0
"""Of an import that brings torch along."""


def kernel_problems(topology: Topology) -> Iterator[str]:
    """List why `te` or `liger` cannot be had; each is imported in a process of the learner's Python.

    On several hosts the learner's ranks say that of their own Python when they start.
    """
    learner, asked = topology.learner, topology.learner.kernels
    if asked not in PARTS:
        return
    if "cpu" in learner.devices:
        yield f"learner.kernels: {asked}, whose kernels run on CUDA only, but learner.devices has cpu; write auto"
        return
    if asked == "te" and learner.dtype != "bfloat16":
        yield f"learner.kernels: te, whose attention takes no {learner.dtype}; write learner.dtype: bfloat16, or auto"
    if asked == "te" and learner.context_parallel > 1:
        size = learner.context_parallel
        yield f"learner.kernels: te, but learner.context_parallel {size} has an attention of its own; write auto"
    yield from _model_problems(topology)
    if topology.on_one_host and (problem := import_problem(asked)):
        yield f"learner.kernels: {asked}, {problem}; install {PACKAGES[asked]}, or write auto"


def _model_problems(topology: Topology) -> Iterator[str]:
    """List the models of the learner that the kernels cannot compute; one that cannot be read is reported elsewhere."""
    learner, opd = topology.learner, topology.opd
    folders = [topology.models.student.path]
    if opd.in_learner and topology.models.teacher is not None:
        folders.append(topology.models.teacher.path)
    if topology.advantage.estimator.facts.critic and topology.advantage.critic.path is not None:
        folders.append(topology.advantage.critic.path)
    for folder in dict.fromkeys(folders):
        if try_model(folder) is None:
            continue
        try:
            problem = kernel_problem(learner.kernels, read_shape(folder), learner.tensor_parallel)
        except InputError:
            continue
        if problem is not None:
            yield f"learner.kernels: {problem} ({folder})"


def import_problem(kernels: str) -> str | None:
    """Why a process of this Python cannot import what the learner takes of a package; None if it can."""
    code = "\n".join(f"from {module} import {name}" for module, name in PARTS[kernels].items())
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"which was not imported within {DEADLINE_S:.0f} s"
    if ended.returncode == 0:
        return None
    last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    return f"which cannot be imported ({last})"
