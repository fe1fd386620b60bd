"""What a rank gets done inside a command: counted by those who do it, read by the thread that beats.

A step of many micro-batches may take longer than any step before, and a rank inside it is no deadlock while it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """When something was last got done, in seconds of `time.monotonic`. Read and written by different threads."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def made(self) -> None:
        """Note that something has been got done now."""
        self.at = time.monotonic()

    def over(self, parts: Iterable[T]) -> Iterator[T]:
        """The same parts, each noted when it is taken."""
        for part in parts:
            self.made()
            yield part


PROGRESS = Progress()
"""That of this process: a process is one rank."""
