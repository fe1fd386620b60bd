"""The script of a run: what it asks of the learner, and which answer it takes for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import small_topology

from opd_async import checkpoints
from opd_async import messages as m
from opd_async.lead import Lead
from opd_async.mailbox import Mailbox
from opd_async.progress import Progress


class Hub:
    """A coordinator whose learner answers when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.plan = SimpleNamespace(topology=small_topology(folder), run_folder=folder)
        self.mailbox = Mailbox()
        self.asked: asyncio.Queue[Any] = asyncio.Queue()

    async def to_intake(self, message: Any) -> None:
        self.asked.put_nowait(message)

    async def next_question(self) -> None:
        async with asyncio.timeout(20.0):
            await self.asked.get()

    def answer(self, error: str | None = None) -> None:
        self.mailbox.deliver(("reply", "SaveCheckpoint"), m.LearnerReply("SaveCheckpoint", 3, error, {}))


def test_a_checkpoint_is_sealed_by_its_own_answer_alone(tmp_path: Path) -> None:
    """A signal cancels the wait for a checkpoint, and the same one is asked for again: the learner writes it twice."""
    folder = checkpoints.step_folder(tmp_path / "checkpoints", 3)

    async def scene() -> None:
        hub: Any = Hub(tmp_path)
        lead = Lead(hub, None, 1, Progress(lambda line: None, 10))
        first = asyncio.create_task(lead.checkpoint(3))
        await hub.next_question()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        again = asyncio.create_task(lead.checkpoint(3))
        hub.answer()  # to the first command; the learner begins to replace what it wrote
        await hub.next_question()
        await asyncio.sleep(0.05)
        assert not (folder / checkpoints.MARKER).exists()
        folder.mkdir(parents=True)
        hub.answer()
        await again
        assert (folder / checkpoints.MARKER).exists()

    asyncio.run(scene())
