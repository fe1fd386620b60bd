"""The table of losses and the functions behind it are the same set, each where its needs say."""

from __future__ import annotations

import pytest

from opd_async.config.losses import LOSSES, Needs
from opd_async.learner.losses import divergences, sampled
from opd_async.learner.losses.divergences import DIVERGENCES
from opd_async.learner.losses.full_divergences import FORMULAS
from opd_async.learner.losses.objective import SAMPLED

FUNCTIONS = {Needs.NOTHING: SAMPLED, Needs.TOPK: DIVERGENCES, Needs.FULL: FORMULAS}


@pytest.mark.parametrize("needs", list(Needs))
def test_every_loss_has_a_function_and_every_function_is_a_loss(needs: Needs) -> None:
    assert set(FUNCTIONS[needs]) == {name for name, facts in LOSSES.items() if facts.needs is needs}


@pytest.mark.parametrize("name", [name for name, facts in LOSSES.items() if facts.needs is not Needs.FULL])
def test_every_loss_says_what_it_estimates_and_where_it_is_from(name: str) -> None:
    function = getattr(sampled, name, None) or getattr(divergences, name)
    text = function.__doc__ or ""
    assert "Estimates:" in text and "taleness" in text and ("On the wire:" in text or "on the wire" in text)
