"""HTTP client of one engine that speaks SGLang's API: streamed generation, scoring, pause and continue.

Every call has a deadline; errors name the engine and say of what kind they are. A caller that is cancelled closes its
connection, which makes the engine abort the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import orjson
from numpy.typing import NDArray

from opd_async.actors.client.replies import Delta, Scores, error_in, fault_of_status, parse_delta, parse_scores
from opd_async.actors.client.stream_cursor import StreamCursor
from opd_async.actors.client.topk_replies import request_fields
from opd_async.errors import EngineError, EngineFault

CONTROL_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
"""For pausing and aborting: those who wait for it give up after `CONTROL_DEADLINE_S`."""
CONNECT_DEADLINE_S = 10.0
REQUEST_DEADLINE_S = 120.0
"""Unless the topology says otherwise: see `Endpoint`."""
MAX_ERROR_TEXT = 400
JSON = {"Content-Type": "application/json"}
PORTION_BYTES = 1 << 14
"""Of a stream, parsed before others have their turn: under load every stream holds a lot ready."""
BARRED = -1.0e9
"""Added to the logit of a token that may not be sampled: no probability is left, of those that are reported neither."""
KEEP_ALIVE_S = 2.0
"""SGLang closes connections that were idle for 5 s: one that is used again at that moment is a failed request."""


def new_connector() -> aiohttp.TCPConnector:
    """Connections for the session of `EngineClient`s: as many as there are requests."""
    return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of one request; `seed` is unused by servers without deterministic sampling."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    stream_interval: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an engine is, what opens it, and how long it may be silent."""

    url: str
    api_key: str | None = None
    admin_api_key: str | None = None
    """For pause, continue, abort and weights; None: `api_key` opens those too."""
    deadline_s: float = REQUEST_DEADLINE_S
    """A stream that is silent for so long, or scores that take so long, have failed."""


class EngineClient:
    """One engine. The caller owns the session, so that connections are shared and closed in one place."""

    def __init__(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, vocab_size: int, topk: int = 0, *, rows: int = 0
    ) -> None:
        """Speak to the engine at `endpoint`, whose model has `rows` ids (0: `vocab_size`).

        Ids at or beyond `vocab_size` are never sampled there. `topk`: how many of the most likely tokens every score
        brings along; of those, too, ids beyond are left out.
        """
        self.url = endpoint.url
        self._deadline_s = endpoint.deadline_s
        self._topk = topk
        self._session = session
        self._vocab_size, self._rows = vocab_size, max(rows, vocab_size)
        self._barred = {str(token_id): BARRED for token_id in range(vocab_size, self._rows)}
        self._headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        admin = endpoint.admin_api_key or endpoint.api_key
        self._admin_headers = {"Authorization": f"Bearer {admin}"} if admin else {}

    async def stream(
        self, rid: str, input_ids: NDArray[np.int32], sampling: Sampling, cache_salt: str
    ) -> AsyncGenerator[Delta, None]:
        """Generate behind `input_ids` int32[N]; yields new tokens as the engine sends them.

        Raises `EngineError` for refusals, malformed events and broken connections.
        """
        body = {
            "rid": rid,
            "input_ids": input_ids,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": list(sampling.stop_token_ids),
                "stream_interval": sampling.stream_interval,
                **({"logit_bias": self._barred} if self._barred else {}),
            },
            "return_logprob": True,
            "stream": True,
            # the older of the two names for it: SGLang before 0.5.20 ignores `cache_salt`
            "extra_key": cache_salt or None,
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE_S, sock_read=self._deadline_s)
        cursor = StreamCursor()
        with self._faults("/generate", f"the stream was silent for {self._deadline_s:g} s"):
            async with self._session.post(
                f"{self.url}/generate",
                data=_json(body),
                headers=self._headers | JSON,
                timeout=timeout,
            ) as response:
                await _check(response)
                async for events in _events(response):
                    for part in cursor.parts(events):
                        yield parse_delta(part, self._vocab_size)

    async def score(
        self, requests: Sequence[tuple[NDArray[np.int32], int]], cache_salts: Sequence[str] = ()
    ) -> list[Scores]:
        """Teacher logprobs of `ids[start:]` for each (ids int32[N], start >= 1): one prefill-only batch.

        The prefix before `start - 1` may come from the engine's cache; everything behind it is computed. `cache_salts`,
        one for each, say whose keys and values may be used: then each is a request of its own, as `top`, and the first
        that fails ends the others. Raises `EngineError`.
        """
        if cache_salts:
            return await self._score_salted(requests, cache_salts)
        body = {
            "input_ids": [ids for ids, _ in requests],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [start - 1 for _, start in requests],
            **request_fields(self._topk),
        }
        replies = await self._post("/generate", body, self._headers, self._deadline_s)
        with self._faults("/generate", ""):
            if error := error_in(replies):
                raise error
            if not isinstance(replies, list) or len(replies) != len(requests):
                raise EngineError("not one reply per scoring request")
            return [
                parse_scores(reply, ids, start, self._vocab_size, self._topk, rows=self._rows)
                for reply, (ids, start) in zip(replies, requests, strict=True)
            ]

    async def _score_salted(
        self, requests: Sequence[tuple[NDArray[np.int32], int]], cache_salts: Sequence[str]
    ) -> list[Scores]:
        try:
            async with asyncio.TaskGroup() as group:
                salted = zip(requests, cache_salts, strict=True)
                asked = [group.create_task(self.top(ids, start, self._topk, salt)) for (ids, start), salt in salted]
        except* EngineError as errors:
            failed: EngineError = _first(errors)
        else:
            return [one.result() for one in asked]
        raise failed

    async def top(self, ids: NDArray[np.int32], start: int, k: int, cache_salt: str = "") -> Scores:
        """Logprobs of `ids[start:]` (ids int32[N], start >= 1) with the k likeliest tokens in the place of each; k may
        be 0.

        All of them where the model has fewer than k. `cache_salt` says whose keys and values may be used. A request of
        its own: servers differ in how a batch has salts. Raises `EngineError`.
        """
        k = min(k, self._rows)
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start - 1,
            "extra_key": cache_salt or None,
            **request_fields(k),
        }
        reply = await self._post("/generate", body, self._headers, self._deadline_s)
        with self._faults("/generate", ""):
            return parse_scores(reply, ids, start, self._vocab_size, k, rows=self._rows)

    async def pause(self, mode: str) -> dict[str, int]:
        """Stop generating. Returns how many tokens of each running stream have been written to it, where the engine
        says so."""
        reply = await self._post("/pause_generation", {"mode": mode}, self._admin_headers, STOP_DEADLINE_S)
        emitted = reply.get("emitted", {}) if isinstance(reply, dict) else {}
        return {str(rid): int(count) for rid, count in emitted.items()}

    async def abort_all(self) -> None:
        """Have every request end with the tokens that it has. Returns before they do; what comes later is not hit."""
        body = {"rid": "", "abort_all": True}
        await self._post("/abort_request", body, self._admin_headers, STOP_DEADLINE_S)

    async def resume(self) -> None:
        """Go on generating; harmless when the engine is not paused."""
        await self._post("/continue_generation", {}, self._admin_headers, CONTROL_DEADLINE_S)

    async def _post(self, path: str, body: dict[str, Any], headers: dict[str, str], deadline_s: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=CONNECT_DEADLINE_S)
        with self._faults(path, f"no answer within {deadline_s:g} s"):
            async with self._session.post(
                self.url + path, data=_json(body), headers=headers | JSON, timeout=timeout
            ) as response:
                await _check(response)
                text = await response.read()
            try:
                return orjson.loads(text) if text else {}
            except ValueError:
                raise EngineError("the answer is not JSON") from None

    @contextmanager
    def _faults(self, path: str, silence: str) -> Iterator[None]:
        """Turn every way in which a request can fail into an `EngineError` that names the engine."""
        try:
            yield
        except EngineError as error:
            raise EngineError(f"{self.url}{path}: {error}", error.fault) from None
        except aiohttp.ConnectionTimeoutError:
            text = f"no connection within {CONNECT_DEADLINE_S:g} s"
            raise EngineError(f"{self.url}{path}: {text}", EngineFault.DISCONNECTED) from None
        except TimeoutError:
            raise EngineError(f"{self.url}{path}: {silence}", EngineFault.SILENT) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            text = f"the connection failed ({error or type(error).__name__})"
            raise EngineError(f"{self.url}{path}: {text}", EngineFault.DISCONNECTED) from None


def _first(errors: BaseExceptionGroup[EngineError]) -> EngineError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _json(body: dict[str, Any]) -> bytes:
    """A request's body; arrays, which must be contiguous, are written without becoming lists first."""
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = await response.text()
    try:
        error = error_in(orjson.loads(text))
    except ValueError:
        error = None
    # the message of a refusal is what a user needs; nothing else of the page is shown
    said = str(error) if error is not None else text[:MAX_ERROR_TEXT].strip()
    raise EngineError(f"HTTP {response.status}: {said[:MAX_ERROR_TEXT]}", fault_of_status(response.status))


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[list[Any]]:
    """The JSON payloads of a server-sent event stream, those that arrived together in one list, or a few; `EngineError`
    if it ends without `[DONE]`."""
    buffer = b""
    async for data in response.content.iter_any():
        buffer += data
        *complete, buffer = buffer.split(b"\n\n")
        payloads: list[Any] = []
        size = 0
        for event in complete:
            if size > PORTION_BYTES:
                yield payloads
                await asyncio.sleep(0)
                payloads, size = [], 0
            size += len(event)
            if event.startswith(b":"):  # a comment, by which routers keep idle connections open
                continue
            payload = event.removeprefix(b"data: ")
            if payload == b"[DONE]":
                yield payloads
                return
            try:
                payloads.append(orjson.loads(payload))
            except ValueError:
                yield payloads  # what came before is good
                raise EngineError("an event is not JSON") from None
        yield payloads
    raise EngineError("the stream ended early", EngineFault.DISCONNECTED)
