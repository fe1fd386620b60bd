"""When the student's own engines may score (`opd.self.weights: live`), and whose keys and values they may use.

    Resume(v) -> may score, with weights v -> Pause: weights are on their way, and nobody scores -> Resume(v + 1)

Scores made meanwhile would be of neither weights, and a request would hold up the next part of them. So a score is of
weights that were sent after its tokens were sampled, or of those that sampled them: what bounds the staleness of a
token bounds that of its score.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

from opd_async.actors.client.replies import Scores
from opd_async.errors import EngineError, EngineFault


class LiveWeights:
    """What a teacher actor knows of the weights that its engines hold."""

    def __init__(self, keeps_cache: bool) -> None:
        """`keeps_cache`: a response goes on with the keys and values that it has, as its generation does
        (`schedule.pause_mode: in_place`); else it is read anew by each version."""
        self.version = -1
        """What all student engines hold, while they may score."""
        self.pauses = 0
        """How often scoring was stopped: what was asked before and answered after is of unknown weights."""
        self._keeps_cache = keeps_cache
        self._may_score = asyncio.Event()
        self._process, self._history = uuid.uuid4().hex, 0  # engines outlive both

    @property
    def may_score(self) -> bool:
        """Whether the engines hold weights that the dispatcher has named."""
        return self._may_score.is_set()

    async def until_held(self) -> None:
        """Wait until the engines may score. On cancel: nothing has changed."""
        await self._may_score.wait()

    def resume(self, version: int) -> None:
        """All student engines hold `version`."""
        self.version = version
        self._may_score.set()

    def pause(self) -> None:
        """Weights are about to change."""
        self.pauses += 1
        self._may_score.clear()

    def forget(self) -> None:
        """The run goes back to a checkpoint: later weights of the same numbers are others."""
        self.pause()
        self._history += 1

    def salt(self, before: str, mixed: int) -> str:
        """Whose keys and values a request may use, given those that the sample's last one has used (none: ""). They are
        of no other run, history or weights; `mixed` counts how often the engine was found with others."""
        root = f"{self._process} {self._history} {mixed} "
        return before if self._keeps_cache and before.startswith(root) else f"{root}{self.version}"

    def canary_salt(self, number: int) -> str:
        """The same of a canary, whose parts find what its whole has left behind, and nothing else."""
        return f"{self._process} canary {number}"

    def check(self, scores: Sequence[Scores]) -> None:
        """Raises `EngineError` where an engine has scored with others: it was started again, and has yet to be sent
        them."""
        for score in scores:
            if score.weight_version != str(self.version):
                text = f"scored with weights {score.weight_version!r:.40}, where the run has sent {self.version}"
                raise EngineError(text, EngineFault.FOREIGN)
