"""Runs of trackio."""

from __future__ import annotations

import os
import time
from typing import Any

from opd_async.tracker_process.figures import numbers
from opd_async.tracker_process.sink import COLUMNS, Row


class Trackio:
    """A run of trackio: where its own variables say; offline, in a folder."""

    def __init__(self, setup: Row, known: str | None) -> None:
        if setup["offline"]:
            for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(name, None)
            os.environ["TRACKIO_DIR"] = setup["folder"]
        import trackio

        self._trackio = trackio
        # it finds a run by its name alone
        self.id = known or f"{setup['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._run = trackio.init(
            project=setup["project"],
            name=self.id,
            group=setup["group"],
            config=setup["config"],
            resume="allow" if known else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Add a row of the step."""
        self._run.log(values, step=step)

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Add a table."""
        self._run.log({"samples": self._trackio.Table(columns=list(COLUMNS), data=rows)}, step=step)

    def rewind(self, step: int) -> bool:
        """Answer that a row of this tracker stays as it is."""
        return False

    def finish(self, report: Row | None) -> None:
        """Add the report's figures, and wait until everything is written."""
        if report is not None:
            figures = {f"report/{name}": value for name, value in numbers(report)}
            self._run.log(figures, step=int(report.get("steps") or 0))
        self._run.finish()


def problem() -> str | None:
    from huggingface_hub import get_token

    if not os.environ.get("TRACKIO_SPACE_ID") or get_token():
        return None
    return (
        "trackio has no login for the Space of TRACKIO_SPACE_ID; run `hf auth login`, or write tracking.offline: true"
    )
