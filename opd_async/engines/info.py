"""Ask a running engine what it is, once and before anything else is sent to it, and say why it cannot serve a run."""

from __future__ import annotations

from typing import Any

import aiohttp

from opd_async.config.topology import EngineSection
from opd_async.engines.sglang import RESERVED_TOKENS, SUPPORTED, release

DEADLINE_S = 30.0
EMBEDDED = "embedded"


async def engine_problem(url: str, section: EngineSection) -> str | None:
    """Say why the engine at `url` does not fit its section; None if it does. No answer is a problem too.

    On cancel: nothing has changed; the connection closes.
    """
    headers = {"Authorization": f"Bearer {section.api_key}"} if section.api_key else {}
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(f"{url}/server_info") as response,
        ):
            if response.status != 200:
                return f"answers /server_info with HTTP {response.status}"
            info = await response.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return f"does not answer /server_info ({error or type(error).__name__})"
    return info_problem(info, section) if isinstance(info, dict) else "answers /server_info with no object"


def info_problem(info: dict[str, Any], section: EngineSection) -> str | None:
    """Say why an answer to `/server_info` does not fit the section: its version, or its room for prompts (tokens)."""
    embedded = info.get("kind") == EMBEDDED
    version = str(info.get("version"))
    if not embedded and release(version) not in SUPPORTED:
        return f"is sglang {version}; supported are {', '.join(SUPPORTED)}"
    # The embedded engine scores prompts as long as its context; SGLang says itself what it takes.
    room = info.get("context_length") if embedded else info.get("max_req_input_len")
    if isinstance(room, int) and room < section.context_tokens:
        return (
            f"takes prompts of up to {room} tokens, context_tokens is {section.context_tokens}: lower that, or start "
            f"it with --context-length {section.context_tokens + RESERVED_TOKENS} and as many --max-total-tokens"
        )
    return None
