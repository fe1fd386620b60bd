"""Resuming is exact for several steps, and what does not fit is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from tiny_learner import learner_config, micro_batch, step_batch, write_model
from torch.distributed.checkpoint.api import CheckpointException

from opd_async.errors import InputError, StorageError
from opd_async.learner import resume
from opd_async.learner.checkpoints import fixes as checkpoint_fixes
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import CheckpointError
from opd_async.learner.hf.io import save_hf
from opd_async.learner.trainer import Trainer
from opd_async.run import checkpoints


def steps(trainer: Trainer, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of the next steps; the data depends on the version only."""
    result = []
    for _ in range(count):
        metrics = trainer.step(step_batch(trainer.version, [micro_batch([9, 20, 14], seed=trainer.version)]))
        result.append((metrics.loss, metrics.grad_norm))
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_continues_bit_for_bit(alone: Place, model_path: Path, tmp_path: Path, dtype: str) -> None:
    config = learner_config(model_path, dtype=dtype)
    trainer = Trainer(config)
    steps(trainer, 2)
    assert resume.save(trainer, tmp_path / "learner") == checkpoints.shards_here(tmp_path)
    expected = steps(trainer, 4)
    resumed = Trainer(config)
    resume.load(resumed, tmp_path / "learner")
    assert resumed.version == 2
    assert steps(resumed, 4) == expected
    for ours, theirs in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_are_the_states_themselves(
    alone: Place, model_path: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would copy what is a view of a larger memory, and gather what it need not: three times everything."""
    trainer = Trainer(learner_config(model_path, dtype=dtype))
    steps(trainer, 1)
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    moments = {state[key].data_ptr() for state in inner.state.values() for key in ("exp_avg", "exp_avg_sq")}
    masters = {parameter.data_ptr() for group in inner.param_groups for parameter in group["params"]}
    weights = {parameter.data_ptr() for parameter in trainer.model.parameters()}
    written: list[torch.Tensor] = []

    def save(state: dict[str, object], *_: object, **__: object) -> None:
        written.extend(one.data for one in nested_values(state) if isinstance(one, ShardedTensor))

    monkeypatch.setattr(resume.dist_checkpointing, "save", save)
    resume.save(trainer, tmp_path / "learner")
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in written)
    assert moments | masters | weights <= {tensor.data_ptr() for tensor in written}
    states = 3 * sum(parameter.numel() for group in inner.param_groups for parameter in group["params"]) * 4
    assert sum(tensor.nbytes for tensor in written) == states + sum(p.nbytes for p in trainer.model.parameters())


def test_states_that_the_library_gathered_are_read_too(
    alone: Place, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As checkpoints had them before 2026-11-30, and as Megatron's own tools write them."""
    trainer = Trainer(learner_config(model_path))
    steps(trainer, 2)

    def gathered(optimizer: Any, model_state: dict[str, Any]) -> Any:
        metadata = {"distrib_optim_sharding_type": resume.OPTIMIZER_FORMAT}
        with checkpoint_fixes.padded_buckets(trainer.optimizer):
            return optimizer.sharded_state_dict(model_state, is_loading=False, metadata=metadata)["param_state"]

    monkeypatch.setattr(resume, "saved_states", gathered)
    resume.save(trainer, tmp_path / "learner")
    resumed = Trainer(learner_config(model_path))
    resume.load(resumed, tmp_path / "learner")
    assert steps(resumed, 3) == steps(trainer, 3)


def test_a_checkpoint_before_the_first_step(alone: Place, model_path: Path, tmp_path: Path) -> None:
    trainer = Trainer(learner_config(model_path))
    resume.save(trainer, tmp_path / "learner")
    expected = steps(trainer, 3)
    resumed = Trainer(learner_config(model_path))
    resume.load(resumed, tmp_path / "learner")
    assert steps(resumed, 3) == expected


def test_a_checkpoint_that_was_cut_short_is_refused_by_name(alone: Place, model_path: Path, tmp_path: Path) -> None:
    folder = checkpoints.step_folder(tmp_path, 1)
    trainer = Trainer(learner_config(model_path))
    steps(trainer, 1)
    resume.save(trainer, folder / "learner")
    checkpoints.seal(folder, 1)
    assert checkpoints.newest(tmp_path).folder == folder
    shard = folder / "learner" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"__0_0\.distcp"):
        checkpoints.newest(tmp_path)


def test_saving_again_replaces_what_an_interrupted_save_left(alone: Place, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "__7_0.distcp").write_bytes(b"rest")
    trainer = Trainer(learner_config(model_path))
    resume.save(trainer, tmp_path / "learner")
    assert not (tmp_path / "learner" / "__7_0.distcp").exists()
    resume.load(trainer, tmp_path / "learner")


def test_a_checkpoint_of_another_model_is_refused(alone: Place, model_path: Path, tmp_path: Path) -> None:
    resume.save(Trainer(learner_config(model_path)), tmp_path / "learner")
    other = Trainer(learner_config(write_model(tmp_path / "other", "llama")))
    with pytest.raises(CheckpointError, match=r"cannot be loaded into the model .*shape mismatch"):
        resume.load(other, tmp_path / "learner")
    with pytest.raises(CheckpointError, match="nowhere"):
        resume.load(other, tmp_path / "nowhere")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")


def full_on_a_rank(*_: object, **__: object) -> None:
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/__0_0.distcp")
    raise CheckpointException("write", {0: (error, StackSummary())})


def test_a_disk_without_room_is_known_before_anything_is_written(
    alone: Place, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(learner_config(model_path))
    monkeypatch.setattr(resume, "reserve", full)
    with pytest.raises(StorageError, match="/data/x cannot be written: No space left on device; make room there"):
        resume.save(trainer, tmp_path / "learner")
    assert list((tmp_path / "learner").iterdir()) == []
    sizes: list[int] = []
    monkeypatch.setattr(resume, "reserve", lambda folder, size: sizes.append(size))
    resume.save(trainer, tmp_path / "learner")
    written = sum(file.stat().st_size for file in (tmp_path / "learner").iterdir())
    assert written <= sizes[0] <= written + 2 * resume.SMALL_BYTES, "as much as it takes, and little more"


def test_a_disk_that_fills_up_under_a_rank_is_named(
    alone: Place, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(learner_config(model_path))
    monkeypatch.setattr(resume.dist_checkpointing, "save", full_on_a_rank)
    with pytest.raises(StorageError, match=r"__0_0.distcp cannot be written: No space left on device"):
        resume.save(trainer, tmp_path / "learner")


def test_an_export_without_room_leaves_nothing(
    alone: Place, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(learner_config(model_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="/data/x cannot be written: No space left"):
            save_hf(trainer.model, tmp_path / "export", model_path)
    assert list(tmp_path.iterdir()) == []
    save_hf(trainer.model, tmp_path / "export", model_path)
    assert (tmp_path / "export" / "config.json").is_file()
