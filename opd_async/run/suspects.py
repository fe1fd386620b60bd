"""What a teacher scored that turned out to be no teacher: written down at once, and found in the steps for the report.

SuspectScores of a teacher actor -> suspect.jsonl, a line on the terminal -> `suspect` in the report
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from opd_async.data.jsonl import JsonlRecord
from opd_async.run.trained import read_trained
from opd_async.telemetry.report import Suspect
from opd_async.transport.messages import SuspectScores

FILE_NAME = "suspect.jsonl"
SHOWN = 10


class Suspects:
    """Of one launch; the file has those of earlier ones too."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._found: list[SuspectScores] = []

    def add(self, found: SuspectScores) -> None:
        """Write down what is suspect, and say it."""
        self._found.append(found)
        ranges = [list(row) for row in _rows(found)]
        record = JsonlRecord(self._folder / FILE_NAME, self._say)
        record.write({"engine": found.url, "reason": found.text, "ranges": ranges})
        record.close()
        samples = sorted({sample for sample, _, _ in _rows(found)})
        shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
        tokens = sum(end - start for _, start, end in _rows(found))
        self._say(
            f"{found.url} scored {tokens:,} suspect tokens since its last good canary, of {len(samples)} samples "
            f"({shown}); {self._folder / FILE_NAME} lists them"
        )

    def summary(self) -> list[Suspect]:
        """Which steps have trained what is suspect; raises `InputError` for a damaged trained.jsonl."""
        if not self._found:
            return []
        steps = [(step.version + 1, step.ranges.tolist()) for step in read_trained(self._folder)]
        return [self._of(found, steps) for found in self._found]

    @staticmethod
    def _of(found: SuspectScores, steps: list[tuple[int, list[list[int]]]]) -> Suspect:
        parts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for sample, start, end in _rows(found):
            parts[sample].append((start, end))
        trained: dict[int, int] = defaultdict(int)
        for step, ranges in steps:
            for sample, start, end, *_ in ranges:
                for low, high in parts.get(sample, ()):
                    trained[step] += max(min(end, high) - max(start, low), 0)
        trained = {step: tokens for step, tokens in trained.items() if tokens}
        return Suspect(
            engine=found.url,
            reason=found.text,
            tokens=sum(end - start for _, start, end in _rows(found)),
            samples=sorted(parts),
            trained_tokens=sum(trained.values()),
            steps=sorted(trained),
        )


def _rows(found: SuspectScores) -> list[tuple[int, int, int]]:
    return list(zip(found.sample_ids.tolist(), found.starts.tolist(), found.ends.tolist(), strict=True))
