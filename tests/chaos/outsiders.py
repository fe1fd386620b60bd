"""Strangers at every port of a run: other runs' roles, people without keys, bytes that mean nothing."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np
import zmq

from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan
from opd_async.transport.door import Passport
from opd_async.transport.messages import Failure, Frontier, Heartbeat, Hello, LeaseDone, Stop
from opd_async.transport.wire import encode

STAY_S = 0.7
NONE, EMPTY = np.zeros(0, np.int32), np.zeros(0, np.int64)
WORDS = (
    Hello("rollout-0", "1"),
    Heartbeat("intake-0", {"tokens": 1.0}),
    Failure("intake-0", "a stranger's words"),
    LeaseDone(7, 0, 3, "stop"),
    Frontier(5, np.zeros((0, 2), np.int64), EMPTY, NONE, NONE),
    Stop("a stranger's reason"),
)
ROUTES = ("/update_weights_from_disk", "/update_weight_version", "/pause_generation", "/abort_request", "/generate")


def _say(address: str, kind: int, passport: Passport | None, name: bytes) -> None:
    """Well-formed messages under the name of a role."""
    with zmq.Context() as context, context.socket(kind) as sender:
        sender.linger = 0
        sender.routing_id = name
        if passport is not None:
            passport.show(sender)
        sender.connect(address)
        for word in WORDS:
            with contextlib.suppress(zmq.Again):
                sender.send_multipart(encode(word), zmq.DONTWAIT)
        time.sleep(STAY_S)


def _sockets(plan: Plan) -> dict[str, tuple[str, int]]:
    found = {"control": (plan.control, zmq.DEALER), "batches": (plan.batches[0], zmq.DEALER)}
    found["scored"] = (plan.scored[0], zmq.PUSH)
    if plan.chunks:
        found["chunks"] = (plan.chunks[0], zmq.PUSH)
    return found


def without_keys(plan: Plan, chance: random.Random) -> None:
    """Nobody's role, on a random ZeroMQ port."""
    address, kind = chance.choice(sorted(_sockets(plan).values()))
    _say(address, kind, None, chance.choice((b"rollout-0", b"rank-0", b"\xff\xfe")))


def of_another_run(plan: Plan, chance: random.Random) -> None:
    """A role of another run, on the control port."""
    _say(plan.control, zmq.DEALER, Passport("rollout-0", RunKeys.draw(), "1"), b"rollout-0")


def at_the_batches(plan: Plan, chance: random.Random) -> None:
    """Another run's rank asks for steps."""
    _say(plan.batches[0], zmq.DEALER, Passport("rank-0", RunKeys.draw(), "1"), b"rank-0")


def at_the_scores(plan: Plan, chance: random.Random) -> None:
    """Another run's teacher delivers scores."""
    _say(plan.scored[0], zmq.PUSH, Passport("teacher-0", RunKeys.draw(), "1"), b"teacher-0")


def noise(plan: Plan, chance: random.Random) -> None:
    """Bytes that mean nothing, to every port on which the run speaks: ZeroMQ, HTTP of engines and metrics."""
    ports = {int(address.rsplit(":", 1)[1]) for address, _ in _sockets(plan).values()}
    ports |= {role.ports[name] for role in plan.roles for name in ("http", "metrics") if name in role.ports}
    for port in sorted(ports):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2.0) as one:
            one.sendall(chance.randbytes(chance.randrange(1, 5000)))


def half_a_request(plan: Plan, chance: random.Random) -> None:
    """Requests to engines that never end."""
    open_ones = []
    for url in (*plan.student_engines, *plan.teacher_engines):
        with contextlib.suppress(OSError):
            one = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=2.0)
            one.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{")
            open_ones.append(one)
    time.sleep(STAY_S)
    for one in open_ones:
        one.close()


def at_the_engines(plan: Plan, chance: random.Random) -> None:
    """Requests without a key that would change an engine: each is refused."""
    for url in (*plan.student_engines, *plan.teacher_engines):
        for route in ROUTES:
            body = json.dumps({"model_path": "/tmp"}).encode()
            request = urllib.request.Request(url + route, body, {"Authorization": "Bearer guessed"})
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(request, timeout=10).close()
                except urllib.error.HTTPError as error:
                    error.close()
                    if error.code == 401:
                        continue
                raise AssertionError(f"{url}{route} let a stranger in")


OUTSIDERS: dict[str, Callable[[Plan, random.Random], None]] = {
    "no key": without_keys,
    "a role of another run": of_another_run,
    "another run's rank": at_the_batches,
    "another run's teacher": at_the_scores,
    "noise on every port": noise,
    "half a request": half_a_request,
    "a guessed key at the engines": at_the_engines,
}
