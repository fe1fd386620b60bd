"""The student engines as the learner speaks to them: one call to all of them at once, with a deadline.

    together(path, bodies)              POST to every engine, concurrently
    together(path, bodies, collective)  the same while a collective runs that needs all of them

Update sessions (`begin`, `end`) exist in SGLang since 0.5.21 and in the embedded engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from opd_async.engines.info import EMBEDDED
from opd_async.learner.errors import WeightSyncError
from opd_async.learner.weights.engine_http import EngineAddress, call

T = TypeVar("T")
Body = Mapping[str, Any]

GRACE_S = 1.0  # what fails together may fail a little later
CLEANUP_S = 5.0  # engines that may be dead are told to clean up, but not waited for longer than this


class Engines:
    """All student engines. Not for use by several threads at once."""

    def __init__(self, addresses: Sequence[EngineAddress], timeout_s: float) -> None:
        self.addresses = tuple(addresses)
        self.timeout_s = timeout_s
        self.ranks: tuple[int, ...] = ()
        """How many ranks each engine has, once `find` has asked."""
        self.hashing = True
        """Whether some engine says checksums that can be compared: only the embedded one does."""
        # one thread per engine, one for a collective, one that ships a bucket while the next is gathered
        self._threads = ThreadPoolExecutor(len(self.addresses) + 2, thread_name_prefix="weights")

    def find(self, *, numbered: bool = False) -> None:
        """Ask every engine for a sign of life and its number of ranks, which a weight group has `numbered`.

        Joining a group with a dead engine could not be undone. Raises `WeightSyncError` that names the engine which
        does not answer, whose replicas (`dp_size`) cannot be updated, or whose pipeline stages cannot be numbered.
        """
        asking = [self.submit(_ranks, engine, self.timeout_s, numbered) for engine in self.addresses]
        found = [future.result() for future in asking]
        self.ranks = tuple(ranks for ranks, _ in found)
        self.hashing = any(kind == EMBEDDED for _, kind in found)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run `work` on a thread of the pool."""
        return self._threads.submit(work, *arguments)

    def begin(self) -> list[bool]:
        """Open an update session on every engine; False for one too old to know sessions."""
        answers = self.together("/begin_weight_update", [{"selector": "all"}] * len(self.addresses))
        return [answer is not None for answer in answers]

    def end(self, sessions: Sequence[bool]) -> None:
        """Close the sessions that `begin` has opened."""
        self.together("/end_weight_update", [{} if session else None for session in sessions])

    def together(
        self,
        path: str,
        bodies: Sequence[Body | None],
        collective: Future[Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any] | None]:
        """POST to every engine at once (None: not to that one) while `collective` runs; the answers, in order.

        Raises at the first refusal, without waiting for the collective, which could not end any more, and after
        `timeout_s` (None: that of the engines).
        """
        deadline_s = self.timeout_s if timeout_s is None else timeout_s
        calls = {
            self._threads.submit(call, engine, "POST", path, body, timeout_s=deadline_s): engine
            for engine, body in zip(self.addresses, bodies, strict=True)
            if body is not None
        }
        everything: set[Future[Any]] = {*calls, *({collective} if collective else ())}
        done, waiting = wait(everything, timeout=deadline_s + CLEANUP_S, return_when=FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            # A dead engine breaks both: its missing answer names it, the broken collective lets go of the group.
            wait(everything, timeout=GRACE_S)
        for future in calls:
            if future.done() and future.exception() is not None:
                future.result()
        late = ", ".join(engine.url for future, engine in calls.items() if not future.done())
        if collective is not None and collective.done() and collective.exception() is not None:
            raise WeightSyncError(f"{path}: {collective.exception()}; engines without an answer: {late or 'none'}")
        if waiting:
            raise WeightSyncError(f"{path}: no answer within {deadline_s} s from {late or 'the collective'}")
        return [future.result() for future in calls]

    def clean(self, *calls: tuple[str, Body]) -> None:
        """Make every engine forget something half done, for which some are too dead and others too new."""

        def one(engine: EngineAddress) -> None:
            for path, body in calls:
                with suppress(WeightSyncError):
                    call(engine, "POST", path, body, timeout_s=CLEANUP_S)

        wait([self._threads.submit(one, engine) for engine in self.addresses], timeout=CLEANUP_S)

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False)


def _ranks(engine: EngineAddress, timeout_s: float, numbered: bool) -> tuple[int, str]:
    """Tensor-parallel ranks, 1 where the engine does not say, and the kind of engine, which SGLang leaves out."""
    info = call(engine, "GET", "/server_info", None, timeout_s=timeout_s, admin=False) or {}
    if int(info.get("dp_size") or 1) > 1 and not info.get("enable_dp_attention"):
        raise WeightSyncError(
            f"engine {engine.url} runs {info['dp_size']} data-parallel replicas (--dp-size), which SGLang cannot "
            "update: start that many servers instead"
        )
    if numbered and (stages := int(info.get("pp_size") or 1)) > 1:
        raise WeightSyncError(
            f"engine {engine.url} runs {stages} pipeline stages (--pp-size), whose processes SGLang numbers alike in a "
            "weight group: write engines.student.tensor_parallel instead, or learner.weight_transport: disk"
        )
    return int(info.get("tp_size") or 1), str(info.get("kind") or "")
