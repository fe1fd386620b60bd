"""Questions of the first intake to the others: whose answer is whose, whatever was cancelled before."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd_async.actors.intake.others import OtherIntakes
from opd_async.errors import DeadlineError, RoleError
from opd_async.transport import messages as m

OTHERS = ("intake-1", "intake-2")


class Asked:
    """The line to two other intakes, which answer when a test has them answer."""

    def __init__(self, deadline_s: float = 60.0) -> None:
        self.others = OTHERS
        self._questions: asyncio.Queue[Any] = asyncio.Queue()
        self.late, self.malformed = 0, list[str]()
        supervisor = SimpleNamespace(heartbeat_deadline_s=deadline_s)
        opd = SimpleNamespace(on_engines=True)
        topology = SimpleNamespace(teachers=("t",), opd=opd, supervisor=supervisor)
        plan: Any = SimpleNamespace(intakes=3, topology=topology)
        line: Any = self
        self.first = OtherIntakes(plan, line, lambda sample_id: None, self._is_late, self.malformed.append)

    def _is_late(self) -> None:
        self.late += 1

    async def send_other(self, name: str, message: m.Message) -> None:
        await self._questions.put(message)

    async def two(self) -> list[m.Message]:
        """The next two questions; the answers may come from now on."""
        return [await self._questions.get() for _ in OTHERS]

    def say(self, name: str, request: int, **tokens_of: list[int]) -> None:
        """An answer arrives; `tokens_of` samples `s<number>`."""
        parts = list(tokens_of.values())
        ids, ends = [int(key[1:]) for key in tokens_of], [len(part) for part in parts]
        flat = np.array([token for part in parts for token in part], np.int32)
        self.first.heard(name, m.Prefixes(request, np.array(ids, np.int64), np.array(ends, np.int32), flat))


def listed(found: dict[int, Any]) -> dict[int, list[int]]:
    return {sample_id: tokens.tolist() for sample_id, tokens in found.items()}


async def test_answers_may_come_in_any_order() -> None:
    line = Asked()
    task = asyncio.create_task(line.first.trained())
    one, two = await line.two()
    line.say("intake-2", two.request)
    line.say("intake-1", one.request, s1=[5, 6], s4=[7])
    assert listed(await task) == {1: [5, 6], 4: [7]}
    assert (line.late, line.malformed) == (0, [])


async def test_the_answer_to_a_cancelled_question_is_not_taken_for_the_next_ones() -> None:
    line = Asked()
    first = asyncio.create_task(line.first.trained())
    old = await line.two()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    again = asyncio.create_task(line.first.trained())
    new = await line.two()
    assert not {one.request for one in old} & {one.request for one in new}
    for name, was in zip(OTHERS, old, strict=True):
        line.say(name, was.request, s1=[1])
    await asyncio.sleep(0)
    assert not again.done() and line.late == 2
    for name, now in zip(OTHERS, new, strict=True):
        line.say(name, now.request, **({"s1": [1, 2]} if name == "intake-1" else {}))
    assert listed(await again) == {1: [1, 2]}
    for name, now in zip(OTHERS, new, strict=True):  # a second time
        line.say(name, now.request)
    assert (line.late, line.malformed) == (4, [])


async def test_whose_samples_they_are_is_asked_of_each_and_checked() -> None:
    request = m.Reclaim(np.array([0, 1, 2, 4], np.int64), np.array([3, 4, 5, 6], np.int32))
    for tokens, wrong in (({"s1": [8], "s4": []}, None), ({"s1": [8]}, 4), ({"s1": [8], "s4": [], "s7": [9]}, 7)):
        line = Asked()
        task = asyncio.create_task(line.first.reclaim(request))
        one, two = await line.two()
        assert (one.sample_ids.tolist(), one.attempts.tolist()) == ([1, 4], [4, 6])
        assert (two.sample_ids.tolist(), two.attempts.tolist()) == ([2], [5])
        line.say("intake-2", two.request, s2=[3, 3])
        line.say("intake-1", one.request, **tokens)
        if wrong is None:
            assert listed(await task) == {1: [8], 2: [3, 3], 4: []}
        else:
            with pytest.raises(RoleError, match=f"do not agree who holds sample {wrong}"):
                await task


async def test_what_nobody_asked_is_malformed() -> None:
    line = Asked()
    task = asyncio.create_task(line.first.trained())
    one, two = await line.two()
    line.say("intake-1", two.request)
    line.say("intake-1", 99)
    line.first.heard("intake-1", m.Quiesce("over"))
    assert [text.partition(",")[0] for text in line.malformed] == [
        f"an answer of intake-1 to question {two.request}",
        "an answer of intake-1 to question 99",
        "a Quiesce of intake-1",
    ]
    line.say("intake-1", one.request)
    line.say("intake-2", two.request)
    assert await task == {} and line.late == 0


async def test_an_intake_that_does_not_answer_is_named() -> None:
    line = Asked(0.02)
    task = asyncio.create_task(line.first.trained())
    one, _ = await line.two()
    line.say("intake-1", one.request)
    with pytest.raises(DeadlineError, match="intake-2 did not say what is trained"):
        await task
