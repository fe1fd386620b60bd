"""A reverse proxy that holds up what an engine answers to `/generate`: each event of a stream, and each whole answer
for every sequence in it.

python slow_proxy.py PORT UPSTREAM SECONDS

Everything else passes at once, as of an engine whose device has become slow: more sequences take it longer.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import ClientSession, ClientTimeout, web


class Proxy:
    """Forwards everything."""

    def __init__(self, upstream: str, delay_s: float) -> None:
        self.upstream = upstream
        self.delay_s = delay_s

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        is_work = request.path == "/generate"
        async with (
            ClientSession(timeout=ClientTimeout(total=None)) as session,
            session.request(request.method, self.upstream + request.path_qs, data=body, headers=request.headers) as up,
        ):
            if up.content_type != "text/event-stream":
                answer = await up.read()
                await asyncio.sleep(self.delay_s * sequences(answer) if is_work else 0.0)
                return web.Response(status=up.status, body=answer, content_type=up.content_type)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            buffer = b""
            async for data in up.content.iter_any():
                *events, buffer = (buffer + data).split(b"\n\n")
                for event in events:
                    await asyncio.sleep(self.delay_s if is_work else 0.0)
                    await response.write(event + b"\n\n")
            return response


def sequences(answer: bytes) -> int:
    """How many sequences an answer is about."""
    found = json.loads(answer)
    return len(found) if isinstance(found, list) else 1


if __name__ == "__main__":
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", Proxy(sys.argv[2], float(sys.argv[3])).handle)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, handler_cancellation=True)
