"""Hand rows to a tracker, each step once, also over several launches of a run.

What the tracker has had stands in a file (`state`): a run that goes on, goes on in the same run of the tracker, and
steps that are taken again are left out, or take the place of the lost ones where the tracker can take back what it was
told (TensorBoard).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd_async.tracker_process.figures import numbers, sample_cells
from opd_async.tracker_process.sink import Row, Sink

MOST_SAMPLES = 256
"""Of one step: so many wait for its figures, the newest."""


class Feeder:
    """Hands rows to a tracker, each step once."""

    def __init__(self, sink: Sink, state: Path, newest: dict[str, int]) -> None:
        """`newest` is the last step that the tracker has, by what it is of: `step`, or whom an evaluation is of."""
        self._sink = sink
        self._state = state
        self._newest = newest
        self._samples: list[list[Any]] = []
        self._report: Row | None = None
        self._save()

    def take(self, kind: str, row: Any) -> None:
        """Hand on one message of the launcher; raises whatever the tracker raises."""
        if kind == "sample":
            self._samples = [*self._samples, sample_cells(row)][-MOST_SAMPLES:]
        elif kind == "report":
            self._report = row
        elif kind == "rewind":
            if any(step > row for step in self._newest.values()) and self._sink.rewind(row):
                self._newest = {of: min(step, row) for of, step in self._newest.items()}
        elif kind in ("step", "evaluation"):
            self._figures(kind, row)

    def _figures(self, kind: str, row: Row) -> None:
        of = "step" if kind == "step" else f"evaluation {row['evaluation']} {row['set']}"
        step = int(row["step"])
        if step <= self._newest.get(of, -1):
            return
        prefix = "train" if kind == "step" else of.replace(" ", "/")
        values = {f"{prefix}/{name}": value for name, value in numbers(row) if name not in ("step", "time")}
        self._sink.log(step, values, float(row["time"]))
        self._newest[of] = step
        self._save()
        if kind == "step":
            self._table(step)

    def _table(self, step: int) -> None:
        rows, self._samples = self._samples, []
        if rows:
            self._sink.table(step, rows)

    def finish(self) -> None:
        """Hand on what waits, and close the tracker's run."""
        try:
            self._table(max(self._newest.values(), default=0))
        finally:
            self._sink.finish(self._report)

    def _save(self) -> None:
        """Write down what the tracker has: the next launch goes on from there."""
        text = json.dumps({"id": self._sink.id, "newest": self._newest})
        new = self._state.with_name(f"{self._state.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(self._state)


def known_of(state: Path) -> tuple[str | None, dict[str, int]]:
    """The tracker's run of an earlier launch, and the newest steps that it has."""
    if not state.is_file():
        return None, {}
    found = json.loads(state.read_bytes())
    return str(found["id"]), {str(of): int(step) for of, step in found["newest"].items()}
