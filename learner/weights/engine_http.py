"""Call the control routes of an inference engine (SGLang's HTTP API) from a thread, with a deadline."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from opd_async.learner.errors import WeightSyncError


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """One engine: where it answers, and the keys it asks for."""

    url: str
    admin_key: str | None = None
    """Opens control routes; the API key does where there is none."""
    api_key: str | None = None
    """Opens the other routes."""


def call(
    engine: EngineAddress,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    *,
    timeout_s: float,
    admin: bool = True,
) -> dict[str, Any] | None:
    """The JSON answer of the engine, or None if it does not know the route (404).

    Raises `WeightSyncError`, which names the engine, if it does not answer within `timeout_s`, answers with another
    status than 200, or answers `"success": false`.
    """
    key = (engine.admin_key or engine.api_key) if admin else engine.api_key
    status, raw = _request(engine, method, path, body, key, timeout_s)
    if status == 401 and key != engine.api_key:
        # SGLang takes a route that it does not know for an ordinary one, which the admin key does not open
        unknown = _request(engine, method, path, body, engine.api_key, timeout_s)[0] == 404
        status = 404 if unknown else status
    if status == 404:
        return None
    answer = _decode(raw)
    if status != 200 or answer.get("success") is False:
        reason = answer.get("message") or answer.get("error") or raw[:200].decode(errors="replace")
        raise WeightSyncError(f"engine {engine.url} refused {method} {path}: status {status}, {reason}")
    return answer


def _request(
    engine: EngineAddress, method: str, path: str, body: Mapping[str, Any] | None, key: str | None, timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of the answer."""
    parts = urlsplit(engine.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise WeightSyncError(f"engine {engine.url} did not answer {method} {path}: {error!r}; is it alive?") from error
    finally:
        connection.close()


def _decode(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`; empty if it is anything else (some routes answer with plain text or nothing)."""
    try:
        answer = json.loads(raw)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
