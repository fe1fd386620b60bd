"""The audit of `make chaos` finds what it is there for, and every kind of fault can be drawn."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from audit import audit_steps, left_of
from cuts import ports
from deck import Deck
from doubts import Doubt, wrong_of
from faults import flip_bit
from island import Island
from kinds import kinds
from regimes import REGIMES

from opd_async.run.trained import TrainedStep
from opd_async.scheduling.further import FURTHER_IDS

Rows = Sequence[Sequence[tuple[int, int, int, int, int]]]
GOOD: Rows = [
    [(0, 0, 5, 0, 0), (1, 0, 3, 0, 0)],
    [(1, 3, 9, 0, 1)],
    [(2, 0, 4, 1, 2)],
]


Given = dict[int, tuple[tuple[int, int, int], ...]]
"""By step: (sample, start, end) of what was given."""


def counted(rows: Rows, bound: int | None = 1, last: int = 3, given: Given | None = None) -> tuple[int, int, int, int]:
    steps = [
        TrainedStep(version, np.array(part, np.int64).reshape(-1, 5), given=(given or {}).get(version, ()))
        for version, part in enumerate(rows)
    ]
    found = audit_steps(steps, bound, 1, last)
    assert found.given == sum(end - start for parts in (given or {}).values() for _, start, end in parts)
    return found.twice, found.lost, found.too_old, found.steps_wrong


def test_a_run_without_fault_has_none() -> None:
    assert counted(GOOD) == (0, 0, 0, 0)


def test_further_samples_of_episodes_are_audited_and_pass_over_nobody() -> None:
    rows = [*GOOD[:2], [(2, 0, 4, 1, 2), (FURTHER_IDS + 5, 0, 4, 2, 2)]]
    assert counted(rows) == (0, 0, 0, 0)
    assert counted([*GOOD[:2], [*rows[2], (FURTHER_IDS + 5, 3, 6, 2, 2)]]) == (1, 0, 0, 0)
    assert counted([*GOOD[:2], [*rows[2], (FURTHER_IDS + 6, 1, 6, 2, 2)]]) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("step", "rows", "found"),
    [
        (1, [(1, 2, 9, 0, 1)], (1, 0, 0, 0)),
        (1, [(1, 4, 9, 0, 1)], (0, 1, 0, 0)),
        (2, [(2, 0, 4, 0, 2)], (0, 0, 1, 0)),
        (2, [(2, 0, 4, 2, 3)], (0, 0, 1, 0)),
        (2, [(0, 5, 9, 1, 2), (7, 0, 4, 2, 2)], (0, 4, 0, 0)),
    ],
)
def test_each_broken_step_is_counted(
    step: int, rows: list[tuple[int, int, int, int, int]], found: tuple[int, int, int, int]
) -> None:
    assert counted([*GOOD[:step], rows, *GOOD[step + 1 :]]) == found


EPISODES: Rows = [
    [(0, 2, 5, 0, 0), (0, 9, 12, 0, 0), (1, 0, 3, 0, 0)],
    [(1, 7, 9, 0, 1)],
    [(2, 0, 4, 1, 2)],
]
"""Sample 0 begins with given tokens, and sample 1 was cut within those that its second turn stands behind."""
BETWEEN: Given = {0: ((0, 0, 2), (0, 5, 9), (1, 3, 5)), 1: ((1, 5, 7),)}


def test_what_tools_say_stands_between_what_was_sampled() -> None:
    assert counted(EPISODES, given=BETWEEN) == (0, 0, 0, 0)
    assert counted(EPISODES)[1] == 2 + 4 + 4, "without it there are holes"


@pytest.mark.parametrize(
    ("step", "given", "found"),
    [
        (0, ((0, 0, 2), (0, 5, 8), (1, 3, 5)), (0, 1, 0, 0)),
        (0, ((0, 0, 2), (0, 4, 9), (1, 3, 5)), (1, 0, 0, 0)),
        (0, ((0, 0, 2), (0, 5, 9), (1, 3, 6)), (1, 0, 0, 0)),
        (1, (), (0, 2, 0, 0)),
        (2, ((1, 5, 7),), (2, 0, 0, 0)),
    ],
)
def test_given_tokens_that_are_missing_or_there_twice_are_counted(
    step: int, given: tuple[tuple[int, int, int], ...], found: tuple[int, int, int, int]
) -> None:
    changed = {**BETWEEN, step: given}
    if step == 2:  # taken once more, by a later step
        assert counted(EPISODES, given=changed) == (4, 0, 0, 0)
    else:
        assert counted(EPISODES, given=changed) == found


def test_steps_that_are_missing_or_out_of_order_are_counted() -> None:
    assert counted(GOOD, last=5) == (0, 0, 0, 2)
    assert counted([*GOOD, []], last=3) == (0, 0, 0, 1)


def test_whole_responses_have_no_bound() -> None:
    old: Rows = [[], [], [], [(0, 0, 5, 0, 3)]]
    assert counted(old, bound=None, last=4)[2] == 0 and counted(old, bound=1, last=4)[2] == 1


def test_a_process_that_is_left_is_named() -> None:
    import psutil

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        assert left_of([process]) == [f"process {child.pid}: {sys.executable} -c input()"]
        child.communicate(b"\n")
    assert left_of([process]) == []


def test_one_bit_flips(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    flip_bit(path, random.Random(1))
    assert sum(byte.bit_count() for byte in path.read_bytes()) == 1 and path.stat().st_size == 100


def test_there_are_kinds_for_every_role_of_every_regime() -> None:
    names = [kind.name for kind in kinds()]
    assert len(names) == len(set(names)) >= 25
    roles = {role for kind in kinds() for role in kind.roles}
    assert roles == {role for regime in REGIMES for role in regime.roles}
    assert {regime.bound is None for regime in REGIMES} == {True, False}, "both ways of making steps"
    for regime in REGIMES:
        sizes = [regime.changes.get(key, 1) for key in ("rollout__replicas", "engines__student__replicas")]
        assert sizes[0] <= sizes[1], f"{regime.name}: an actor without an engine is refused"


def test_every_kind_comes_as_often_as_it_should() -> None:
    every = [kind for kind in kinds() if set(kind.roles) <= set(REGIMES[0].roles)]
    deck = Deck(random.Random(1), every)
    deals = sum(kind.often for kind in every)
    thrown = Counter(deck.draw(REGIMES[0]).name for _ in range(2 * deals))
    assert thrown == {kind.name: 2 * kind.often for kind in every}


def test_nothing_is_cut_where_the_network_may_not_be() -> None:
    assert {kind.name for kind in kinds()} - {kind.name for kind in kinds(cuttable=False)} == {
        kind.name for kind in kinds() if " cut for " in kind.name
    }


def test_what_appears_in_a_folder_is_named(tmp_path: Path) -> None:
    island = Island(True, [tmp_path])
    (tmp_path / "before").touch()
    before = island.present()
    (tmp_path / "torchelastic_x").mkdir()
    (tmp_path / "torchelastic_x" / "inner").touch()
    assert island.left_since(before) == [f"left behind: {tmp_path / 'torchelastic_x'}"]


def test_cuts_are_of_ports_of_the_plan() -> None:
    plan: Any = SimpleNamespace(
        control="tcp://127.0.0.1:1",
        scored=("tcp://127.0.0.1:2",),
        batches=("tcp://127.0.0.1:3",),
        chunks=("tcp://127.0.0.1:4",),
        student_engines=("http://127.0.0.1:5",),
        teacher_engines=("http://127.0.0.1:6", "http://127.0.0.1:7"),
    )
    found = {of: ports(plan, of) for of in ("control", "scored", "batches", "chunks", "students", "teachers")}
    assert list(found.values()) == [[1], [2], [3], [4], [5], [6, 7]]


def test_what_is_survived_alone_is_named_and_not_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    late, gone = Doubt(REGIMES[0], "full disk", "late"), Doubt(REGIMES[1], "Ctrl-C twice", "gone")
    assert wrong_of([late, gone], lambda doubt: doubt is late) == ["gone"]
    assert capsys.readouterr().out == "Survived alone, and to be mended: late\n"


@pytest.mark.parametrize("texts", [["a", "b", "c"], ["error: a defect of this program: x"]])
def test_many_faults_and_defects_are_wrong_at_once(texts: list[str]) -> None:
    def survives(doubt: Doubt) -> bool:
        raise AssertionError("thrown again")

    assert wrong_of([Doubt(REGIMES[0], "full disk", text) for text in texts], survives) == texts
