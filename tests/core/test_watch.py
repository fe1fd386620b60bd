"""The launcher's watch over heartbeats: who is silent is killed, but not for the launcher's own absence."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from opd_async.plan.plan import RoleKind
from opd_async.run import deaths as deaths_module
from opd_async.run.deaths import Deaths

DEADLINE_S = 60.0


def killed(monkeypatch: pytest.MonkeyPatch, moments: list[float], heard: dict[str, float]) -> list[str]:
    """Who is killed when the watch looks at these moments, with these last signs of life."""
    now, gone = [0.0], []

    async def sleep(_: float) -> None:
        if not moments:
            raise asyncio.CancelledError
        now[0] = moments.pop(0)

    monkeypatch.setattr(deaths_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(deaths_module, "asyncio", SimpleNamespace(sleep=sleep))
    fake: Any = SimpleNamespace(
        plan=SimpleNamespace(topology=SimpleNamespace(supervisor=SimpleNamespace(heartbeat_deadline_s=DEADLINE_S))),
        fleet=SimpleNamespace(
            role=lambda name: SimpleNamespace(kind=RoleKind.ROLLOUT),
            supervisor=SimpleNamespace(running=tuple(heard), kill=gone.append),
        ),
    )
    deaths = Deaths(fake)
    for role, moment in heard.items():
        now[0] = moment
        deaths.heard(role)
    now[0] = 0.0
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(deaths.watch())
    return gone


def test_a_silent_role_is_killed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [float(second) for second in range(1, 70)]
    assert killed(monkeypatch, moments, {"rollout-0": 0.0, "rollout-1": 50.0}) == ["rollout-0"]


def test_nobody_is_killed_because_the_launcher_itself_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [1.0, 2.0, 3600.0, 3601.0, 3602.0]
    assert killed(monkeypatch, moments, {"rollout-0": 1.9}) == []
