"""A server whose HTTP side answers while its scheduler is paused or stands still: the watch of a run notices."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import psutil
import pytest
from deadlines import patience
from server_under_test import ADMIN_KEY, API_KEY, Server, make_model, prompt, running, sampling

from opd_async.engines.pulse import take_pulse
from opd_async.run.watch import Watch

pytestmark = pytest.mark.timeout(600)
TEACHER = "teacher-engine-0"


class Run:
    """Of a run, what the watch asks of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        keys = SimpleNamespace(api_key=API_KEY, admin_api_key=ADMIN_KEY)
        supervisor = SimpleNamespace(heartbeat_deadline_s=60.0, step_deadline_s=600.0)
        topology = SimpleNamespace(supervisor=supervisor, learner=SimpleNamespace(ranks=1))
        self.plan: Any = SimpleNamespace(
            topology=topology, roles=(), section=lambda url: keys, learner_of=lambda rank: "learner-0"
        )
        self.fleet: Any = SimpleNamespace(say=self.said.append)
        counter = SimpleNamespace(labels=lambda who: SimpleNamespace(inc=lambda: None))
        self.metrics: Any = {"opd_launcher_foreign_weights_total": counter}


async def tokens(server: Server) -> int:
    async with server.client() as client:
        return sum([len(delta.token_ids) async for delta in client.stream("r", prompt(8, 1), sampling(8), "")])


async def test_paused_and_stopped_schedulers_are_seen(tmp_path: Path) -> None:
    run = Run()
    watch = Watch(run)  # type: ignore[arg-type]
    with running(make_model(tmp_path / "model", 1), tmp_path / "server.log") as server:
        async with aiohttp.ClientSession() as session:
            give_up = time.monotonic() + patience(60)
            while not await watch._scheduler_lives(session, server.url, TEACHER):
                assert time.monotonic() < give_up, (tmp_path / "server.log").read_text()[-3000:]
            run.said.clear()
            server.post("/pause_generation", {"mode": "retract"})
            assert await watch._scheduler_lives(session, server.url, TEACHER)
            assert run.said == [f"{TEACHER} was paused by somebody: it goes on"]
            async with asyncio.timeout(patience(60)):
                assert await tokens(server) == 8
            family = psutil.Process(server.pid).children(recursive=True)
            (scheduler,) = (one for one in family if "scheduler" in " ".join([one.name(), *one.cmdline()]))
            scheduler.send_signal(signal.SIGSTOP)
            try:
                assert await take_pulse(session, server.url, API_KEY, patience(5)) is not None, "the HTTP side answers"
                assert not await watch._scheduler_lives(session, server.url, TEACHER)
            finally:
                scheduler.send_signal(signal.SIGCONT)
            assert await watch._scheduler_lives(session, server.url, TEACHER)
            assert len(run.said) == 1
