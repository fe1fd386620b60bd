"""Which fault comes next: kinds in random order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kinds import Kind
from regimes import Regime


class Deck:
    """Kinds in random order, each as often as it should before any comes more often."""

    def __init__(self, chance: random.Random, every: Sequence[Kind]) -> None:
        self._chance = chance
        self.kinds = tuple(every)
        self._every = [kind for kind in every for _ in range(kind.often)]
        self._cards: list[Kind] = []

    def suits(self, regime: Regime) -> bool:
        """Whether a run of this regime has the roles for any kind."""
        return any(set(kind.roles) <= set(regime.roles) for kind in self._every)

    def draw(self, regime: Regime) -> Kind:
        """The next kind that this regime has the roles for."""
        for _ in range(2):
            for kind in self._cards:
                if set(kind.roles) <= set(regime.roles):
                    self._cards.remove(kind)
                    return kind
            self._cards += self._chance.sample(self._every, len(self._every))
        raise AssertionError(f"no kind suits {regime.name}")
