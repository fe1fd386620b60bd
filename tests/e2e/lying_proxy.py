"""A reverse proxy that spoils some of an engine's answers to `/generate`, each in another way.

python lying_proxy.py PORT UPSTREAM EVERY FIRST     every EVERY-th answer is spoiled, from the FIRST kind of lie on

The lies are named on stdout.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

Reply = dict[str, Any]
FIELDS = ("output_token_logprobs", "input_token_logprobs")


def entries(reply: Reply) -> list[Any]:
    """The logprob entries of a reply, wherever they are."""
    meta = reply["meta_info"]
    return next(meta[field] for field in FIELDS if meta.get(field))


def set_last(value: Any) -> Callable[[Reply], None]:
    def lie(reply: Reply) -> None:
        entries(reply)[-1][0] = value

    return lie


def drop_last(reply: Reply) -> None:
    entries(reply).pop()


def remove(reply: Reply) -> None:
    for field in FIELDS:
        reply["meta_info"].pop(field, None)


def other_token(reply: Reply) -> None:
    entries(reply)[-1][1] += 1


LIES: dict[str, Callable[[Reply], None] | None] = {
    "nan": set_last(float("nan")),
    "null": set_last(None),
    "positive": set_last(1.5),
    "short": drop_last,
    "missing": remove,
    "wrong id": other_token,
    "not json": None,
    "disconnect": None,
    "error": None,
    "400": None,
    "429": None,
    "500": None,
    "503": None,
    "hang": None,
}
HANG_S = 60.0
ERROR = {"error": {"message": "spoiled", "type": "internal_error", "code": 500}}


class Proxy:
    """Forwards everything; spoils every n-th answer to `/generate`."""

    def __init__(self, upstream: str, every: int, first: int) -> None:
        self.upstream = upstream
        self.every = every
        self.count = itertools.count(1)
        self.lies = itertools.islice(itertools.cycle(LIES), first, None)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        lie = next(self.lies) if request.path == "/generate" and next(self.count) % self.every == 0 else None
        if lie is not None:
            print(lie, flush=True)
        if lie is not None and lie.isdigit():
            return web.Response(status=int(lie), text="spoiled")
        if lie == "hang":
            await asyncio.sleep(HANG_S)
            raise web.HTTPGatewayTimeout
        if lie == "error":  # as SGLang reports errors of streams, and of requests that it has begun: with status 200
            if not json.loads(body).get("stream"):
                return web.json_response(ERROR)
            text = f"data: {json.dumps(ERROR)}\n\ndata: [DONE]\n\n"
            return web.Response(text=text, content_type="text/event-stream")
        async with (
            ClientSession(timeout=ClientTimeout(total=None)) as session,
            session.request(request.method, self.upstream + request.path_qs, data=body, headers=request.headers) as up,
        ):
            if up.content_type != "text/event-stream":
                if lie == "disconnect":
                    self.abort(request)
                return web.Response(
                    status=up.status, body=self.spoil(await up.read(), lie), content_type=up.content_type
                )
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            buffer = b""
            async for data in up.content.iter_any():
                *events, buffer = (buffer + data).split(b"\n\n")
                for event in events:
                    if lie == "disconnect":
                        self.abort(request)
                        return response
                    payload = event.removeprefix(b"data: ")
                    done = payload == b"[DONE]"
                    await response.write(b"data: " + (payload if done else self.spoil(payload, lie)) + b"\n\n")
                    lie = None if not done else lie
            return response

    @staticmethod
    def abort(request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()

    @staticmethod
    def spoil(body: bytes, lie: str | None) -> bytes:
        if lie in (None, "disconnect"):
            return body
        if lie == "not json":
            return body[: len(body) // 2]
        decoded = json.loads(body)
        reply = decoded[0] if isinstance(decoded, list) else decoded
        change = LIES[str(lie)]
        assert change is not None
        change(reply)
        return json.dumps(decoded).encode()


if __name__ == "__main__":
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", Proxy(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).handle)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, handler_cancellation=True)
