"""Which hosts a run is on: the section `cluster` of a topology."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from opd_async.config.section import NonNegative, Positive, Seconds, Section

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Backend(StrEnum):
    """How the agents of a run get onto its hosts."""

    LOCAL = "local"
    """One host, no agent: every process is a child of the launcher."""
    AGENTS = "agents"
    """Started by somebody else (Kubernetes, ssh, a person); they join the launcher."""
    SLURM = "slurm"
    """Started by the launcher on the nodes of its Slurm allocation, by one `srun`."""
    RAY = "ray"
    """Started by the launcher on nodes of the Ray cluster that it is in, by an actor on each."""


class ClusterSection(Section):
    """The hosts of a run, and what is done when one of them is lost (docs/cluster.md)."""

    backend: Backend = Backend.LOCAL
    """`local`: one host. `agents`: several, on each of which somebody has started `python -m opd_async.agent`. `slurm`:
    the nodes of the allocation that the launcher is in, on which it starts the agents. `ray`: nodes of the Ray cluster
    that the launcher is in."""
    nodes: Positive = 1
    """Number of hosts, with that of the launcher. With `backend: slurm` it may be left out: all that were allocated."""
    spare_nodes: NonNegative = 0
    """Hosts beside `nodes` that may join while the run goes on. Each brings as many student engines as it has devices
    for, and a rollout actor that drives them."""
    gpus_per_node: NonNegative = 0
    """GPUs that one host has. Engines and learner with `devices: [cuda]` get whole ones."""
    slots_per_node: Positive = 4
    """CPU engines and CPU learner ranks that one host takes."""
    launcher_takes_devices: bool = True
    """Whether engines and learner ranks may be on the launcher's host too."""
    interface: str | None = None
    """Network interface (`eth0`) or network (`10.0.0.0/8`) of every host. Null: the one that leads to the launcher."""
    port: int = Field(default=19999, ge=1024, le=65535)
    """Port of the launcher's host at which agents join."""
    python: str | None = None
    """Python of the agents that the launcher starts (`slurm`, `ray`). Null: the launcher's, at the same path."""
    ray_python: str | None = None
    """With `backend: ray`, a Python that has the Ray of the cluster, and need have nothing else. Null: the
    launcher's (extra `ray`)."""
    env: dict[Variable, str] = Field(default={})
    """Environment variables of every process, on every host."""
    join_s: Seconds = 600.0
    """How long the launcher waits for every agent to join."""
    fence_s: Seconds = 30.0
    """An agent whose launcher has not heard it for so long ends everything that it has started."""
    lost_s: Seconds = 45.0
    """A host that was silent for so long is lost: its processes are started again when it is back. More than
    `fence_s`, so that nothing of it runs any more by then."""
    node_back_s: Seconds = 600.0
    """How long the run waits for a lost host that it cannot go on without. A learner then goes on with fewer hosts, if
    its sizes allow that (docs/cluster.md)."""
