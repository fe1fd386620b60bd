"""What a rank says of its work: every micro-batch is progress, and only the time without any is a hang."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_learner import learner_config, micro_batch, split, step_batch, write_model

from opd_async.learner import beats as beats_module
from opd_async.learner import progress as progress_module
from opd_async.learner.beats import KNOWN_AFTER, Beats
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.progress import PROGRESS, Progress
from opd_async.learner.trainer import Trainer


class Time:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    for module in (beats_module, progress_module):
        monkeypatch.setattr(module, "time", time)
    monkeypatch.setattr(PROGRESS, "at", 0.0)
    return time


def test_a_beat_says_since_when_nothing_was_done(time: Time) -> None:
    beats = Beats("inproc://nobody", 0)
    for _ in range(KNOWN_AFTER):
        with beats.at("Train"):
            time.now += 4.0
    assert beats.beat().doing == "" and beats.beat().still_s == 0.0
    with beats.at("Train"):
        time.now += 50.0
        beat = beats.beat()
        assert (beat.for_s, beat.usual_s, beat.still_s) == (50.0, 4.0, 50.0)
        PROGRESS.made()
        time.now += 3.0
        beat = beats.beat()
        assert (beat.for_s, beat.usual_s, beat.still_s) == (53.0, 4.0, 3.0)
        assert list(PROGRESS.over([1, 2])) == [1, 2] and beats.beat().still_s == 0.0


def test_every_micro_batch_is_progress(tmp_path: Path, alone: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(Progress, "made", lambda self: made.append(1))
    trainer = Trainer(learner_config(write_model(tmp_path, "qwen3-tied")))
    trainer.step(step_batch(0, list(split(micro_batch([9, 31, 14, 22], seed=0)))))
    assert len(made) == 4
