"""Hugging Face folders to Megatron checkpoints and back, without a second copy of the model in memory.

    python -m learner.convert hf-to-megatron --hf DIR --out DIR
    python -m learner.convert megatron-to-hf --checkpoint DIR --source DIR --out DIR

    hf-to-megatron   safetensors, one tensor at a time -> sharded model -> DIR.tmp -> DIR (torch_dist, weights alone)
    megatron-to-hf   checkpoint -> sharded model -> one tensor at a time -> DIR.tmp -> DIR (safetensors)

A checkpoint loads at any tensor- and pipeline-parallel size, whatever it was written at, so one process is enough.
Where the model does not fit into one, start it with torchrun and give `--tp`, `--pp` or, for mixtures of experts,
`--ep`: every rank holds its part.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opd_async.errors import InputError
from opd_async.learner.checkpoints import model as model_checkpoint
from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.distributed.cpu import on_this_device, this_device
from opd_async.learner.hf.files import put_in_place
from opd_async.learner.hf.io import load_hf, save_hf
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.decoder import DecoderModel, build_model
from opd_async.process import report_failure
from opd_async.run import checkpoints

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")


def hf_to_megatron(hf: Path, out: Path, parallel_config: ParallelConfig) -> None:
    """Write the weights of the folder `hf` as a checkpoint, in the dtype that its config names.

    All ranks call it, after `learner.parallel.start`. Raises `ModelError` if `hf` cannot be read.
    """
    model = _model(hf, read_shape(hf).dtype, parallel_config)
    load_hf(model, hf)
    folder = out.with_name(f"{out.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    model_checkpoint.save_model(model, folder)
    if dist.get_rank() == 0:
        put_in_place(folder, out)
    dist.barrier()


def megatron_to_hf(folder: Path, source: Path, out: Path, parallel_config: ParallelConfig) -> None:
    """Write a checkpoint's weights as a Hugging Face folder, in the dtype and with the other files of `source`.

    `folder` is any that `opd_async.run.checkpoints.shards` takes; it is verified first, and nothing in it changes.
    All ranks call it. Raises `InputError` if it is cut short, `CheckpointError` if it is not of the model of `source`.
    """
    shards = checkpoints.shards(folder, thorough=True)
    stored = str(model_checkpoint.stored_dtype(shards)).removeprefix("torch.")
    model = _model(source, stored, parallel_config)
    model_checkpoint.load_model(model, shards)
    save_hf(model, out, source)


def _model(path: Path, dtype: str, parallel_config: ParallelConfig) -> DecoderModel:
    """This rank's part of the model in `path`, with weights still to be filled in."""
    if dtype not in DTYPES:
        raise InputError(f"weights in {dtype} cannot be converted (only {' and '.join(DTYPES)}); cast them first")
    config = LearnerConfig(
        model_path=path, dtype="bfloat16" if dtype == "bfloat16" else "float32", parallel=parallel_config
    )
    with on_this_device():
        model: DecoderModel = build_model(read_shape(path), config).to(this_device())
    return model


def _arguments(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="Hugging Face folders to Megatron checkpoints and back.")
    commands: Any = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="safetensors to a checkpoint to start from")
    to_megatron.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    to_hf = commands.add_parser("megatron-to-hf", help="a checkpoint's weights to safetensors")
    to_hf.add_argument("--checkpoint", type=Path, required=True, help="of a run, of one step, or Megatron's own")
    to_hf.add_argument("--source", type=Path, required=True, help="Hugging Face folder with config and tokenizer")
    for command in (to_megatron, to_hf):
        command.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
        command.add_argument("--tp", type=int, default=1, help="tensor-parallel size of this conversion")
        command.add_argument("--pp", type=int, default=1, help="pipeline-parallel size of this conversion")
        command.add_argument("--ep", type=int, default=1, help="expert-parallel size of this conversion")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    """Raises `InputError` for what can be seen before anything is read."""
    ranks, needed = int(os.environ.get("WORLD_SIZE", "1")), options.pp * math.lcm(options.tp, options.ep)
    if min(options.tp, options.pp, options.ep) < 1 or ranks % needed:
        raise InputError(
            f"--tp {options.tp} --pp {options.pp} --ep {options.ep} share the work among {needed} processes, {ranks} "
            f"run: start with `torchrun --nproc-per-node {needed} -m learner.convert`, or leave them out; either way, "
            "the checkpoint loads at any sizes"
        )
    if options.out.exists():
        raise InputError(f"{options.out} exists already; remove it, or give another --out")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Entry point; ends the process with code 2 and one message if the input cannot be used."""
    options = _arguments(arguments, prog)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check(options)
        sizes = ParallelConfig(tensor=options.tp, pipeline=options.pp, expert=options.ep)
        place = parallel.start(sizes, seed=0)
        try:
            if options.command == "hf-to-megatron":
                hf_to_megatron(options.hf, options.out, sizes)
            else:
                megatron_to_hf(options.checkpoint, options.source, options.out, sizes)
        finally:
            parallel.stop()
        if place.rank == 0:
            log.info("wrote %s", options.out)
    except Exception as error:  # the edge of the process: every error becomes an exit code and a line
        sys.exit(report_failure(error))


if __name__ == "__main__":
    main()
