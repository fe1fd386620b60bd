"""Megatron's parameters of some ranks of a layout that is never started, on the meta device, against the mapping.

    python fake_ranks.py <folder with config.json> ...

Prints a line per model and rank; ends with a traceback at the first parameter without a slot, or of another shape.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.distributed.cpu import on_this_device
from opd_async.learner.hf.io import local_slots
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.decoder import build_model

LAYOUT = ParallelConfig(tensor=2, pipeline=2)
RANKS = (0, 3)
"""One of each stage and of each tensor-parallel half."""


def check(folder: Path, rank: int) -> int:
    """The number of parameters on the rank, after comparing each with its slot."""
    dist.init_process_group("fake", rank=rank, world_size=LAYOUT.tensor * LAYOUT.pipeline, store=FakeStore())
    parallel_state.initialize_model_parallel(LAYOUT.tensor, LAYOUT.pipeline, create_gloo_process_groups=False)
    shape = read_shape(folder)
    with on_this_device(), torch.device("meta"):
        model = build_model(shape, LearnerConfig(model_path=folder, parallel=LAYOUT))
    there = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mapped = {}
    for name, slot in local_slots(model):
        full = [torch.empty(size, device="meta") for size in slot.hf_shapes]
        part = slot.split(full, parallel_state.get_tensor_model_parallel_rank(), LAYOUT.tensor)
        assert name not in mapped, f"{name} has two slots"
        mapped[name] = tuple(part.shape)
    assert mapped == there, sorted(set(mapped.items()) ^ set(there.items()))[:8]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return len(there)


def main() -> None:
    """All models."""
    warnings.simplefilter("ignore")
    for folder in map(Path, sys.argv[1:]):
        for rank in RANKS:
            print(folder.name, rank, check(folder, rank))


if __name__ == "__main__":
    main()
