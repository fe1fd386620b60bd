"""POST /generate: whole answers and server-sent events.

    body -> parse -> core.submit -> (step, step, ...) -> Request.release -> events -> client

    loop      waits for                     unblocked by
    answer    all requests of the call      the last one finishing
    events    any request of the call       Request.release from the engine's loop

On cancel, or a write that fails (the client left), every unfinished request of the call is aborted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial

from aiohttp import web

from opd_async.actors.engine import response
from opd_async.actors.engine.app import ENGINE, MAX_BODY_BYTES, Engine, off_loop, read_json
from opd_async.actors.engine.errors import ApiError
from opd_async.actors.engine.parse import GenerateCall, parse_generate
from opd_async.actors.engine.request import Request
from opd_async.actors.engine.text import StreamCursor


async def generate(http: web.Request) -> web.StreamResponse:
    """Generate from, or score, one sequence or a batch."""
    engine = http.app[ENGINE]
    body = await read_json(http)
    try:
        call = await off_loop(http.content_length or MAX_BODY_BYTES, partial(parse_generate, body, engine.limits))
    except ApiError as error:
        # A streaming client reads events, so even a refusal is one.
        if isinstance(body, dict) and body.get("stream") is True:
            return await _stream_error(http, error)
        raise
    mailbox = _Mailbox(call.requests)
    submitted: list[Request] = []
    try:
        for request in call.requests:
            engine.core.submit(request)
            submitted.append(request)
        if call.stream:
            return await _stream(http, engine, call, mailbox)
        await mailbox.all_finished()
        return _whole(engine, call)
    except ApiError as error:
        if call.stream:
            return await _stream_error(http, error)
        raise
    except ConnectionResetError:
        return web.Response()  # the client has left between two events: nobody's fault, and nobody reads this
    finally:
        # Also on cancel, when the client has left: nothing may go on running for nobody.
        for request in submitted:
            engine.core.forget(request)


class _Mailbox:
    """Collects which requests of a call have news. Bounded by the call's requests: news are indices, not data."""

    def __init__(self, requests: list[Request]) -> None:
        self._requests = requests
        self._news: dict[int, None] = {}
        self._event = asyncio.Event()
        for index, request in enumerate(requests):
            request.on_update = partial(self._note, index)

    def _note(self, index: int) -> None:
        self._news[index] = None
        self._event.set()

    async def take(self) -> list[int]:
        """Indices of the requests with news, at least one."""
        await self._event.wait()
        self._event.clear()
        news = list(self._news)
        self._news.clear()
        return news

    async def all_finished(self) -> None:
        """Return when every request has finished."""
        left = len(self._requests)
        while left:
            # A request that is not streamed has news once: when it finishes.
            left -= len(await self.take())


def _whole(engine: Engine, call: GenerateCall) -> web.Response:
    answers = []
    for request in call.requests:
        text = engine.codec.text(request) if engine.codec else None
        answers.append(response.answer(request, text, _decoder(engine, request)))
    body = f"[{','.join(answers)}]" if call.batch else answers[0]
    return web.Response(body=body.encode(), content_type="application/json")


def _decoder(engine: Engine, request: Request) -> Callable[[int], str] | None:
    codec = engine.codec
    if codec is None or not request.logprob.text:
        return None
    return lambda token: codec.decode([token], skip_special_tokens=False)


async def _stream(http: web.Request, engine: Engine, call: GenerateCall, mailbox: _Mailbox) -> web.StreamResponse:
    out = await _open_stream(http)
    cursors = [StreamCursor() for _ in call.requests]
    left = len(call.requests)
    while left:
        for index in await mailbox.take():
            request = call.requests[index]
            data = _events(engine, request, cursors[index], index if call.batch else None)
            request.sent = request.ready
            left -= request.finished
            # write() hands the bytes to the transport before it may wait for a slow client
            engine.core.note_sent()
            await out.write(data)
    await out.write(b"data: [DONE]\n\n")
    return out


def _events(engine: Engine, request: Request, cursor: StreamCursor, index: int | None) -> bytes:
    """Events for all tokens that may be sent and were not; one event never holds tokens of two weight versions."""
    parts = []
    low, ready = request.sent, request.ready
    if low == ready and not request.finished:
        return b""
    decode = _decoder(engine, request)
    spans = [span for span in request.versions if span.end > low]
    cuts = [(min(span.end, ready), span.version) for span in spans if span.start < ready]
    # No new token, yet an end to report: an abort, or a scoring request.
    if not cuts:
        cuts = [(ready, request.finish_version)]
    for high, version in cuts:
        final = request.finished and high == len(request.output_ids)
        text = engine.codec.delta(request, cursor, high, final) if engine.codec else None
        parts.append(response.event(request, low, high, version, text=text, index=index, decode=decode))
        low = high
    return b"".join(parts)


async def _open_stream(http: web.Request) -> web.StreamResponse:
    out = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await out.prepare(http)
    return out


async def _stream_error(http: web.Request, error: ApiError) -> web.StreamResponse:
    """A refused stream is HTTP 200 with an error event, as SGLang sends it."""
    out = await _open_stream(http)
    await out.write(f"data: {json.dumps(error.payload())}\n\ndata: [DONE]\n\n".encode())
    return out
