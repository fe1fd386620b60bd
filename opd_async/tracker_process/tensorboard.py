"""TensorBoard's event files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from opd_async.tracker_process.sink import COLUMNS, Row

MARKDOWN = str.maketrans({"|": "\\|", "\n": "<br>", "\r": ""})


class TensorBoard:
    """Event files in a folder of their own, written by the package `tensorboard`; torch is not needed."""

    def __init__(self, setup: Row, known: str | None) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2
        from tensorboard.plugins.text import metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._tensor, self._text = event_pb2, summary_pb2, tensor_pb2, metadata
        folder = Path(setup["folder"])
        self.id = known or _new_folder(folder, setup["name"])
        self._writer = EventFileWriter(str(folder / self.id))
        if known is None:
            self._write(0, [self._as_text("config", _fenced(setup["config"]))], time.time())

    def log(self, step: int, values: dict[str, float], at: float) -> None:
        """Take scalars."""
        value = self._summary.Summary.Value
        self._write(step, [value(tag=name, simple_value=number) for name, number in values.items()], at)

    def table(self, step: int, rows: list[list[Any]]) -> None:
        """Take samples as a table in Markdown, which the tab `Text` shows."""
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        text = "\n".join(f"| {' | '.join(_cell(one) for one in line)} |" for line in lines)
        self._write(step, [self._as_text("samples", text)], time.time())

    def rewind(self, step: int) -> bool:
        """Say that the run starts again: readers drop what came before at later steps."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(step=step + 1, wall_time=time.time(), session_log=start))
        return True

    def finish(self, report: Row | None) -> None:
        """Write the report as text, and close the file."""
        if report is not None:
            self._write(int(report.get("steps") or 0), [self._as_text("report", _fenced(report))], time.time())
        self._writer.close()

    def _as_text(self, tag: str, text: str) -> Any:
        tensor = self._tensor.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        metadata = self._text.create_summary_metadata(display_name=tag, description="")
        return self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)

    def _write(self, step: int, values: list[Any], at: float) -> None:
        event = self._event.Event(step=step, wall_time=at, summary=self._summary.Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value).translate(MARKDOWN)


def _fenced(value: Row) -> str:
    """Write an object as a block of code in Markdown."""
    return f"```\n{json.dumps(value, indent=1)}\n```"


def _new_folder(parent: Path, name: str) -> str:
    """Make a folder for a new run and return its name; one that is there belongs to another."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder.name
