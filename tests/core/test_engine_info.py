"""Engines that a run cannot use are named before anything is sent to them."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from opd_async.config.topology import EngineSection
from opd_async.engines.info import engine_problem, info_problem
from opd_async.plan.free_ports import free_ports

SECTION = EngineSection(context_tokens=512)
GOOD: list[dict[str, Any]] = [
    {"kind": "embedded", "version": "1", "context_length": 512},
    {"version": "0.5.15", "max_req_input_len": 514},
    {"version": "0.5.23"},
    {"version": "0.5.15.post1"},
]


@pytest.mark.parametrize("info", GOOD)
def test_usable(info: dict[str, Any]) -> None:
    assert info_problem(info, SECTION) is None


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"version": "0.5.21"}, "is sglang 0.5.21; supported are 0.5.15, 0.5.20, 0.5.23"),
        ({}, "is sglang None; supported are"),
        ({"version": "0.5.23", "max_req_input_len": 506}, "takes prompts of up to 506 tokens, context_tokens is 512"),
        ({"kind": "embedded", "context_length": 511}, "start it with --context-length 520"),
    ],
)
def test_unusable(info: dict[str, Any], problem: str) -> None:
    assert problem in str(info_problem(info, SECTION))


async def test_asked_over_http_with_the_key() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer user":
            return web.Response(status=401)
        return web.json_response(GOOD[1])

    app, (port, silent) = web.Application(), free_ports("127.0.0.1", 2)
    app.router.add_get("/server_info", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    keyed = SECTION.model_copy(update={"api_key": "user"})
    pairs = [(port, keyed), (port, SECTION), (silent, SECTION)]
    found = [await engine_problem(f"http://127.0.0.1:{one}", section) for one, section in pairs]
    await runner.cleanup()
    good, refused, silent = found
    assert good is None and refused == "answers /server_info with HTTP 401"
    assert str(silent).startswith("does not answer /server_info")
