"""Checkpoints from elsewhere: what they hold is data, never code."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_learner import learner_config

from opd_async.learner import resume
from opd_async.learner.checkpoints import model as checkpoint_model
from opd_async.learner.checkpoints.unpickle import load_index
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import CheckpointError
from opd_async.learner.trainer import Trainer


class Hostile:
    """Unpickling one makes a folder."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._proof),)


def in_metadata(folder: Path, proof: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(proof)))


def inside_metadata(folder: Path, proof: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Hostile(proof)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def in_common(folder: Path, proof: Path) -> None:
    torch.save({"version": Hostile(proof)}, folder / "common.pt")


HIDDEN: list[Callable[[Path, Path], None]] = [in_metadata, inside_metadata, in_common]
LOADS: dict[str, Callable[[Trainer, Path], object]] = {
    "resume": resume.load,
    "load": resume.load_weights,
    "teacher": lambda trainer, folder: checkpoint_model.load_model(trainer.model, folder),
    "dtype": lambda trainer, folder: checkpoint_model.stored_dtype(folder),
}


@pytest.mark.parametrize("hide", HIDDEN, ids=lambda hide: hide.__name__)
@pytest.mark.parametrize("name", LOADS)
def test_a_hostile_checkpoint_runs_nothing(
    alone: Place, model_path: Path, tmp_path: Path, hide: Callable[[Path, Path], None], name: str
) -> None:
    trainer, folder, proof = Trainer(learner_config(model_path)), tmp_path / "learner", tmp_path / "code-has-run"
    resume.save(trainer, folder)
    hide(folder, proof)
    if name == "dtype" and hide is in_common:  # which that does not read
        LOADS[name](trainer, folder)
    else:
        with pytest.raises(CheckpointError, match=r"refers to posix\.mkdir, which no checkpoint needs") as caught:
            LOADS[name](trainer, folder)
        assert "weights_only" not in str(caught.value)
    assert not proof.exists()


def test_an_object_among_the_shards_is_checked_too(tmp_path: Path) -> None:
    checkpoint_model.checkpoint_fixes.install()
    planner: Any = checkpoint_model.checkpoint_fixes.unpickle.default_planner.DefaultLoadPlanner()
    buffer = io.BytesIO()
    torch.save(Hostile(tmp_path / "code-has-run"), buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        planner.load_bytes(None, buffer)
    assert not (tmp_path / "code-has-run").exists()


def test_a_damaged_index_is_refused_or_read_but_never_anything_else(
    alone: Place, model_path: Path, tmp_path: Path
) -> None:
    resume.save(Trainer(learner_config(model_path)), tmp_path / "learner")
    whole = (tmp_path / "learner" / ".metadata").read_bytes()
    draws = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        try:
            load_index(io.BytesIO(bytes(damaged)))
        except pickle.UnpicklingError:
            continue
    with pytest.raises(pickle.UnpicklingError, match=r"damaged|truncated"):
        load_index(io.BytesIO(whole[: len(whole) // 2]))
