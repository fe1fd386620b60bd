"""Read what a Hugging Face checkpoint folder says about its model, without loading a weight.

`folder_problems` names everything that is missing or broken. `read_model` returns the facts that planning needs.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from opd_async.errors import InputError

_SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes from `config.json`, and the ids that end a response (from it and from `generation_config.json`)."""

    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    max_tokens: int
    """`max_position_embeddings`."""
    eos_token_ids: tuple[int, ...]
    experts: int
    """Experts of a layer, in place of its MLP; 0 for a dense model."""

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts."""
        return self.experts > 0


def read_model(folder: Path) -> ModelFacts:
    """Read the facts of the model in `folder`. Raises `InputError` if `config.json` is missing or lacks a size."""
    config = _read_object(folder / "config.json")
    wrong = [name for name in _SIZES if not _is_size(config.get(name))]
    if wrong:
        raise InputError(f"{folder / 'config.json'}: no whole number for {', '.join(wrong)}; give a complete config")
    kv_heads = config.get("num_key_value_heads")
    ids = _token_ids(config.get("eos_token_id"))
    generation = folder / "generation_config.json"
    if generation.exists():
        ids |= _token_ids(_read_object(generation).get("eos_token_id"))
    return ModelFacts(
        vocab_size=config["vocab_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=kv_heads if _is_size(kv_heads) else config["num_attention_heads"],
        max_tokens=config["max_position_embeddings"],
        eos_token_ids=tuple(sorted(ids)),
        experts=next((config[name] for name in ("num_experts", "num_local_experts") if _is_size(config.get(name))), 0),
    )


def try_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`; empty where it cannot be read. `folder_problems` says why."""
    try:
        return _read_object(folder / "config.json")
    except InputError:
        return {}


def try_model(folder: Path) -> ModelFacts | None:
    """Read the facts of the model as `read_model` does; None where it raises. `folder_problems` says why."""
    try:
        return read_model(folder)
    except InputError:
        return None


def folder_problems(folder: Path) -> list[str]:
    """List what is missing or broken in a checkpoint folder, each as "found; what to do"; empty if nothing is."""
    if not folder.is_dir():
        return [f"no folder {folder}; give the folder of a Hugging Face checkpoint"]
    problems = [
        f"{folder} has no {name}; add it, or give a complete checkpoint folder"
        for name in ("config.json", "tokenizer.json")
        if not (folder / name).is_file()
    ]
    if (folder / "config.json").is_file():
        try:
            read_model(folder)
        except InputError as error:
            problems.append(str(error))
    return problems + _weight_problems(folder)


def _weight_problems(folder: Path) -> list[str]:
    index = folder / _INDEX
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(_read_object(index).get("weight_map", {}).values()))
        except InputError as error:
            return [str(error)]
        files = [folder / name for name in names]
    if not files:
        return [f"{folder} has no *.safetensors; save the weights as safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    problems = [f"{folder} has no {name}, which {_INDEX} names; copy it again" for name in missing]
    for file in files:
        if file.is_file() and (reason := _cut_short(file)):
            problems.append(f"{file} {reason}; copy it again")
    return problems


def _cut_short(file: Path) -> str | None:
    """Say why a safetensors file cannot be whole; None if it may be.

    It has 8 bytes of header length, a JSON header, then the tensors' bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            return f"is cut short at {size} bytes"
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is not a safetensors file"
    return f"is cut short: {size} bytes of {8 + length + end}" if size < 8 + length + end else None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds no JSON object; copy it again")
    return value


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _token_ids(value: object) -> set[int]:
    """Return the ids in an `eos_token_id`, which may be absent, one id or a list."""
    values = value if isinstance(value, list) else [value]
    return {item for item in values if isinstance(item, int)}
