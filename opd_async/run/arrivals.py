"""The start of a run: everybody who has to come up, waited for at the same time, and named as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from opd_async.errors import DeadlineError

NAMED = 3
"""So many of those still waited for are named; the others are counted."""


async def all_up(
    waits: Mapping[str, Coroutine[Any, Any, Any]], deadline_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return what every wait returns, once all have; `waits` is by who is waited for.

    Raises `DeadlineError` that names who is missing when nobody has come for `deadline_s`, and what a wait raises. The
    deadline begins anew with each arrival: a slow machine brings up one after the other. On cancel: the
    waits are cancelled too.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait, name=who) for who, wait in waits.items()]
            pending = set(tasks)
            say(f"waiting for {listed(list(waits))}")
            while pending:
                done, pending = await asyncio.wait(pending, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
                missing = listed([task.get_name() for task in tasks if task in pending])
                if not done:
                    raise DeadlineError(
                        f"timed out after {deadline_s:.0f} s waiting for {missing}; see the logs in the run's folder"
                    )
                if pending:
                    say(f"{listed([task.get_name() for task in tasks if task in done])}: there; waiting for {missing}")
            return {task.get_name(): task.result() for task in tasks}
    except ExceptionGroup as group_error:  # one reason is enough, and a caller expects it as it is
        raise group_error.exceptions[0] from None


def listed(names: list[str]) -> str:
    """`a, b, c and 5 more`."""
    more = len(names) - NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:NAMED])} and {more} more"
