"""Serve one host of a run on several: join the launcher, and start its processes here.

    OPD_CLUSTER_SECRET_FILE=secret python -m opd_async.agent --join h0:19999 [--name h1] [--interface eth0]

Start it in any order with the launcher, on every host but the launcher's own (docs/cluster.md).

Exit codes: 0 the run is over; 2 the launcher refused this host, or what was given here cannot be used; 1 no launcher
was there, or it has another secret; 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import uvloop

from opd_async.cluster.agent import Agent
from opd_async.cluster.allocation import NODE_ENV
from opd_async.cluster.hosting import versions
from opd_async.cluster.interfaces import Face, own_face, resolve
from opd_async.cluster.secret import take_secret
from opd_async.cluster.service import HostFacts
from opd_async.errors import InputError, OpdError
from opd_async.process import PARENT_ENV, configure_logging, leaves, report_failure
from opd_async.signals import EXIT_INTERRUPTED, stop_signals
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.telemetry.terminal import Terminal

WAIT_S = 600.0
NVIDIA_DEADLINE_S = 20.0
FOREIGN = (PARENT_ENV, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that srun and the like copy from another host, and that mean something else to the processes of this."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m opd_async.agent", description="Serve one host of a run.")
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="the launcher's host and its cluster.port")
    name = os.environ.get(NODE_ENV) or socket.gethostname()
    parser.add_argument("--name", default=name, help="name of this host in the run (Slurm's for it, or its own)")
    parser.add_argument("--interface", help="interface or network to listen on (the one that leads to the launcher)")
    parser.add_argument("--wait-s", type=float, default=WAIT_S, help="how long to wait for a launcher (%(default)s)")
    return parser.parse_args(argv)


def gpus() -> int:
    """How many GPUs this process may use: those of CUDA_VISIBLE_DEVICES, else all that NVIDIA's tool lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip()])
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_DEADLINE_S, check=False
        )
        return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
    return 0


def with_time(say: Callable[[str], None]) -> Callable[[str], None]:
    """Say lines with the time before them."""
    return lambda line: say(f"{time.strftime('%H:%M:%S')} {line}")


@contextlib.contextmanager
def metrics_served(address: str, port: int, say: Callable[[str], None]) -> Iterator[None]:
    """Answer Prometheus with the figures of this host at its own `cluster.port`; where that is taken, say so."""
    with contextlib.ExitStack() as serving:
        try:
            serving.enter_context(RoleMetrics("host").serve(address, port))
        except OpdError as error:
            say(f"warning: no metrics of this host: {error}")
        yield


def make_agent(arguments: argparse.Namespace, face: Face, place: tuple[str, int], say: Callable[[str], None]) -> Agent:
    """The agent of this host, reached at `face`, of the launcher at `place`. Raises `InputError` for the secret."""
    keys = take_secret()
    address, port = place
    facts = HostFacts(
        name=arguments.name,
        face=face,
        gpus=gpus(),
        cores=len(os.sched_getaffinity(0)),
        versions=versions(),
    )
    if not arguments.name or "/" in arguments.name or len(arguments.name) > 64:
        raise InputError(f"--name {arguments.name!r}: write a word of at most 64 characters without slashes")
    return Agent(f"{address}:{port}", keys, facts, arguments.wait_s, say)


async def serve(agent: Agent, say: Callable[[str], None]) -> int:
    """Run the agent until its end, or a signal; returns the exit code. On cancel: as on a signal."""
    task = asyncio.ensure_future(agent.run())
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        say("told to end: every process of this host was killed")
        return EXIT_INTERRUPTED
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends the process."""
    arguments = parse_arguments(argv)
    for name in FOREIGN:
        os.environ.pop(name, None)
    # what it prints is for the eyes: an agent outlives the terminal that it was started from
    with Terminal() as terminal:
        configure_logging("agent", stream=terminal.errors)
        say = with_time(terminal.say)
        try:
            place = resolve(arguments.join)
            face = own_face(arguments.interface, place[0])
            agent = make_agent(arguments, face, place, say)
            with (
                metrics_served(face.address, place[1], say),
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                code = runner.run(serve(agent, say))
        except Exception as error:  # the edge of the process: every error becomes an exit code
            code = explain(error, terminal)
    sys.exit(code)


def explain(error: BaseException, terminal: Terminal) -> int:
    """Say why the agent ends; returns the exit code."""
    causes = list(leaves(error))
    expected = [cause for cause in causes if isinstance(cause, OpdError)]
    if len(expected) != len(causes):
        return report_failure(error)
    for cause in expected:
        terminal.complain(f"error: {cause}")
    return expected[0].exit_code


if __name__ == "__main__":
    main()
