"""How much of a teacher's scores is suspect when it is found wrong: what came since the last good canary, no more."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from opd_async.data.jsonl import read_jsonl
from opd_async.run.suspects import FILE_NAME, Suspects
from opd_async.run.trained import TrainedRecord
from opd_async.scheduling.unproven import Scored, Unproven
from opd_async.transport.messages import SuspectScores


def test_a_canary_proves_what_was_scored_before_it_was_sent() -> None:
    unproven = Unproven(100)
    one, two, three = Scored(1, 0, 10), Scored(2, 0, 20), Scored(1, 10, 15)
    unproven.scored(one)
    unproven.check_begins()
    unproven.scored(two)
    assert unproven.tokens == 30
    unproven.passed()
    assert unproven.tokens == 20
    unproven.check_begins()
    unproven.scored(three)
    unproven.unanswered()
    unproven.check_begins()
    assert unproven.suspect() == [two, three] and unproven.suspect() == [] and unproven.tokens == 0
    unproven.passed()
    assert unproven.tokens == 0


def test_it_is_time_for_a_canary_before_batches_have_to_wait() -> None:
    unproven = Unproven(100)
    unproven.scored(Scored(1, 0, 49))
    assert not unproven.due and unproven.room(51) and not unproven.room(52)
    unproven.scored(Scored(1, 49, 50))
    assert unproven.due and unproven.room(50)
    assert Unproven(100).room(5000), "a batch alone may be larger"


@pytest.mark.parametrize("seed", range(20))
def test_no_more_than_the_limit_is_ever_unproven(seed: int) -> None:
    """Batches of random sizes, canaries that are answered late or not at all, in random order."""
    chance, unproven, flying, checking, sample = random.Random(seed), Unproven(1000), [], False, 0
    for _ in range(3000):
        act = chance.random()
        size = chance.randrange(1, 200)
        if act < 0.5 and unproven.room(200):
            unproven.begins(size)
            flying.append(size)
        elif act < 0.8 and flying:
            size = flying.pop(chance.randrange(len(flying)))
            unproven.ends(size)
            if chance.random() < 0.9:
                unproven.scored(Scored(sample := sample + 1, 0, size))
        elif act < 0.9 and not checking and unproven.due:
            unproven.check_begins()
            checking = True
        elif checking:
            (unproven.passed if chance.random() < 0.7 else unproven.unanswered)()
            checking = False
        assert unproven.tokens <= 1000 and unproven.tokens + sum(flying) <= 1000
    assert sum(part.end - part.start for part in unproven.suspect()) <= 1000


def test_the_report_says_which_steps_trained_them(tmp_path: Path) -> None:
    record = TrainedRecord(tmp_path, print, 0, None)
    for version, ranges in enumerate(([(1, 0, 5), (2, 0, 9)], [(1, 5, 9)], [(3, 0, 4)])):
        record.write(version, np.array([(*part, version, version) for part in ranges], np.int64))
    record.close()
    said: list[str] = []
    suspects = Suspects(tmp_path, said.append)
    assert suspects.summary() == []
    ids, starts, ends = np.array([1, 1, 7], np.int64), np.array([3, 6, 0], np.int32), np.array([6, 20, 2], np.int32)
    suspects.add(SuspectScores("http://t", "it changed", ids, starts, ends))
    (found,) = suspects.summary()
    assert (found.tokens, found.samples, found.trained_tokens, found.steps) == (19, [1, 7], 3 + 3, [1, 2])
    assert said == [
        "http://t scored 19 suspect tokens since its last good canary, of 2 samples (1, 7); "
        f"{tmp_path / FILE_NAME} lists them"
    ]
    rows = list(read_jsonl(tmp_path / FILE_NAME))
    assert rows == [{"engine": "http://t", "reason": "it changed", "ranges": [[1, 3, 6], [1, 6, 20], [7, 0, 2]]}]
