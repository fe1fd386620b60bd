"""A GGUF file as a Hugging Face folder: what learner and engines read, made once.

    FILE.gguf -> transformers (the package gguf) -> plain weights -> DIR.tmp -> DIR (safetensors, config, tokenizer)

The whole model is in memory while it is converted.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from opd_async.errors import InputError
from opd_async.learner.hf.files import put_in_place

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gguf_to_hf(file: Path, out: Path, dtype: str | None = None) -> None:
    """Write the model in `file` as the folder `out`, which is whole or absent at any time.

    `dtype` is float32 or bfloat16; without it float32 where all weights of the file are, else bfloat16. Raises
    `InputError` for a file that is cut short, is of a family that transformers does not read, or has no
    tokenizer in it, and where the packages are missing that read such files.
    """
    stored = _stored_dtype(file)
    try:
        model, tokenizer = _read(file, DTYPES[dtype or stored])
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file}: transformers cannot make a model of it: {reason}") from error
    folder = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        put_in_place(folder, out)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)  # half of it is of no use, and takes room
        raise


def _stored_dtype(file: Path) -> str:
    """The dtype that loses least of what is stored without being larger than need be; `InputError` if it is unread."""
    try:
        import gguf  # an extra
    except ImportError:
        raise InputError(f"{file}: GGUF files are read with the package gguf; pip install 'opd_async[gguf]'") from None
    try:
        tensors = gguf.GGUFReader(file).tensors
    except (IndexError, KeyError, OSError, OverflowError, ValueError) as error:
        raise InputError(f"{file}: not a GGUF file, or cut short ({error}); fetch it again") from error
    plain = all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in tensors)
    return "float32" if plain else "bfloat16"


def _read(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model with plain weights, and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read, found = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True
    )
    if lacks := sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])}):
        raise ValueError(f"it lacks {lacks[0]} (of {len(lacks)}), which transformers would make up")
    config = read.config
    config.__dict__.pop("quantization_config", None)  # its weights are plain now
    config.dtype = dtype
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer
