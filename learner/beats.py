"""Signs of life of one learner rank, sent by a thread of its own: no step, however long, holds them up.

The thread proves that the process runs. What it sends along, the command under way, for how long, and since when
nothing of it was got done (`learner/progress.py`), lets the launcher see a deadlock: a rank inside a collective whose
peer is gone beats on, and gets nothing done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from opd_async.learner.progress import PROGRESS
from opd_async.transport import messages as m
from opd_async.transport.door import Passport
from opd_async.transport.wire import encode

BEAT_S = 1.0
RECENT = 32
ALIKE = frozenset({"Train"})
"""Commands of which one takes about as long as the next; a save or a weight update may wait for others."""
KNOWN_AFTER = 3
"""So many of a kind are needed before they say how long the next may take."""


class Beats:
    """Says every second what the rank is doing; `with beats:` around the rank's life."""

    def __init__(self, address: str, rank: int) -> None:
        """`address`: the launcher's control socket."""
        self._address = address
        self._rank = rank
        self._since = time.monotonic()
        self._doing = ""
        self._took: dict[str, deque[float]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        # a daemon: a rank that ends by an error must not wait for it
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def __enter__(self) -> Beats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=2 * BEAT_S)

    @contextmanager
    def at(self, command: str) -> Iterator[None]:
        """Be at `command` while the block lasts."""
        with self._lock:
            self._doing, self._since = command, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._took.setdefault(command, deque(maxlen=RECENT)).append(time.monotonic() - self._since)
                self._doing = ""

    def beat(self) -> m.RankBeat:
        """What to say now."""
        with self._lock:
            took, now = self._took.get(self._doing, ()), time.monotonic()
            usual_s = max(took) if self._doing in ALIKE and len(took) >= KNOWN_AFTER else 0.0
            return m.RankBeat(
                rank=self._rank,
                doing=self._doing,
                for_s=now - self._since if self._doing else 0.0,
                usual_s=usual_s,
                still_s=now - max(self._since, PROGRESS.at) if self._doing else 0.0,
            )

    def _run(self) -> None:
        # sockets belong to the thread that made them
        context: zmq.Context[Any] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        try:
            name = f"rank-{self._rank}"
            passport = Passport.of_environment(name)
            socket.routing_id = name.encode() if passport is None else passport.routing_id
            if passport is not None:
                passport.show(socket)
            socket.sndhwm = 8  # beats that nobody takes are worth nothing later
            socket.connect(self._address)
            while not self._over.wait(BEAT_S):
                try:
                    socket.send_multipart(encode(self.beat()), flags=zmq.NOBLOCK)
                except zmq.Again:
                    continue
        finally:
            context.destroy(linger=0)
