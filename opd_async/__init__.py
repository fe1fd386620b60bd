"""Asynchronous on-policy distillation: partial samples are scored and trained while the student is still generating.

    from opd_async import Topology, run

    report = run(Topology.load("my.yaml", overrides={"schedule.steps": 20}))

The names in `__all__` are the public ones; everything else may change. Each is loaded when it is first used, so that
importing this package costs nothing, and the core that every role shares stays without torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_async.actors.intake.filtering import FinishedGroup
    from opd_async.config.topology import Topology
    from opd_async.door import run, run_async
    from opd_async.errors import DeadlineError, InputError, OpdError, RoleError
    from opd_async.hooks import HookError
    from opd_async.learner.losses.own import LossOutput, LossRows
    from opd_async.run.closing import InterruptedRun
    from opd_async.telemetry.report import Evaluation, Report

__version__ = "0.1.0"

__all__ = [
    "DeadlineError",
    "Evaluation",
    "FinishedGroup",
    "HookError",
    "InputError",
    "InterruptedRun",
    "LossOutput",
    "LossRows",
    "OpdError",
    "Report",
    "RoleError",
    "Topology",
    "__version__",
    "run",
    "run_async",
]

_HOMES = {
    "DeadlineError": "errors",
    "Evaluation": "telemetry.report",
    "FinishedGroup": "actors.intake.filtering",
    "HookError": "hooks",
    "InputError": "errors",
    "InterruptedRun": "run.closing",
    "LossOutput": "learner.losses.own",
    "LossRows": "learner.losses.own",
    "OpdError": "errors",
    "Report": "telemetry.report",
    "RoleError": "errors",
    "Topology": "config.topology",
    "run": "door",
    "run_async": "door",
}
"""The module of each public name."""


class _Package(ModuleType):
    """This package as an object, whose `run` stays the function when the room `opd_async.run` is imported."""

    def __getattr__(self, name: str) -> Any:
        """Load a public name on first use."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Importing `opd_async.run` would put the room in the function's place; it is found by its whole name alone."""
        if not (name == "run" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """The public names, and those of a module."""
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
