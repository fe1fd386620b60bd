"""Copies of checkpoints and exports in a store, made while the run goes on (`checkpoint.upload`).

    Saving -> Uploads.offer -> one transfer at a time, the newest of each kind first come -> opd_async.run.remote

A transfer that fails or is late is said and counted, and nothing else: the next checkpoint is the next try, and at the
end of the run the last one is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from opd_async.config.topology import Topology
from opd_async.errors import InputError, OpdError
from opd_async.plan.plan import Plan
from opd_async.telemetry.exporter import RoleMetrics

COMMAND = (sys.executable, "-m", "opd_async.run.remote")
PROBE_DEADLINE_S = 60.0
CUT_OFF = 2000
"""So many characters of what went wrong are said."""


async def transfer(words: Sequence[str], deadline_s: float, command: Sequence[str] = COMMAND) -> str:
    """One transfer; returns what it printed. Raises `OpdError` with the words of the store's client, or of a deadline.

    On cancel: the transfer's process is killed.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        async with asyncio.timeout(deadline_s):
            out, err = await process.communicate()
    except TimeoutError:
        raise OpdError(f"not done within {deadline_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines()
        raise OpdError(lines[-1][:CUT_OFF] if lines else f"the transfer ended with code {process.returncode}")
    return out.decode(errors="replace").strip()


def store_of(upload: str, name: str) -> str:
    """Where the run `name` has its copies below the URL of `checkpoint.upload`."""
    return f"{upload.rstrip('/')}/{name}"


class Uploads:
    """What is to be copied, and the one transfer under way. It belongs to the launcher, and outlives a recovery."""

    def __init__(
        self,
        run_folder: Path,
        url: str,
        *,
        keep: int,
        deadline_s: float,
        say: Callable[[str], None],
        count: Callable[[str], None],
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`url` is the run's own; `count` gets `done`, `failed`, and `skipped` for what a newer one has overtaken."""
        self.url = url
        self._run_folder = run_folder
        self._keep = keep
        self._deadline_s = deadline_s
        self._say = say
        self._count = count
        self._command = command
        self._waiting: dict[str, Path] = {}
        """By kind, the newest that is still to be sent."""
        self._there: dict[str, Path] = {}
        """By kind, the newest that was sent."""
        self._failed: dict[str, Path] = {}
        self._sent: Path | None = None
        """What is being sent."""
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def under_way(self) -> Path | None:
        """What is being sent: it must stay there for so long. A copy slower than checkpoints come would never end."""
        return self._sent

    def offer(self, folder: Path) -> None:
        """A checkpoint is sealed, or an export whole."""
        kind = folder.relative_to(self._run_folder).parts[0]
        if self._there.get(kind) == folder and kind == "checkpoints":
            return
        if kind in self._waiting:
            self._count("skipped")
        self._waiting[kind] = folder
        self._failed.pop(kind, None)
        self._idle.clear()
        self._news.set()

    async def run(self) -> None:
        """Send what is offered, for as long as the run lasts. On cancel: the transfer under way is killed."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                kind = next(iter(self._waiting))
                await self._send(kind, self._waiting.pop(kind))
            self._idle.set()

    async def finish(self) -> None:
        """Wait until everything has been sent or has failed; what failed last is tried once more.

        On cancel: what is under way goes on.
        """
        await self._idle.wait()
        for folder in list(self._failed.values()):
            self.offer(folder)
        await self._idle.wait()
        for kind, folder in self._failed.items():
            self._say(f"warning: {self.url} lacks {kind}: copy {folder} by hand")

    async def _send(self, kind: str, folder: Path) -> None:
        name = folder.relative_to(self._run_folder).as_posix()
        words = ["export", str(self._run_folder), self.url, name]
        if kind == "checkpoints":
            words = ["put", str(self._run_folder), self.url, folder.name, str(self._keep)]
        self._sent = folder
        try:
            await transfer(words, self._deadline_s, self._command)
        except (OpdError, OSError) as error:
            self._lost(kind, folder, error)
            return
        finally:
            self._sent = None
        self._count("done")
        self._there[kind] = folder

    def _lost(self, kind: str, folder: Path, error: Exception) -> None:
        """Say what went wrong, unless a newer one has taken the place of what was being sent."""
        if kind in self._waiting and not folder.exists():
            self._count("skipped")
            return
        self._count("failed")
        self._failed[kind] = folder
        self._say(f"warning: {folder.name} is not in {self.url}: {error}; the run goes on")


@contextlib.asynccontextmanager
async def uploading(plan: Plan, say: Callable[[str], None], metrics: RoleMetrics) -> AsyncIterator[Uploads | None]:
    """The run's uploads, for as long as the context lasts; None where it has none. On cancel: see `Uploads.run`."""
    section = plan.topology.checkpoint
    if section.upload is None:
        yield None
        return
    results = metrics["opd_launcher_uploads_total"]
    uploads = Uploads(
        plan.run_folder,
        store_of(section.upload, plan.topology.name),
        keep=section.keep,
        deadline_s=section.upload_deadline_s,
        say=say,
        count=lambda result: results.labels(result).inc(),
    )
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(uploads.run(), name="uploads")
        try:
            yield uploads
        finally:
            sending.cancel()


async def settle(topology: Topology, run_folder: Path, say: Callable[[str], None], resume: bool) -> None:
    """Before a start: fetch the newest checkpoint where a run is to be resumed whose folder is not there; of a run that
    begins, see that no other has its copies in that place. Raises `InputError`.

    On cancel: nothing is there.
    """
    upload = topology.checkpoint.upload
    if upload is None or (resume and await asyncio.to_thread(run_folder.exists)):
        return
    url = store_of(upload, topology.name)
    if resume:
        say(f"{run_folder} is not there; fetching the newest checkpoint from {url}")
    words = ["get", url, str(run_folder)] if resume else ["claim", url]
    remedy = "start the run without --resume" if resume else "choose another name, remove it there, or --resume it"
    try:
        step = await transfer(words, topology.checkpoint.upload_deadline_s)
    except (OpdError, OSError) as error:
        raise InputError(f"checkpoint.upload: {url}: {error}; {remedy}") from None
    if resume:
        say(f"{step} is fetched")
