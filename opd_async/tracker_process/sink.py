"""What every tracker is to the process that feeds it: a sink of figures and tables, which raises what it likes."""

from __future__ import annotations

from typing import Any, Protocol

Row = dict[str, Any]
COLUMNS = ("step", "of", "prompt_id", "prompt", "response", "tokens", "finish", "reward", "log_q_minus_log_p")
"""Of the table of samples."""


class Sink(Protocol):
    """A run of a tracker."""

    id: str
    """What finds this run again when it goes on."""

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Take figures of a step; `at` in seconds since 1970."""

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Take samples, in the order of `COLUMNS`."""

    def rewind(self, step: int) -> bool:
        """Take back what was told of later steps; False if this tracker cannot."""

    def finish(self, report: Row | None) -> None:
        """Close the run, with its report where it has come to its end."""
