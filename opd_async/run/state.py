"""What the script of a run decides and the dispatcher reads: the one state that both of them share."""

from __future__ import annotations

from dataclasses import dataclass, field

from opd_async.cluster.supervisor import Exit
from opd_async.scheduling.leases import LeaseBook

UPDATE = "update"
"""Mailbox key of what the script waits for between steps: a `LearnerReply` to a step, or `RESYNC`."""
RESYNC = "resync"
"""A student engine is back and needs the current weights."""


@dataclass(slots=True, kw_only=True)
class RunState:
    """The present of one run. The comments say who writes; everybody else reads."""

    version: int = -1
    """Weights that every student engine holds; -1 while none are proven. The script."""
    book: LeaseBook | None = None
    """Leases since the last checkpoint that was gone back to; None until the frontier is known. The script."""
    engine_group: int = 0
    """Number of the process group of learner and engines; grows whenever it must be made anew. Both: the dispatcher
    when an engine is back, the script when the weights could not be sent."""
    resetting: dict[str, int] = field(default_factory=dict)
    """The number of the `Reset` that each actor has still to answer. The script; the dispatcher takes out who has."""
    reclaiming: list[frozenset[int]] = field(default_factory=list)
    """The samples of each `Reclaim` that the intake has still to answer. The dispatcher."""
    lost: Exit | None = None
    """How the learner or the intake ended, once `Dispatcher.learner_lost` is set. The dispatcher."""

    def forget(self) -> None:
        """The learner is gone: what was known of its weights and samples counts no more."""
        self.version = -1
        self.book = None
        self.reclaiming.clear()
        self.engine_group += 1
