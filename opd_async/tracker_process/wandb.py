"""Runs of Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from opd_async.tracker_process.sink import COLUMNS, Row


class WeightsAndBiases:
    """A run of Weights & Biases; offline, a folder that `wandb sync` sends later."""

    def __init__(self, setup: Row, known: str | None) -> None:
        import wandb

        folder = Path(setup["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=setup["project"],
            name=setup["name"],
            group=setup["group"],
            dir=str(folder),
            config=setup["config"],
            id=known,
            resume="allow" if known else None,
            mode="offline" if setup["offline"] else None,
        )
        self.id = self._run.id
        # not wandb's own step: it drops what comes for an earlier one, as an evaluation's row may
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Add a row; the figures are drawn over their key `step`."""
        self._run.log({"step": step, **values})

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Add a row with a table."""
        self._run.log({"step": step, "samples": self._wandb.Table(columns=list(COLUMNS), data=rows)})

    def rewind(self, step: int) -> bool:
        """Answer that a row of this tracker stays as it is."""
        return False

    def finish(self, report: Row | None) -> None:
        """Put the report into the summary, and wait until everything is sent."""
        if report is not None:
            self._run.summary["report"] = report
        self._run.finish(exit_code=0 if report is not None else 1)


def problem() -> str | None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online" or wandb.login(prompt=False, verify=False):
        return None
    return "wandb has no login on this machine; run `wandb login`, set WANDB_API_KEY, or write tracking.offline: true"
