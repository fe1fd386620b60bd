"""The script of a run: what it asks of the learner, and which answer it takes for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.bench.no_weights import save_no_weights
from opd_async.cluster.fleet import Standing
from opd_async.run import checkpoints
from opd_async.run.script import Script
from opd_async.run.state import RESYNC, UPDATE, RunState
from opd_async.telemetry.progress import Progress
from opd_async.telemetry.trace import OFF
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox


def started(version: int) -> m.StepStarted:
    none, stats = np.zeros(0, np.int32), {"tokens": 64.0, "cuts": 0.0}
    return m.StepStarted(
        version=version,
        waited_s=0.0,
        stats=stats,
        staleness_counts=np.zeros(1, np.int64),
        taken_ids=np.zeros(0, np.int64),
        taken_ends=none,
        taken_complete=none,
    )


class FakeDispatcher:
    """A dispatcher whose learner answers when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.plan = SimpleNamespace(topology=small_topology(folder), run_folder=folder)
        self.state = RunState()
        self.trace = OFF
        self.ledger = SimpleNamespace(save=lambda folder: None)
        self.mailbox = Mailbox()
        self.asked: asyncio.Queue[Any] = asyncio.Queue()
        self.on_updated: Any = lambda urls: None

    async def before_update(self) -> None:
        """Nobody leaves."""

    async def to_intake(self, message: Any) -> None:
        self.asked.put_nowait(message)

    async def next_question(self) -> None:
        async with asyncio.timeout(patience(20.0)):
            await self.asked.get()

    def answer(self, error: str | None = None) -> None:
        stats = checkpoints.Shards(1, 0).stats()
        self.mailbox.deliver(("reply", "SaveCheckpoint"), m.LearnerReply("SaveCheckpoint", 3, error, stats))


async def test_a_checkpoint_is_sealed_by_its_own_answer_alone(tmp_path: Path) -> None:
    """A signal cancels the wait for a checkpoint, and the same one is asked for again: the learner writes it twice."""
    folder = checkpoints.step_folder(tmp_path / "checkpoints", 3)
    dispatcher: Any = FakeDispatcher(tmp_path)
    script = Script(dispatcher, None, 1, Progress(lambda line: None, 10))
    first = asyncio.create_task(script.saving.checkpoint(3))
    await dispatcher.next_question()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    again = asyncio.create_task(script.saving.checkpoint(3))
    dispatcher.answer()  # to the first command; the learner begins to replace what it wrote
    await dispatcher.next_question()
    await asyncio.sleep(0.05)
    assert not (folder / checkpoints.MARKER).exists()
    save_no_weights(folder)
    dispatcher.answer()
    await again
    assert (folder / checkpoints.MARKER).exists()


async def test_a_step_that_a_signal_left_halfway_gets_its_row(tmp_path: Path) -> None:
    """One step was trained and its weights are on their way, the next is trained while the run stops."""
    rows: list[int] = []
    dispatcher: Any = FakeDispatcher(tmp_path)
    closing = asyncio.Event()

    async def close() -> None:
        closing.set()
        await asyncio.Event().wait()

    dispatcher.state.version = 0
    dispatcher.metrics = defaultdict(lambda: SimpleNamespace(set=lambda _: None, inc=lambda _: None))
    dispatcher.barrier = SimpleNamespace(blocked_s=0.0, close=close)
    dispatcher.ledger = SimpleNamespace(
        step=lambda started, *_: {"step": rows.append(started.version + 1)}, save=lambda folder: None
    )
    dispatcher.leasing = SimpleNamespace(admit=lambda _: None)
    script = Script(dispatcher, None, 1, Progress(lambda line: None, 10))
    for step in (1, 2):
        dispatcher.mailbox.deliver(("StepStarted", step - 1), started(step - 1))
    dispatcher.mailbox.deliver(UPDATE, m.LearnerReply("Train", 1, None, {"ratio_std": 0.0}))
    training = asyncio.create_task(script.train(0))
    await closing.wait()
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    stopping = asyncio.create_task(script.wind_down())
    dispatcher.mailbox.deliver("Quiesced", m.Quiesced(2))
    dispatcher.mailbox.deliver(UPDATE, RESYNC)
    dispatcher.mailbox.deliver(UPDATE, m.LearnerReply("Train", 2, None, {}))
    await dispatcher.next_question()
    await dispatcher.next_question()
    dispatcher.answer()
    save_no_weights(checkpoints.step_folder(tmp_path / "checkpoints", 2))
    await stopping
    assert rows == [1, 2]


class FailedUpdate:
    """A run of engines a and b whose first weight update fails; what follows is `told`. They answer once they are
    `up`."""

    def __init__(self, folder: Path) -> None:
        self.told: list[Any] = []
        self.spared: set[str] = set()
        self.waiting = asyncio.Event()
        """Somebody waits for b."""
        self.up = {"a": asyncio.Event(), "b": asyncio.Event()}
        dispatcher: Any = FakeDispatcher(folder)
        dispatcher.plan.engine_names = {"a": "student-engine-0", "b": "student-engine-1"}
        dispatcher.metrics = defaultdict(lambda: SimpleNamespace(set=lambda _: None))
        dispatcher.barrier = SimpleNamespace(close=self._close, open=self._open)
        dispatcher.fleet = SimpleNamespace(
            standing=self._standing, students_to_reach=self._to_reach, wait_for_engine=self._wait_for_engine
        )
        dispatcher.watch = SimpleNamespace(end_stuck_engines=self._end_stuck_engines)
        dispatcher.leasing = SimpleNamespace(look_again=lambda: None)
        self._errors = ["b did not answer", None]
        self.script = Script(dispatcher, None, 1, Progress(lambda line: None, 10))
        self.script._deadlines = self.script._deadlines.model_copy(update={"backoff_s": 0.0})
        self.script._learner = SimpleNamespace(ask=self._ask)  # type: ignore[assignment]

    async def update(self) -> int:
        async with asyncio.timeout(patience(20)):
            return await self.script._update_weights(verify=False)

    def _standing(self, role: str) -> Standing:
        return Standing.SPARED if role in self.spared else Standing.EXPECTED

    def _to_reach(self) -> list[str]:
        names = {"a": "student-engine-0", "b": "student-engine-1"}
        return [url for url, name in names.items() if name not in self.spared]

    async def _close(self) -> None:
        self.told.append("closed")

    async def _open(self, version: int, *, new: bool) -> None:
        self.told.append(("opened", version))

    async def _end_stuck_engines(self, urls: list[str]) -> None:
        self.told.append(("looked at", tuple(urls)))

    async def _wait_for_engine(self, _: Any, url: str, __: float) -> None:
        self.told.append(("waited for", url))
        if url == "b":
            self.waiting.set()
        await self.up[url].wait()

    async def _ask(self, command: m.SyncWeights) -> m.LearnerReply:
        self.told.append((command.group, tuple(command.engines), command.verify))
        return m.LearnerReply("SyncWeights", 1, self._errors.pop(0), {})


async def test_what_a_failed_update_left_standing_is_ended_before_the_next_try(tmp_path: Path) -> None:
    run = FailedUpdate(tmp_path)
    for up in run.up.values():
        up.set()
    assert await run.update() == 1
    assert run.told == [
        "closed",
        ("opd-0", ("a", "b"), False),
        ("looked at", ("a", "b")),
        ("waited for", "a"),
        ("waited for", "b"),
        ("opd-1", ("a", "b"), True),
        ("opened", 1),
    ]


async def test_a_failed_update_goes_on_without_an_engine_whose_host_is_given_up_meanwhile(tmp_path: Path) -> None:
    """Its agent was killed: it refuses connections at once, and only later the host is known to be lost."""
    run = FailedUpdate(tmp_path)
    run.up["a"].set()
    updating = asyncio.create_task(run.update())
    async with asyncio.timeout(patience(20)):
        await run.waiting.wait()
    run.spared.add("student-engine-1")
    assert await updating == 1
    assert run.told[-2:] == [("opd-2", ("a",), True), ("opened", 1)]


async def test_weights_that_are_under_way_are_sent_to_their_end_when_the_evaluation_ends(tmp_path: Path) -> None:
    """An engine came back in its last moments: cut off in the middle, nobody would have generation go on."""
    run = FailedUpdate(tmp_path)
    script, sent, ended = run.script, asyncio.Event(), asyncio.Event()
    updated = list[bool]()

    async def update(verify: bool) -> int:
        ended.set()
        await sent.wait()
        updated.append(verify)
        return 1

    script._update_weights = update  # type: ignore[method-assign]
    run.script._dispatcher.mailbox.deliver(UPDATE, RESYNC)
    asyncio.get_running_loop().call_later(0.05, sent.set)
    async with asyncio.timeout(patience(20)):
        await script._serving(ended.wait())
        assert updated == [True]
        await script._serving(asyncio.sleep(0.0))
