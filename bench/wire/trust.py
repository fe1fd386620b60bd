"""What it costs to know who sent a message: open sockets, an HMAC frame, CURVE.

    python -m bench.wire.trust [--runs 5] [--messages 2000]

One process, PUSH to PULL over loopback TCP, so that both sides' work is in the figures. The HMAC is keyed BLAKE2b over
all frames, made and compared in Python; CURVE encrypts as well, in ZeroMQ's own threads. The three take turns within
each run; figures are medians of microseconds per message: wall clock, and processor time of the whole process.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import zmq

from opd_async.keys import RunKeys

SIZES = (1_000, 20_000, 1_000_000)
WINDOW = 32
"""Messages under way at once."""
DEADLINE_MS = 60_000
KEY = RunKeys.draw().secret("bench")
Frames = Sequence[Any]


def _mac(frames: Frames) -> bytes:
    hasher = hashlib.blake2b(key=KEY, digest_size=32)
    for frame in frames:
        hasher.update(frame)
    return hasher.digest()


def _signed(frames: Frames) -> Frames:
    return [*frames, _mac(frames)]


def _checked(frames: Frames) -> Frames:
    *content, mac = frames
    assert hmac.compare_digest(mac, _mac(content))
    return content


def _same(frames: Frames) -> Frames:
    return frames


WAYS: dict[str, tuple[Callable[[Frames], Frames], Callable[[Frames], Frames]]] = {
    "open": (_same, _same),
    "HMAC": (_signed, _checked),
    "CURVE": (_same, _same),
}
"""What is done to the frames before they are sent, and after they were received."""


@contextmanager
def pair(curve: bool) -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """A connected PUSH and PULL pair, with deadlines."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        for socket in (pull, push):
            socket.linger = 0
            socket.rcvtimeo = socket.sndtimeo = DEADLINE_MS
        if curve:
            public, pull.curve_secretkey = zmq.curve_keypair()
            pull.curve_server = True
            push.curve_serverkey = public
            push.curve_publickey, push.curve_secretkey = zmq.curve_keypair()
        push.connect(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
        yield push, pull


def transfer(way: str, size: int, messages: int, push: zmq.Socket[bytes], pull: zmq.Socket[bytes]) -> None:
    """Send and receive `messages` of a header and `size` bytes."""
    before, after = WAYS[way]
    frames = [bytes(200), bytes(size)]
    for sent in range(messages + WINDOW):
        if sent < messages:
            push.send_multipart(before(frames), copy=False)
        if sent >= WINDOW:
            received = after([frame.buffer for frame in pull.recv_multipart(copy=False)])
            assert len(received[1]) == size


def measure(runs: int, messages: int) -> dict[tuple[int, str], tuple[float, float]]:
    """(wall, processor) microseconds per message of each size and way."""
    times: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        pairs = {way: stack.enter_context(pair(way == "CURVE")) for way in WAYS}
        for size in SIZES:
            count = max(messages * 1_000 // size, WINDOW)
            for run in range(runs + 1):  # the first warms up
                for way, sockets in pairs.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    transfer(way, size, count, *sockets)
                    taken = time.perf_counter() - wall, time.process_time() - cpu
                    if run:
                        times.setdefault((size, way), []).append((taken[0] / count * 1e6, taken[1] / count * 1e6))
    return {key: (median(w for w, _ in rows), median(c for _, c in rows)) for key, rows in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="What it costs to know who sent a message.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--messages", type=int, default=2000, help="of 1,000 bytes; fewer of larger ones")
    options = parser.parse_args(arguments)
    figures = measure(options.runs, options.messages)
    print(f"{'bytes':>9}  {'':<6} {'us wall':>9} {'us cpu':>9} {'x cpu':>6} {'MB/s':>7}")
    for (size, way), (wall, cpu) in figures.items():
        ratio = cpu / figures[size, "open"][1]
        print(f"{size:>9}  {way:<6} {wall:>9.1f} {cpu:>9.1f} {ratio:>6.2f} {size / wall:>7.0f}")


if __name__ == "__main__":
    main()
