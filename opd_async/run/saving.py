"""What a run keeps while it goes on: checkpoints and exported students; and its end where no disk takes them.

what has no room            what follows
a checkpoint                the oldest one goes, if it would have gone behind this one, and it is tried once more
still none                  the student alone is exported, which is smaller; then the run ends, `StorageError`
an exported student         a checkpoint is saved; then the run ends, `StorageError`
the last checkpoint         evaluation and export go on; then the run ends, `StorageError`
what is to be removed       said, and the run goes on
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from opd_async.errors import RoleError, StorageError
from opd_async.files import storing
from opd_async.run import checkpoints
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.learner_commands import LearnerCommands
from opd_async.telemetry.progress import Progress
from opd_async.transport import messages as m

SEEN_S = 90.0
"""For so long what another host has written may not be seen here: a network file system remembers for a minute what a
folder had in it."""
LOOK_S = 0.5
EXPORT = "export"
"""Folder in the run's: the trained student, and in sub-folders the student after some steps."""


class Saving:
    """Writes what a run keeps, by way of learner, intake and ledger."""

    def __init__(self, dispatcher: Dispatcher, learner: LearnerCommands, progress: Progress) -> None:
        self._dispatcher = dispatcher
        self._learner = learner
        self._progress = progress
        self._section = dispatcher.plan.topology.checkpoint
        self._root = dispatcher.plan.run_folder / "checkpoints"
        self._exports = dispatcher.plan.run_folder / EXPORT
        self.on_saved: Callable[[Path], None] = lambda folder: None
        """Called with each checkpoint that is sealed, and each export that is whole."""
        self.in_use: Callable[[], Path | None] = lambda: None
        """Which of them somebody reads just now: it stays until the next one is there, however old it is."""

    async def checkpoint(self, step: int) -> None:
        """Have learner, intake and ledger write the state after `step`, and seal the folder when all have.

        Raises `StorageError` where there is no room for it, and `RoleError` where the learner's files are not here. On
        cancel: the folder is not sealed, so that nobody resumes from it; the next call writes it again.
        """
        folder, keep = checkpoints.step_folder(self._root, step), self._section.keep
        if await asyncio.to_thread((folder / checkpoints.MARKER).exists):
            return
        try:
            with self._dispatcher.trace.during("checkpoints", f"checkpoint after step {step}"):
                await self._write(folder, step)
        except StorageError as error:
            gone = await asyncio.to_thread(checkpoints.make_room, folder, keep)
            if gone is None:
                raise self._refused(step, error) from error
            self._progress.say(f"{error}; removed {gone.name}, the oldest checkpoint, and trying again")
            await self._write_again(folder, step)
        self.on_saved(folder)
        await self._remove(checkpoints.prune, self._root, keep)

    async def _write(self, folder: Path, step: int) -> None:
        answer = await self._learner.do(m.SaveCheckpoint(step, str(folder)))
        with storing(folder):
            await self._see(folder, checkpoints.Shards.said(answer.stats))
            await asyncio.to_thread(self._dispatcher.ledger.save, folder)
            await asyncio.to_thread(checkpoints.seal, folder, step)

    async def _see(self, folder: Path, written: checkpoints.Shards) -> None:
        """Wait until all that the learner's ranks have written is here. Raises `RoleError` that says what is not."""
        end = time.monotonic() + SEEN_S
        while (here := await asyncio.to_thread(checkpoints.shards_here, folder)) != written:
            if time.monotonic() > end:
                raise RoleError(
                    f"{folder / checkpoints.SHARDS}: the learner's ranks have written {written.files} files of "
                    f"{written.bytes} bytes in all, and {here.files} of {here.bytes} bytes are here; put run_dir on a "
                    "file system that every host has mounted"
                )
            await asyncio.sleep(LOOK_S)

    async def _write_again(self, folder: Path, step: int) -> None:
        try:
            await self._write(folder, step)
        except StorageError as error:
            await asyncio.to_thread(checkpoints.make_room, folder)
            raise self._refused(step, error) from error

    def _refused(self, step: int, error: StorageError) -> StorageError:
        """What the user has to know of a checkpoint that is not there."""
        last = checkpoints.chosen(self._root, {})
        if last is None:
            then = "There is no earlier checkpoint: start afresh with --overwrite"
        else:
            then = f"The last checkpoint is {last.name}: go on from it with --resume"
        return StorageError(f"no checkpoint after step {step}: {error}. {then}")

    async def due(self, step: int) -> None:
        """Write what is due after `step`: a checkpoint, the student. Raises `StorageError` where there is no room.

        On cancel: as `checkpoint`; an export is whole or absent.
        """
        every = self._section.export_hf_every_steps
        export = every is not None and step % every == 0
        due = step % self._section.every_steps == 0
        if due and (failed := await self.attempt(self.checkpoint(step))) is not None:
            if self._section.export_hf and await self.attempt(self._export(step)) is None:
                raise StorageError(f"{failed}. The student after step {step} is in {self._student(step)}")
            raise failed
        if export and (failed := await self.attempt(self._export(step))) is not None:
            await self.checkpoint(step)
            raise StorageError(f"{failed}. A checkpoint after step {step} is saved: go on from it with --resume")

    async def export_last(self) -> None:
        """Write the trained student, where the topology asks for it. Raises `StorageError` where there is no room.

        On cancel: the export is whole or absent.
        """
        if self._section.export_hf:
            await self._learner.do(m.ExportModel(str(self._exports)))
            self.on_saved(self._exports)

    async def attempt(self, writing: Coroutine[Any, Any, None]) -> StorageError | None:
        """Await it; returns the error of a disk that has no room, for which the run ends later. On cancel: as it."""
        try:
            await writing
        except StorageError as error:
            return error
        return None

    def _student(self, step: int) -> Path:
        return checkpoints.step_folder(self._exports, step)

    async def _export(self, step: int) -> None:
        await self._learner.do(m.ExportModel(str(self._student(step))))
        self.on_saved(self._student(step))
        await self._remove(checkpoints.prune_exports, self._exports, self._section.keep)

    async def _remove(self, prune: Callable[[Path, int, Path | None], list[Path]], root: Path, keep: int) -> None:
        """Remove what is too old; what stays behind for an error ends nothing."""
        try:
            await asyncio.to_thread(prune, root, keep, self.in_use())
        except OSError as error:
            self._progress.say(f"{error.filename or root} cannot be removed: {error.strerror}; the run goes on")
