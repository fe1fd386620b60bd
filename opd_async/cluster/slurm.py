"""Start the agents of a run on the nodes of a Slurm allocation, by one `srun`, and again on a node that was lost.

    begin -> srun, a task on each node -> agents -> the launcher
    lost  -> srun for one node, again and again until its agent is there

Slurm is no judge of what is alive: neither a task nor a node that ends takes others with it (`--no-kill`,
`--kill-on-bad-exit=0`), and the leases of the agents say which host is lost. The secret goes in srun's environment.

loop        waits for                       unblocked by
srun        the next line of an srun        agents, srun
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from opd_async.cluster.allocation import Allocation, require_allocation
from opd_async.cluster.nodes import Node
from opd_async.cluster.secret import given_or_drawn, take_secret
from opd_async.cluster.starting import LEAVE_S, Returns, Started, agent_command
from opd_async.config.clustering import ClusterSection

_ERROR = "srun: error:"
_SHAPES = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_DISTRIBUTION")
"""What a batch script asks of its own tasks (also `SLURM_NTASKS_PER_...`); of agents there is one on each node."""


def srun_command(cluster: ClusterSection, nodes: Sequence[str], place: str, step: str) -> list[str]:
    """The command that starts an agent on each of the nodes, under this name of a step."""
    return [
        *("srun", f"--job-name={step}", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"),
        *(f"--nodelist={','.join(nodes)}", "--overlap", "--no-kill", "--kill-on-bad-exit=0", "--wait=0"),
        # an agent's processes share all that the job has on the node
        *("--cpu-bind=none", "--mpi=none", "--input=none", "--unbuffered", "--export=ALL"),
        *agent_command(cluster, place),
    ]


def srun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what the batch script's options would make of the agents' srun."""
    return {name: value for name, value in environment.items() if not name.startswith(_SHAPES)}


class SlurmAgents:
    """The agents of one run. See `Starter`."""

    def __init__(self, cluster: ClusterSection, say: Callable[[str], None]) -> None:
        """Raises `InputError` where Slurm, an allocation or nodes are missing."""
        self._allocation: Allocation = require_allocation(cluster.nodes)
        self._cluster = cluster
        self._say = say
        variables = given_or_drawn(os.environ)
        self.keys = take_secret(dict(variables))
        self._environment = srun_environment(os.environ) | variables
        self.awaited = self._allocation.others(cluster.nodes)
        self._step = f"opd-agents-{secrets.token_hex(4)}"
        self._place = ""
        self._started = Started(say)
        self._returns = Returns(lambda host: self._run((host,)), say)
        self._unclean = False
        """Whether an srun ended in a way that may have left its tasks."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._returns.close()
        await self._started.end()
        if self._unclean:
            await self._cancel_steps()

    def begin(self, place: str) -> None:
        """See `Starter`."""
        self._place = place
        if self.awaited:
            self._say(f"starting agents on {', '.join(self.awaited)} by srun, in Slurm's job {self._allocation.job}")
            self._run(self.awaited)

    async def broken(self) -> None:
        """See `Starter`. On cancel: nothing is undone."""
        await self._started.broken("cluster.backend: slurm, and srun could not keep an agent on every node; it says: ")

    def lost(self, node: Node) -> None:
        """See `Starter`."""
        self._returns.begin(node)

    def _run(self, nodes: Sequence[str]) -> asyncio.Task[int]:
        return self._started.run(self._srun(nodes), f"srun on {', '.join(nodes)}")

    async def _srun(self, nodes: Sequence[str]) -> int:
        """Run one srun to its end and pass its lines on; returns its exit code. On cancel: it is told to end."""
        process = await asyncio.create_subprocess_exec(
            *srun_command(self._cluster, nodes, self._place, self._step),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for the launcher, which ends the agents in order
        )
        assert process.stdout is not None
        try:
            await self._listen(process.stdout)
            code = await process.wait()
            self._unclean |= code < 0
            return code
        finally:
            if process.returncode is None:
                await self._end(process)

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await lines.readline()
            except ValueError:  # longer than the reader keeps: dropped by it
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._started.last.append(text)
            self._say(f"agents: {text}")
            if text.startswith(_ERROR):
                self._started.trouble.set()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Tell an srun to end, which ends its tasks; kill it if it does not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                process.send_signal(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await process.wait()
                    return
        self._unclean = True

    async def _cancel_steps(self) -> None:
        """End the tasks that an srun may have left behind when it was killed."""
        listed = await _output("squeue", "--steps", f"--jobs={self._allocation.job}", "--noheader", "--format=%i %j")
        steps = [line.split()[0] for line in listed.splitlines() if line.split()[1:] == [self._step]]
        if steps:
            await _output("scancel", "--signal=KILL", *steps)


async def _output(*words: str) -> str:
    """What one of Slurm's tools prints; nothing where it does not answer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(LEAVE_S):
            printed, _ = await process.communicate()
            return printed.decode(errors="replace")
    except TimeoutError:
        process.kill()
        return ""
