"""The command that converts checkpoints: its arguments, and what can be known to be wrong before torch is loaded.

`opd convert`, which is `python -m opd_async.learner.convert`, and under torchrun as well.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_async.errors import InputError
from opd_async.process import report_failure


def _arguments(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description="Between Hugging Face folders and Megatron checkpoints, and from GGUF files."
    )
    commands: Any = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="safetensors to a checkpoint to start from")
    to_megatron.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    to_hf = commands.add_parser("megatron-to-hf", help="a checkpoint's weights to safetensors")
    to_hf.add_argument("--checkpoint", type=Path, required=True, help="of a run, of one step, or Megatron's own")
    to_hf.add_argument("--source", type=Path, required=True, help="Hugging Face folder with config and tokenizer")
    from_gguf = commands.add_parser("gguf-to-hf", help="a GGUF file to safetensors")
    from_gguf.add_argument("--gguf", type=Path, required=True, help="the file")
    from_gguf.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 if all the file is, else bfloat16")
    for command in (to_megatron, to_hf, from_gguf):
        command.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    for command in (to_megatron, to_hf):
        command.add_argument("--tp", type=int, default=1, help="tensor-parallel size of this conversion")
        command.add_argument("--pp", type=int, default=1, help="pipeline-parallel size of this conversion")
        command.add_argument("--ep", type=int, default=1, help="expert-parallel size of this conversion")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    """Raises `InputError` for what can be seen before anything is read."""
    if options.command == "gguf-to-hf":
        if not options.gguf.is_file():
            raise InputError(f"no file {options.gguf}; give a GGUF file")
    else:
        _check_sizes(options)
    if options.out.exists():
        raise InputError(f"{options.out} exists already; remove it, or give another --out")


def _check_sizes(options: argparse.Namespace) -> None:
    ranks, needed = int(os.environ.get("WORLD_SIZE", "1")), options.pp * math.lcm(options.tp, options.ep)
    if min(options.tp, options.pp, options.ep) < 1 or ranks % needed:
        raise InputError(
            f"--tp {options.tp} --pp {options.pp} --ep {options.ep} share the work among {needed} processes, {ranks} "
            f"run: start with `torchrun --nproc-per-node {needed} -m opd_async.learner.convert`, or leave them "
            "out; either way, the checkpoint loads at any sizes"
        )


def convert(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Convert as the arguments say; returns the exit code, after one message where the input cannot be used."""
    options = _arguments(words, prog)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check(options)
        # by name: this room must not know the learner's; its package takes seconds to load
        importlib.import_module("opd_async.learner.convert").carry_out(options)
    except Exception as error:  # the edge of the process: every error becomes an exit code and a line
        return report_failure(error)
    return 0
