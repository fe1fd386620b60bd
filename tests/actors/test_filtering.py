"""`schedule.filter`: asked once for each finished group; what it raises names the group."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from opd_async.actors.intake.filtering import FinishedGroup, GroupFilter
from opd_async.hooks import HookError
from opd_async.scheduling.further import FURTHER_IDS

MODULE = """
def keep(group):
    return len(set(group.rewards)) > 1

def raising(group):
    return 1 / (group.sample_ids[0] - 4)

def wrong(group):
    return "yes"
"""


class One(NamedTuple):
    sample_id: int
    reward: float | None
    end: int = 7
    episode: int | None = None


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "filter_hooks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("filter_hooks", None)


def test_groups_are_kept_or_left_out_whole() -> None:
    rewards = {4: 1.0, 5: 1.0, 6: 0.0, 7: 1.0, 8: None, 9: None}
    taken = [One(sample, reward) for sample, reward in rewards.items()]
    assert [one.sample_id for one in GroupFilter("filter_hooks:keep", 2).kept(taken)] == [6, 7]
    everything = GroupFilter(None, 2)
    assert everything.kept(taken) == taken and not everything.there
    assert GroupFilter("filter_hooks:keep", 2).there


def test_the_group_says_what_is_known_of_it() -> None:
    asked: list[FinishedGroup] = []
    chosen = GroupFilter("filter_hooks:keep", 2)
    chosen._keep = lambda group: asked.append(group) is None
    chosen.kept([One(4, 1.0, 9), One(5, None, 0)])
    assert asked == [FinishedGroup(sample_ids=(4, 5), rewards=(1.0, None), lengths=(9, 0))]


def test_further_conversations_go_the_way_of_their_episodes() -> None:
    taken = [One(4, 1.0), One(FURTHER_IDS, 1.0, episode=4), One(5, 0.0), One(6, 1.0), One(7, 1.0)]
    taken.append(One(FURTHER_IDS + 1, 0.0, episode=7))
    kept = GroupFilter("filter_hooks:keep", 2).kept(taken)
    assert [one.sample_id for one in kept] == [4, FURTHER_IDS, 5], "what they have earned is not asked for"


def test_what_it_raises_names_the_group() -> None:
    words = r"schedule.filter: filter_hooks:raising raised ZeroDivisionError: .* for group 2 \(samples 4 to 5\)"
    with pytest.raises(HookError, match=words):
        GroupFilter("filter_hooks:raising", 2).kept([One(4, 1.0), One(5, 1.0)])
    with pytest.raises(HookError, match=r"returned 'yes' for group 2 \(samples 4 to 5\), not True or False; mend"):
        GroupFilter("filter_hooks:wrong", 2).kept([One(4, 1.0), One(5, 1.0)])
