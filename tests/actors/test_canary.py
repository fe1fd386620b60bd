"""The teacher check passes a sane engine and names what is wrong with others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.canary import check_teacher
from actors.engine_client import EngineClient
from actors.replies import Scores
from opd_async.errors import EngineError, RoleError

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
        self._answer = answer

    async def score(self, requests: Sequence[tuple[Ids, int]]) -> list[Scores]:
        return [Scores(self._answer(ids, start), len(ids), 0) for ids, start in requests]


def check(answer: Callable[[Ids, int], Ids]) -> None:
    asyncio.run(check_teacher(cast(EngineClient, FakeEngine(answer)), 50))


def refuse(ids: Ids, start: int) -> Ids:
    raise EngineError("HTTP 401: no key")


def test_a_sane_teacher_passes() -> None:
    check(sane)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (blind_to_context, "nats when it is sent in two parts"),
        (constant, "all scores of a test text are alike"),
        (refuse, "cannot score a test text: HTTP 401"),
    ],
)
def test_a_broken_teacher_is_named(answer: Callable[[Ids, int], Ids], text: str) -> None:
    with pytest.raises(RoleError, match=rf"http://127\.0\.0\.1:1: .*{text}"):
        check(answer)
