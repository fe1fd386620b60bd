"""What the launcher and the agents of its hosts say to each other.

An agent joins, is asked to start and stop processes, and reports their ends and their loud lines. It beats, and the
launcher echoes each beat: an agent whose beats come back unanswered for too long ends everything on its host.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.transport.wire import message


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """An agent wants to serve host `host`; `incarnation` tells one start of it from the next."""

    host: str
    incarnation: str
    before: str
    """The incarnation that it takes the place of; empty for an agent that has just been started."""
    address: str
    """IPv4 address of the host on the way to the launcher."""
    gpus: int
    cores: int
    versions: dict[str, str]
    """Of each package that has to be the same on every host."""


@message
@dataclass(frozen=True, slots=True)
class Welcome:
    """The agent belongs to the run."""

    fence_s: float
    lost_s: float
    stop_deadline_s: float


@message
@dataclass(frozen=True, slots=True)
class Leave:
    """End every process and go; with `again_s` above 0 join again so many seconds later, as a new incarnation."""

    reason: str
    failed: bool
    again_s: float


@message
@dataclass(frozen=True, slots=True)
class Farewell:
    """The agent was told to end, and has ended every process of its host."""

    reason: str


@message
@dataclass(frozen=True, slots=True)
class AgentBeat:
    """An agent is alive; the launcher sends the same number back, with the time of its clock."""

    number: int
    clock_s: float = 0.0


@message
@dataclass(frozen=True, slots=True)
class FindPorts:
    """Find and claim `count` free ports, answered by `Answer.numbers`; see that `ports` can be bound."""

    request: int
    count: int
    ports: list[int]


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class LookAt:
    """Work in `folder` from now on, show that the file `seen` there holds `nonce` by writing `mine`, and find `paths`.

    Answered by an `Answer` whose error names the path that is not what it should be.
    """

    request: int
    folder: str
    seen: str
    mine: str
    nonce: str
    paths: list[str]


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class StartProcess:
    """Start a process; its environment is the agent's with `env`. Answered once it exists."""

    request: int
    role: str
    incarnation: str
    words: list[str]
    """The command."""
    own_python: bool
    """The first word of the command is the agent's own Python."""
    env: dict[str, str]
    log: str
    secrets: list[str]


@message
@dataclass(frozen=True, slots=True)
class StopProcess:
    """Stop a process in order, or at once; answered when all of it is gone."""

    request: int
    role: str
    at_once: bool


@message
@dataclass(frozen=True, slots=True)
class KillProcess:
    """Kill a process as a crash would; its end is reported like any other."""

    role: str


@message
@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request; `error` says why it was not done."""

    request: int
    error: str | None
    numbers: list[int]


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnded:
    """A process has ended unasked; said again until the launcher has seen it."""

    number: int
    role: str
    incarnation: str
    exit_code: int
    killed_by: int
    """Number of the signal that has ended it; 0 if none did."""
    lines: list[str]
    """The last of its log."""


@message
@dataclass(frozen=True, slots=True)
class EndSeen:
    """The launcher has the end with this number."""

    number: int


@message
@dataclass(frozen=True, slots=True)
class Lines:
    """What the host's processes have said at WARNING or above, and how many lines their logs had no room for."""

    lines: list[str]
    lost: int
