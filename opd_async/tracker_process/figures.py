"""Pick what trackers show out of the launcher's rows: numbers by name, and samples as lines of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from opd_async.tracker_process.sink import Row

SHOWN_CHARACTERS = 4000
"""A prompt keeps its end and a response its beginning, up to this length."""


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """Yield the figures of a row, keys of inner objects behind a slash; lists and texts are left out."""
    for key, value in flat(row, "/"):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


def flat(row: Row, joint: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, joint, f"{prefix}{key}{joint}")
        else:
            yield f"{prefix}{key}", value


def sample_cells(row: Row) -> list[Any]:
    """Make a line of the table of a row of `samples.jsonl`."""
    student, teacher = row.get("student_logprobs") or (), row.get("teacher_logprobs") or ()
    differences = [q - p for p, q in zip(student, teacher, strict=False)]  # a row may have one of them only
    mean = math.fsum(differences) / len(differences) if differences else None
    prompt, response = row["prompt"][-SHOWN_CHARACTERS:], row["response"][:SHOWN_CHARACTERS]
    source = f"{row['evaluation']} {row['set']}" if "evaluation" in row else "training"
    facts = (source, row["prompt_id"], prompt, response, row["response_tokens"])
    return [row["step"], *facts, row["finish"], row.get("reward"), mean]
