"""Waiting for messages: order, deadlines with names, failures, cancellation."""

from __future__ import annotations

import asyncio

import pytest
from deadlines import patience

from opd_async.errors import DeadlineError, RoleError
from opd_async.transport.mailbox import MAX_UNREAD, Mailbox

LONG_S = patience(20.0)


async def test_messages_come_in_order_before_and_during_a_wait() -> None:
    box = Mailbox()
    box.deliver("a", 1)
    box.deliver("b", 9)
    box.deliver("a", 2)
    assert [await box.expect("a", LONG_S, "x") for _ in range(2)] == [1, 2]
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(box.expect("a", LONG_S, "x"))
        await asyncio.sleep(0)
        box.deliver("a", 3)
        box.deliver("a", 4)
    assert waiting.result() == 3
    assert await box.expect("a", LONG_S, "x") == 4
    assert await box.expect("b", LONG_S, "x") == 9


async def test_none_is_a_message() -> None:
    box = Mailbox()
    box.deliver("a", None)
    assert await box.expect("a", LONG_S, "x") is None


async def test_the_deadline_names_who_was_waited_for() -> None:
    box = Mailbox()
    with pytest.raises(
        DeadlineError, match=r"timed out after 0 s waiting, since [0-9:]{8}, for rollout-3 to pause; see the logs"
    ):
        await box.expect("a", 0.01, "rollout-3 to pause")
    box.deliver("a", 1)
    assert await box.expect("a", LONG_S, "x") == 1


async def test_who_gets_on_may_take_its_time() -> None:
    """The deadline counts from the last progress, and only where work is waited for."""
    box, idle = Mailbox(), iter([0.0, 0.0, 0.0, 1.0])
    box.idle_s = lambda: next(idle)
    with pytest.raises(DeadlineError, match="an optimizer step"):
        await box.expect("a", 0.01, "an optimizer step", at_work=True)
    assert next(idle, None) is None, "it waited three times more"
    with pytest.raises(DeadlineError, match="rollout-0 to pause"):
        await box.expect("a", 0.01, "rollout-0 to pause")
    box.idle_s = lambda: 0.0
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(box.expect("a", 0.01, "an optimizer step", at_work=True))
        await asyncio.sleep(0.05)
        box.deliver("a", 3)
    assert waiting.result() == 3


async def test_unread_messages_are_bounded() -> None:
    box = Mailbox()
    for number in range(MAX_UNREAD + 3):
        box.deliver("a", number)
    assert await box.expect("a", LONG_S, "x") == 3


@pytest.mark.parametrize("delivered", ["before", "after"])
async def test_a_cancelled_wait_leaves_the_message(delivered: str) -> None:
    box = Mailbox()
    waiting = asyncio.ensure_future(box.expect("a", LONG_S, "x"))
    await asyncio.sleep(0)
    if delivered == "before":
        box.deliver("a", 1)
    waiting.cancel()
    if delivered == "after":
        box.deliver("a", 1)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await box.expect("a", LONG_S, "x") == 1


async def test_a_failure_reaches_waits_now_and_later_until_it_is_cleared() -> None:
    box = Mailbox()
    waiting = [asyncio.ensure_future(box.expect(key, LONG_S, "x")) for key in "ab"]
    await asyncio.sleep(0)
    box.fail(RoleError("teacher-0 died"))
    for wait in waiting:
        with pytest.raises(RoleError, match="teacher-0"):
            await wait
    box.deliver("a", 1)
    with pytest.raises(RoleError, match="teacher-0"):
        await box.expect("a", LONG_S, "x")
    box.clear()
    with pytest.raises(DeadlineError):
        await box.expect("a", 0.01, "x")


async def test_clearing_under_a_woken_wait_keeps_it_waiting() -> None:
    box = Mailbox()
    waiting = asyncio.ensure_future(box.expect("a", LONG_S, "x"))
    await asyncio.sleep(0)
    box.deliver("a", "of the old run")
    box.clear()
    await asyncio.sleep(0)
    box.deliver("a", "of the new run")
    assert await waiting == "of the new run"


async def test_read_keys_are_forgotten() -> None:
    box = Mailbox()
    for step in range(5):
        box.deliver(step, "x")
        await box.expect(step, LONG_S, "x")
    assert not box._unread
    assert not box._waiting
