"""Losses, estimators and rewards are tables that everything else reads: no row without documentation or a function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from small_runs import small_topology

from opd_async.actors.rewards.rules import LOADERS
from opd_async.checks.validation import validate, warnings
from opd_async.config import estimators, losses, rewards
from opd_async.config.estimators import ESTIMATORS, Estimator
from opd_async.config.learning import OpdSection
from opd_async.config.losses import LOSSES, OPTIONS, REFUSED, LossFacts, Needs, idle_options, teacher_problem
from opd_async.config.rewards import REWARDS, RewardKind
from opd_async.estimators.advantages import FUNCTIONS

ROOT = Path(__file__).parents[2]


def documented_rows() -> set[str]:
    """Every line of a table in the documentation."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    return {line for page in pages for line in page.read_text().splitlines() if line.startswith("|")}


@pytest.mark.parametrize("table", [losses, estimators, rewards])
def test_every_row_is_documented(table: object) -> None:
    rows: list[str] = table.documentation()  # type: ignore[attr-defined]
    module = table.__name__  # type: ignore[attr-defined]
    missing = [row for row in rows if row not in documented_rows()]
    assert not missing, f"replace the rows in the documentation by those that `python -m {module}` prints"


def test_losses_are_documented_where_they_are_explained() -> None:
    text = (ROOT / "docs/learning.md").read_text()
    assert all(row in text for row in losses.documentation())
    explained = text.partition("## When to use which")[2].partition("\n## ")[0]
    assert [name for name in LOSSES if f"`{name}`" not in explained] == []


def test_twins_are_losses_for_a_teacher_at_the_other_place() -> None:
    for name, facts in LOSSES.items():
        if facts.twin is not None:
            twin = LOSSES[facts.twin]
            assert twin.twin == name and {facts.needs, twin.needs} == {Needs.TOPK, Needs.FULL}
            assert (twin.ratio, twin.whole) == (facts.ratio, facts.whole)


def test_advice_names_losses_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a loss that only one of the two teachers can give."""
    monkeypatch.setitem(
        LOSSES, "skew_kl_topk", LossFacts(needs=Needs.TOPK, options=("topk",), formula="", looks_at="*S*")
    )
    monkeypatch.setitem(LOSSES, "skew_kl_all", LossFacts(needs=Needs.FULL, formula="", looks_at="every *v*"))
    for name in LOSSES:
        for in_learner in (False, True):
            problem = teacher_problem(name, in_learner)
            assert (problem is not None) is (LOSSES[name].needs is (Needs.TOPK if in_learner else Needs.FULL))
            if problem is not None:
                written = problem.rpartition("write ")[2].partition(", or opd.type")[0].split(" or ")
                assert set(written) <= set(LOSSES), problem
                assert [teacher_problem(other, in_learner) for other in written] == [None] * len(written)
    assert teacher_problem("no such loss", True) is None


def test_refused_losses_are_not_offered() -> None:
    assert not set(REFUSED) & set(LOSSES)


def test_options_are_keys_and_idle_where_they_do_not_act() -> None:
    assert set(OPTIONS) <= set(OpdSection.model_fields)
    those = {"signal_clamp", "clip_ratio", "mismatch", "topk", "jsd_beta"}

    def idle(name: str, *, ratio: bool = False) -> set[str]:
        return set(idle_options(name, ratio=ratio)) & those

    assert idle("reverse_kl") == {"topk", "jsd_beta"}
    assert idle("minillm_topk") == {"jsd_beta"}
    assert idle("jsd_full") == {"signal_clamp", "clip_ratio", "mismatch", "topk"}
    assert idle("jsd_full", ratio=True) == {"signal_clamp", "topk"}
    assert idle("sft") == those


def test_a_key_that_does_nothing_is_said(tmp_path: Path) -> None:
    def said(*overrides: str) -> list[str]:
        topology = small_topology(tmp_path, *overrides)
        assert validate(topology) == []
        return warnings(topology)

    (line,) = said("opd.jsd_beta=0.3")
    assert line == "opd.jsd_beta: 0.3 has no part in reverse_kl; write 0.5, or leave it out"
    topk = ("opd.loss=forward_kl_topk", "opd.topk=8")
    assert said(*topk) == []
    (line,) = said(*topk, "opd.mismatch=icepop")
    assert line == 'opd.mismatch: "icepop" has no part in forward_kl_topk; write "none", or leave it out'
    assert said(*topk, "opd.mismatch=icepop", "advantage.reference_kl_coef=0.1") == []
    assert said(*topk, "opd.clip_ratio=null") == []
    (line,) = said(*topk, "opd.clip_ratio=0.3")
    assert line == "opd.clip_ratio: 0.3 has no part in forward_kl_topk; write 0.2, or leave it out"


def test_every_estimator_has_facts_and_a_function() -> None:
    """Those with a critic get their advantages in the learner; `none` has none."""
    assert list(ESTIMATORS) == list(Estimator)
    own = {estimator for estimator, facts in ESTIMATORS.items() if facts.rewards and not facts.critic}
    assert set(FUNCTIONS) == own
    assert all(estimator.facts is ESTIMATORS[estimator] for estimator in Estimator)


def test_every_kind_of_reward_has_facts_and_a_rule() -> None:
    assert list(REWARDS) == list(RewardKind)
    assert set(LOADERS) == {kind for kind in RewardKind if kind.facts.pool}
    assert {kind for kind in RewardKind if not kind.facts.pool} == {RewardKind.NONE, RewardKind.EPISODE}


def test_every_loss_has_a_function_in_the_learner() -> None:
    """By name, without torch: `tests/learner/test_loss_table.py` calls them."""
    files = (ROOT / "learner/losses").glob("*.py")
    found = {
        key.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert set(LOSSES) <= found, set(LOSSES) - found
