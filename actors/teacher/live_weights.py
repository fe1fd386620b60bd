"""Which of the student's weights have scored, where the student's own engines teach (`opd.self.weights: live`). Pure.

    Resume(v), chunks of version v -> salt(): keys and values of weights v alone
    an answer -> made_by(): v, or what the engine says if that is older; older than the tokens: ask again

Scores that are never older than their tokens are within the bound on staleness whenever the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opd_async.actors.client.replies import Scores
from opd_async.errors import EngineError, EngineFault


class LiveWeights:
    """What a teacher actor knows of the weights that its engines hold."""

    def __init__(self) -> None:
        self.version = -1
        """The newest that all student engines have held."""
        self._history = 0
        self._mixed = 0

    def reached(self, version: int) -> None:
        """All student engines have held `version`: the dispatcher says so, or a token that one of them has sampled."""
        self.version = max(self.version, version)

    def forget(self) -> None:
        """The run goes back to a checkpoint: later weights of the same numbers are others."""
        self.version = -1
        self._history += 1

    def salt(self) -> str:
        """Whose keys and values a request may use: those that these weights have left behind, and no others."""
        return f"scores by {self.version} of {self._history}, {self._mixed}"

    def made_by(self, asked: int, newest: int, scores: Sequence[Scores]) -> list[Scores]:
        """The scores of tokens of which the newest are of version `newest`, with the weights that made them.

        Asked while the engines held `asked`: a request may begin with them and end with newer ones. Raises
        `EngineError` where an engine holds older weights than those of the tokens: one that was started again.
        """
        versions = [int(score.weight_version) if score.weight_version.isdecimal() else -1 for score in scores]
        oldest = min([asked, *versions])
        if oldest < newest:
            self._mixed += 1  # nothing of what such an engine has cached may be used again
            held = next((score.weight_version for score in scores if score.weight_version != str(asked)), asked)
            text = f"scored with weights {held!r:.40}, where the tokens are of {newest}: not there yet"
            raise EngineError(text, EngineFault.FOREIGN)
        return [replace(score, weight_version=str(oldest)) for score in scores]
