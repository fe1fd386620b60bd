"""The teacher check passes a sane engine and names what is wrong with others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.client.replies import Scores
from opd_async.actors.teacher.canary import Canary, CanaryError
from opd_async.errors import EngineError

Ids = NDArray[np.int32]


def sane(ids: Ids, start: int) -> Ids:
    """Scores that depend on the token and the one before it."""
    return (-(ids[start:] + 3 * ids[start - 1 : -1]) / 100).astype(np.float32)


def blind_to_context(ids: Ids, start: int) -> Ids:
    """The first score of a request ignores what stands before."""
    scores = sane(ids, start).copy()
    scores[0] = -9.0
    return scores


def constant(ids: Ids, start: int) -> Ids:
    return np.full(len(ids) - start, -1.0, np.float32)


class FakeEngine:
    """Answers scoring requests with a function."""

    url = "http://127.0.0.1:1"

    def __init__(self, answer: Callable[[Ids, int], Ids]) -> None:
        self.answer = answer

    async def score(self, requests: Sequence[tuple[Ids, int]], cache_salts: Sequence[str] = ()) -> list[Scores]:
        return [Scores(self.answer(ids, start), len(ids), 0) for ids, start in requests]


def canary(answer: Callable[[Ids, int], Ids]) -> Canary:
    return Canary(cast(EngineClient, FakeEngine(answer)), 50)


def check(answer: Callable[[Ids, int], Ids]) -> Canary:
    one = canary(answer)
    asyncio.run(one.check())
    return one


def refuse(ids: Ids, start: int) -> Ids:
    raise EngineError("HTTP 401: no key")


def other(ids: Ids, start: int) -> Ids:
    """Another model."""
    return (sane(ids, start) - 0.1).astype(np.float32)


def noisy(ids: Ids, start: int) -> Ids:
    """The same model in a low precision."""
    return (sane(ids, start) + 0.02 * np.cos(np.arange(len(ids) - start) + start)).astype(np.float32)


async def test_a_sane_teacher_passes_again_and_again() -> None:
    engine = FakeEngine(sane)
    one = Canary(cast(EngineClient, engine), 50)
    for answer in (sane, sane, noisy, sane):
        engine.answer = answer
        await one.check()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (blind_to_context, "nats when it is sent in two parts"),
        (constant, "all scores of a test text are alike"),
    ],
)
def test_a_broken_teacher_is_named(answer: Callable[[Ids, int], Ids], text: str) -> None:
    with pytest.raises(CanaryError, match=rf"http://127\.0\.0\.1:1: .*{text}"):
        check(answer)


def test_an_engine_that_does_not_answer_is_another_matter() -> None:
    with pytest.raises(EngineError, match="HTTP 401"):
        check(refuse)


async def test_a_teacher_that_changes_is_named() -> None:
    engine = FakeEngine(sane)
    one = Canary(cast(EngineClient, engine), 50)
    await one.check()
    engine.answer = other
    for _ in range(2):
        with pytest.raises(CanaryError, match=r"127\.0\.0\.1:1: .* changed by 0\.1 nats per token since the run"):
            await one.check()
    engine.answer = sane
    await one.check()


def test_replicas_must_agree() -> None:
    check(noisy).compare(check(sane))
    with pytest.raises(CanaryError, match=r"differ by 0\.1 nats per token; replicas"):
        check(other).compare(check(sane))
