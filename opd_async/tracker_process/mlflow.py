"""Runs of MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from opd_async.tracker_process.figures import flat
from opd_async.tracker_process.sink import COLUMNS, Row

MLFLOW_TEXT = 500
"""Most characters of a parameter's value in every store of MLflow."""


class MlFlow:
    """A run of MLflow: on the server of MLFLOW_TRACKING_URI; offline, in a folder of files."""

    def __init__(self, setup: Row, known: str | None) -> None:
        if setup["offline"]:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        folder = Path(setup["folder"]).absolute()
        self._client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri() if setup["offline"] else None)
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        project = self._client.get_experiment_by_name(setup["project"])
        number = self._client.create_experiment(setup["project"]) if project is None else project.experiment_id
        tags = {} if setup["group"] is None else {"group": setup["group"]}
        self.id = self._client.create_run(number, run_name=setup["name"], tags=tags).info.run_id
        given = [Param(key, str(value)[:MLFLOW_TEXT]) for key, value in flat(setup["config"]) if value is not None]
        for begin in range(0, len(given), 100):  # a server takes no more at once
            self._client.log_batch(self.id, params=given[begin : begin + 100])
        self._client.log_dict(self.id, setup["config"], "topology.json")

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Take metrics."""
        now = round(at * 1000)
        self._client.log_batch(
            self.id, metrics=[self._metric(name, number, now, step) for name, number in values.items()]
        )

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Write samples as an artifact, in the form in which MLflow writes tables."""
        self._client.log_dict(self.id, {"columns": COLUMNS, "data": rows}, f"samples/step_{step:08d}.json")

    def rewind(self, step: int) -> bool:
        """Answer that a metric of this tracker stays as it is."""
        return False

    def finish(self, report: Row | None) -> None:
        """Write the report as an artifact, and say how the run has ended."""
        if report is not None:
            self._client.log_dict(self.id, report, "report.json")
        self._client.set_terminated(self.id, "FINISHED" if report is not None else "KILLED")


def problem() -> str | None:
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return "mlflow has no server; set MLFLOW_TRACKING_URI, or write tracking.offline: true"
