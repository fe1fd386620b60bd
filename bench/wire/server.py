"""A null engine as an HTTP server: SGLang's API as the actors use it, answered at once from tables of text.

/generate (stream)   events of `stream_interval` tokens as fast as the connection takes them
/generate (score)    logprobs of the positions asked for; everything before them is cached
/pause_generation    holds the streams and says what each was given; /continue_generation lets them go on
/update_weight_version   what the null learner calls instead of sending weights
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from opd_async.bench.wire.pattern import CONTEXT_TOKENS, LOGPROBS, SCORES, TOKENS
from opd_async.plan.plan import RolePlan
from opd_async.process import stop_event

MAX_BODY_BYTES = 1 << 30

IDS = [str(token) for token in TOKENS.tolist()]
# seven digits are what float32 holds
OUTPUT = [f"[{value:.7g},{token},null]" for value, token in zip(LOGPROBS.tolist(), IDS, strict=True)]
INPUT = [f"[{value:.7g},%s,null]" for value in SCORES.tolist()]


@dataclass(slots=True)
class NullServer:
    """One null engine."""

    version: str = "-1"
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    emitted: dict[str, int] = field(default_factory=dict)
    """Tokens written to each running stream."""

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`/generate`, streamed or scoring."""
        body = await request.json()
        if body.get("stream"):
            return await self._stream(request, body)
        pairs = zip(body["input_ids"], body["logprob_start_len"], strict=True)
        return web.Response(text=f"[{','.join(_scores(ids, start) for ids, start in pairs)}]")

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        rid, first, sampling = body["rid"], len(body["input_ids"]), body["sampling_params"]
        at, end = first, first + sampling["max_new_tokens"]
        self.emitted[rid] = 0
        try:
            while at < end:
                await self.flowing.wait()
                until = min(at + sampling["stream_interval"], end)
                self.emitted[rid] = until - first
                await response.write(self._event(at, until, until - first, until == end))
                at = until
            await response.write(b"data: [DONE]\n\n")
        finally:
            del self.emitted[rid]
        return response

    def _event(self, at: int, until: int, total: int, last: bool) -> bytes:
        finish = f'{{"type":"length","length":{total}}}' if last else "null"
        meta = (
            f'"finish_reason":{finish},"completion_tokens":{total},"weight_version":"{self.version}",'
            f'"output_token_logprobs":[{",".join(OUTPUT[at:until])}]'
        )
        return f'data: {{"output_ids":[{",".join(IDS[at:until])}],"meta_info":{{{meta}}}}}\n\n'.encode()

    async def pause(self, request: web.Request) -> web.Response:
        """`/pause_generation`."""
        self.flowing.clear()
        return web.json_response({"emitted": self.emitted})

    async def resume(self, request: web.Request) -> web.Response:
        """`/continue_generation`."""
        self.flowing.set()
        return web.json_response({})

    async def update(self, request: web.Request) -> web.Response:
        """`/update_weight_version`."""
        self.version = str((await request.json())["new_version"])
        return web.json_response({"success": True})

    async def info(self, request: web.Request) -> web.Response:
        """`/model_info` and `/server_info`."""
        about = {"weight_version": self.version, "kind": "embedded", "context_length": CONTEXT_TOKENS}
        return web.json_response(about)


def _scores(ids: list[int], start: int) -> str:
    new = [INPUT[at] % ids[at] for at in range(start + 1, len(ids))]
    entries = ",".join([f"[null,{ids[start]},null]", *new])
    return (
        f'{{"meta_info":{{"finish_reason":{{"type":"length","length":0}},"prompt_tokens":{len(ids)},'
        f'"cached_tokens":{start},"input_token_logprobs":[{entries}]}}}}'
    )


def build_app() -> web.Application:
    """All routes."""
    server = NullServer()
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    for path, handler in {
        "/generate": server.generate,
        "/pause_generation": server.pause,
        "/continue_generation": server.resume,
        "/update_weight_version": server.update,
    }.items():
        app.router.add_post(path, handler)
    for path in ("/model_info", "/server_info"):
        app.router.add_get(path, server.info)
    return app


async def serve(mine: RolePlan) -> None:
    """Answer until a signal comes."""
    stop = stop_event(asyncio.get_running_loop())
    runner = web.AppRunner(build_app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, mine.host, mine.ports["http"]).start()
        await stop.wait()
    finally:
        await runner.cleanup()
