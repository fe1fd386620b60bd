"""What the HTTP routes share: the running engine and the small helpers around requests and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import orjson
from aiohttp import web

from opd_async.actors.engine.config import EngineConfig
from opd_async.actors.engine.core import EngineCore
from opd_async.actors.engine.errors import ApiError, WeightError
from opd_async.actors.engine.groups import WeightGroups
from opd_async.actors.engine.metrics import EngineMetrics
from opd_async.actors.engine.parse import ModelLimits
from opd_async.actors.engine.text import TextCodec
from opd_async.actors.engine.threads import in_thread
from opd_async.actors.engine.weights import ModelWeights

ENGINE: web.AppKey[Engine]
T = TypeVar("T")

MAX_BODY_BYTES = 32 << 20
"""A batch of long prompts: about 8 bytes a token. `score_batches.MAX_CONTEXT_TOKENS` stays below it."""
INLINE_BYTES = 1 << 16
"""Bodies up to here are parsed where they arrive, in a millisecond at most."""


@dataclass(slots=True, kw_only=True)
class Engine:
    """One engine: its parts, and the little state that only the control routes use."""

    config: EngineConfig
    core: EngineCore
    limits: ModelLimits
    codec: TextCodec | None
    weights: ModelWeights
    groups: WeightGroups
    metrics: EngineMetrics
    architectures: list[str]
    model_type: str
    model_path: Path
    started: float
    updating: bool = False
    weight_lock: asyncio.Lock = field(default_factory=asyncio.Lock)


ENGINE = web.AppKey("engine", Engine)


async def read_json(request: web.Request) -> Any:
    """The request's JSON body, parsed in a thread if it is large.

    Raises ApiError: 413 for a body beyond `MAX_BODY_BYTES`, 400 for one that is not JSON or nested too deeply.
    """
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        text = f"the body of {request.path} is larger than {MAX_BODY_BYTES} bytes; send fewer sequences at once"
        raise ApiError(text, HTTPStatus.REQUEST_ENTITY_TOO_LARGE) from None
    try:
        return await off_loop(len(raw), partial(orjson.loads, raw))
    except ValueError as error:
        raise ApiError(f"the body of {request.path} is not JSON: {error}") from error


async def off_loop(size: int, function: Callable[[], T]) -> T:
    """Return the result of `function`; it runs in a thread if an input of `size` bytes would hold other requests up."""
    return function() if size <= INLINE_BYTES else await in_thread("parse", function)


async def read_object(request: web.Request) -> dict[str, Any]:
    """The request's JSON body, which must be an object (`{}` at least)."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise ApiError(f"the body of {request.path} must be a JSON object")
    return body


def required(body: dict[str, Any], key: str, kind: type[Any]) -> Any:
    """Return a field that must be there with the right type. Raises WeightError (400)."""
    value = body.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WeightError(f"{key} must be given as {kind.__name__}, got {value!r}")
    return value


def success(message: str, **extra: Any) -> web.Response:
    """Answer that a control route has worked."""
    return web.json_response({"success": True, "message": message, **extra})


@web.middleware
async def errors_to_json(request: web.Request, handler: Any) -> web.StreamResponse:
    """Turn ApiError into its status and JSON body."""
    try:
        response: web.StreamResponse = await handler(request)
    except ApiError as error:
        return web.json_response(error.payload(), status=error.status)
    except RecursionError:  # of whoever walks through a value that is nested as deeply as the parser lets it be
        refusal = ApiError(f"the body of {request.path} is nested too deeply")
        return web.json_response(refusal.payload(), status=refusal.status)
    return response


def check_keys(keys: Any) -> Any:
    """Middleware that answers 401 unless the bearer key fits the route."""

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        if not keys.allows(request.path, request.headers.get("Authorization")):
            return web.json_response({"error": "Unauthorized"}, status=HTTPStatus.UNAUTHORIZED)
        response: web.StreamResponse = await handler(request)
        return response

    return guard
