"""Wait until an engine is up: asked over HTTP, with a deadline."""

from __future__ import annotations

import asyncio

import aiohttp

from opd_async.errors import DeadlineError

POLL_S = 0.2


async def wait_until_ready(url: str, name: str, deadline_s: float, api_key: str | None = None) -> None:
    """Return once `GET url/model_info` answers 200: every version of SGLang has it, and it answers when paused.

    Raises `DeadlineError`, which names the engine, after `deadline_s` seconds. On cancel: nothing has changed.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with asyncio.timeout(deadline_s), aiohttp.ClientSession(headers=headers) as session:
            while True:
                if await _answers(session, f"{url}/model_info"):
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise DeadlineError(f"{name} at {url} was not ready within {deadline_s:.0f} s; see its log") from None


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5.0)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
