"""Ask an engine whether it lives, cheaply: by a route that generates nothing and that no long prefill holds up.

`/model_info` is answered by the HTTP side of either kind of engine, also while generation is paused (SGLang's `/health`
generates a token, and says 503 then). The embedded engine adds whether it is paused and how long its model has been at
the present step.

SGLang's HTTP side answers `/model_info` even when its scheduler, another process, stands still. What says that the
scheduler lives is `/health_generate`: anything that the scheduler sends answers it, also between the batches of a long
prefill. `/ready` says 503 while somebody has paused it. Both say little in the middle of a weight update; there
`/server_info`, which the scheduler has to answer too, says whether it came out of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp

from opd_async.scheduling.liveness import Work


@dataclass(frozen=True, slots=True)
class Pulse:
    """What an engine said of itself: `weights` names what it computes with, `paused` is None where it does not say."""

    weight_version: str
    model_path: str
    paused: bool | None
    work: Work | None
    """The model's present step; None between steps."""


def parse_pulse(info: Any) -> Pulse | None:
    """Read an answer of `/model_info`; None if it is none."""
    if not isinstance(info, dict) or "weight_version" not in info:
        return None
    numbers = [info.get(name) for name in ("step_s", "longest_step_s")]
    step_s, longest_s = (float(value) if isinstance(value, int | float) else 0.0 for value in numbers)
    paused = info.get("paused")
    return Pulse(
        weight_version=str(info["weight_version"]),
        model_path=str(info.get("model_path")),
        paused=paused if isinstance(paused, bool) else None,
        work=Work("a step of its model", step_s, longest_s) if step_s > 0 else None,
    )


async def take_pulse(session: aiohttp.ClientSession, url: str, api_key: str | None, wait_s: float) -> Pulse | None:
    """Ask the engine at `url`; None when it does not answer in `wait_s` seconds, or not with what was asked.

    On cancel: nothing has changed.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=wait_s)
    try:
        async with session.get(f"{url}/model_info", headers=headers, timeout=timeout) as response:
            return parse_pulse(await response.json()) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


async def says_yes(session: aiohttp.ClientSession, url: str, route: str, key: str | None, wait_s: float) -> bool | None:
    """Ask a route that answers 200 for yes; None where there is no such route. On cancel: nothing has changed."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=wait_s)
        async with session.get(f"{url}{route}", headers=headers, timeout=timeout) as response:
            return None if response.status in (401, 403, 404, 405) else response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def stands_still(session: aiohttp.ClientSession, url: str, key: str | None, wait_s: float) -> bool:
    """Ask what only an engine's scheduler can answer; True if the engine takes the question and answers nothing.

    An engine that nobody can reach does not stand still: it has ended, or is on its way up. On cancel: nothing has
    changed.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=wait_s)
        async with session.get(f"{url}/server_info", headers=headers, timeout=timeout) as response:
            await response.read()
            return False
    except TimeoutError:
        return True
    except (aiohttp.ClientError, OSError):
        return False


async def go_on(session: aiohttp.ClientSession, url: str, key: str | None, wait_s: float) -> bool:
    """Have an engine generate again that somebody has paused; returns whether it agreed. On cancel: it may have."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=wait_s)
    try:
        async with session.post(f"{url}/continue_generation", json={}, headers=headers, timeout=timeout) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
