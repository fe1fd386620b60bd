"""An engine in this process that speaks just enough of SGLang's API, and fails on demand.

Its scores and its next tokens are functions of two neighbouring tokens, so that a test can compute them too.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any, Self

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

VOCAB = 50
EVENT_TOKENS = 2
FAULTS = ("400", "429", "500", "503", "error", "disconnect", "hang")


def scores_of(ids: list[int], start: int, shift: float = 0.0) -> NDArray[np.float32]:
    """float32[len(ids) - start]: the logprobs of `ids[start:]`."""
    return np.array([-(ids[i] + 3 * ids[i - 1]) / 100 - shift for i in range(start, len(ids))], np.float32)


def distribution(before: int, shift: float = 0.0) -> NDArray[np.float64]:
    """float64[VOCAB]: logprobs behind the token `before`, as requests for the likeliest tokens get them."""
    logits = np.cos(np.arange(VOCAB) * (1.0 + before)) * (2.0 + shift)
    return logits - float(np.logaddexp.reduce(logits))


def continuation(ids: list[int], count: int) -> list[int]:
    """The next `count` tokens."""
    out = list(ids)
    for _ in range(count):
        out.append((5 * out[-1] + 7 * out[-2] + 1) % VOCAB)
    return out[len(ids) :]


def _alike(one: list[int], other: list[int]) -> int:
    """Length of the beginning that two texts share."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class FaultyEngine:
    """Listens on a port of its own; `fault` is what goes wrong with every request, `script` what with the next ones."""

    def __init__(self, shift: float = 0.0, cached: bool = True) -> None:
        self.fault: str | None = None
        self.script: deque[str] = deque()
        self.poison: list[int] | None = None
        self.poison_fault = "500"
        """What goes wrong with a batch that has a text beginning with `poison`."""
        self.shift = shift
        self.cached = cached
        self.remembers = False
        """Its cache holds what it has scored, and no more."""
        self.stalls = False
        """Every stream stands still behind its first event, and every batch before its answer."""
        self.seen: list[dict[str, Any]] = []
        self.weights: str | None = None
        """The version that it says its scores are of."""
        self.resumed = 0
        """How often it was told to go on."""
        self.port = 0
        self._runner: web.AppRunner | None = None
        self._hung = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def scored(self) -> list[list[int]]:
        """The requests of all scoring batches but those of canaries, which are short batches of one."""
        asked = [body["input_ids"] for body in self.seen if not body.get("stream")]
        texts = [ids for batch in asked for ids in ([batch] if isinstance(batch[0], int) else batch)]
        return [ids for ids in texts if len(ids) > 12]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/model_info", self._ok)
        app.router.add_post("/continue_generation", self._resume)
        app.router.add_post("/pause_generation", self._pause)
        self._hung.clear()
        self._runner = web.AppRunner(app, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections, and break those that there are."""
        if self._runner is not None:
            self._hung.set()
            await self._runner.cleanup()
            self._runner = None

    def release(self) -> None:
        """Let go on what hangs or stalls."""
        self._hung.set()

    @staticmethod
    async def _ok(_: web.Request) -> web.Response:
        return web.json_response({})

    async def _resume(self, request: web.Request) -> web.Response:
        self.resumed += 1
        return await self._ok(request)

    async def _pause(self, _: web.Request) -> web.Response:
        """Says of every stream that all of its tokens have been sent."""
        streams = (body for body in self.seen if body.get("stream"))
        sent = {body["rid"]: body["sampling_params"]["max_new_tokens"] for body in streams}
        return web.json_response({"emitted": sent})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        fault = self.script.popleft() if self.script else self.fault
        stream = bool(body.get("stream"))
        if self.poison is not None and any(ids[: len(self.poison)] == self.poison for ids in body["input_ids"]):
            fault = self.poison_fault
        if fault == "hang":
            await self._hung.wait()
            raise web.HTTPServiceUnavailable
        if fault == "abort":
            reason = {"type": "abort", "message": "Abort in waiting queue"}
            return web.json_response({"meta_info": {"finish_reason": reason}})
        if fault == "error":
            error = {"error": {"message": "injected error", "type": "internal_error", "code": 500}}
            return await self._events(request, [error]) if stream else web.json_response(error)
        if fault is not None and fault.isdigit():
            return web.json_response({"error": {"message": f"injected {fault}"}}, status=int(fault))
        if stream:
            return await self._events(request, self._tokens(body), cut=fault == "disconnect")
        if self.stalls:
            await self._hung.wait()
        if isinstance(body["input_ids"][0], int):
            ids, start, k = body["input_ids"], body["logprob_start_len"], body.get("top_logprobs_num")
            return web.json_response(self._scores(ids, start) if k is None else self._top(ids, start, k))
        replies = [self._scores(*pair) for pair in zip(body["input_ids"], body["logprob_start_len"], strict=True)]
        if fault != "disconnect":
            return web.json_response(replies)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(json.dumps(replies)[:20].encode())
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _events(self, request: web.Request, events: list[Any], cut: bool = False) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events[:1] if cut else events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.stalls:
                await self._hung.wait()
        if cut:
            assert request.transport is not None
            await asyncio.sleep(0)
            request.transport.abort()
        else:
            await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    def _tokens(body: dict[str, Any]) -> list[Any]:
        count = body["sampling_params"]["max_new_tokens"]
        tokens = continuation(body["input_ids"], count)
        events = []
        for at in range(0, count, EVENT_TOKENS):
            part = tokens[at : at + EVENT_TOKENS]
            done = at + len(part)
            meta = {
                "output_token_logprobs": [[-0.5, token, None] for token in part],
                "completion_tokens": done,
                "finish_reason": {"type": "length", "length": done} if done == count else None,
                "weight_version": "0",
            }
            events.append({"output_ids": part, "meta_info": meta})
        return events

    def _scores(self, ids: list[int], start: int) -> Any:
        logprobs = scores_of(ids, start + 1, self.shift)
        entries = [[None, ids[start], None]]
        entries += [[float(value), token, None] for value, token in zip(logprobs, ids[start + 1 :], strict=True)]
        cached = start if self.cached else 0
        if self.remembers:
            cached = max((_alike(ids, one) for body in self.seen[:-1] for one in body["input_ids"]), default=0)
            cached = min(cached, start)
        version = {} if self.weights is None else {"weight_version": self.weights}
        facts = {"prompt_tokens": len(ids), "cached_tokens": cached, **version}
        return {"meta_info": {"input_token_logprobs": entries, **facts}}

    def _top(self, ids: list[int], start: int, k: int) -> Any:
        """The `k` likeliest tokens in the place of each of `ids[start + 1:]`."""
        rows = [distribution(before, self.shift) for before in ids[start:-1]]
        entries = [[None, ids[start], None]]
        entries += [[row[token], token, None] for row, token in zip(rows, ids[start + 1 :], strict=True)]
        top = [[[row[token], int(token), None] for token in np.argsort(-row)[:k]] for row in rows]
        facts = {"prompt_tokens": len(ids), "cached_tokens": 0}
        return {"meta_info": {"input_token_logprobs": entries, "input_top_logprobs": [None, *top], **facts}}
