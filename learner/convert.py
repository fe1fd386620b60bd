"""Hugging Face folders to Megatron checkpoints and back, without a second copy of the model in memory; GGUF files.

    python -m opd_async.learner.convert hf-to-megatron --hf DIR --out DIR
    python -m opd_async.learner.convert megatron-to-hf --checkpoint DIR --source DIR --out DIR
    python -m opd_async.learner.convert gguf-to-hf --gguf FILE --out DIR [--dtype float32]

    hf-to-megatron   safetensors, one tensor at a time -> sharded model -> DIR.tmp -> DIR (torch_dist, weights alone)
    megatron-to-hf   checkpoint -> sharded model -> one tensor at a time -> DIR.tmp -> DIR (safetensors)
    gguf-to-hf       one process, the whole model at once (`opd_async.learner.hf.gguf`)

A checkpoint loads at any tensor- and pipeline-parallel size, whatever it was written at, so one process is enough.
Where the model does not fit into one, start it with torchrun and give `--tp`, `--pp` or, for mixtures of experts,
`--ep`: every rank holds its part.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from opd_async.cli.convert import convert
from opd_async.data.decoder_tensors import HEAD, decoder_tensors
from opd_async.data.weight_files import tensor_problems
from opd_async.errors import InputError
from opd_async.learner.checkpoints import model as model_checkpoint
from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.distributed.cpu import on_this_device, this_device
from opd_async.learner.errors import ModelError
from opd_async.learner.hf.files import put_in_place
from opd_async.learner.hf.gguf import gguf_to_hf
from opd_async.learner.hf.io import load_hf, save_hf
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.decoder import DecoderModel, build_model
from opd_async.run import checkpoints

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")


def hf_to_megatron(hf: Path, out: Path, parallel_config: ParallelConfig) -> None:
    """Write the weights of the folder `hf` as a checkpoint, in the dtype that its config names.

    All ranks call it, after `learner.parallel.start`. Raises `ModelError` if `hf` cannot be read.
    """
    shape = read_shape(hf)
    config = _config(hf, shape.dtype, parallel_config)
    # Before the model is made: a config that does not belong to the weights may ask for more memory than there is.
    if problems := tensor_problems(hf, decoder_tensors(shape), {HEAD} if shape.tied else ()):
        raise ModelError("; ".join(problems))
    model = _model(config)
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
    model = _model(_config(source, stored, parallel_config))
    model_checkpoint.load_model(model, shards)
    save_hf(model, out, source)


def _config(path: Path, dtype: str, parallel_config: ParallelConfig) -> LearnerConfig:
    """How the model in `path` is held while it is converted; `InputError` for weights of a dtype that it cannot be."""
    if dtype not in DTYPES:
        raise InputError(f"weights in {dtype} cannot be converted (only {' and '.join(DTYPES)}); cast them first")
    return LearnerConfig(
        model_path=path, dtype="bfloat16" if dtype == "bfloat16" else "float32", parallel=parallel_config
    )


def _model(config: LearnerConfig) -> DecoderModel:
    """This rank's part of the model, with weights still to be filled in."""
    with on_this_device():
        model: DecoderModel = build_model(read_shape(config.model_path), config).to(this_device())
    return model


def carry_out(options: argparse.Namespace) -> None:
    """Join the other ranks, if there are any, and convert what the arguments of `opd_async.cli.convert` name."""
    if options.command == "gguf-to-hf":
        gguf_to_hf(options.gguf, options.out, options.dtype)
        log.info("wrote %s", options.out)
        return
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


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Entry point; ends the process with code 2 and one message if the input cannot be used."""
    if code := convert(arguments, prog):
        sys.exit(code)


if __name__ == "__main__":
    main()
