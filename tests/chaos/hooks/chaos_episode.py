"""An episode of several turns with tools of different length, and a fork in the middle; what tools say depends on what
was said alone, so that one that is begun anew is the same."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

TURNS = 5
FORKS_AT = 2
TOOL_S = (0.0, 0.1, 0.5, 1.5)
"""Some shorter than what frees a slot, some longer than several steps."""


async def episode(session: Any, row: dict[str, Any]) -> float:
    """Five turns, a tool behind each but the last, and a turn that goes another way."""
    for turn in range(TURNS):
        if turn == FORKS_AT:
            fork = await session.fork()
            await fork.generate(max_tokens=24)
        said = await session.generate(max_tokens=24)
        if turn < TURNS - 1:
            draw = zlib.crc32(said.text.encode()) + turn
            await asyncio.sleep(TOOL_S[draw % len(TOOL_S)])
            await session.give(f"t{100 + turn} t{150 + draw % 50} t99")
    return float("t9" in session.text)
