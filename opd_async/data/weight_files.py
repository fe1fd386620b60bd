"""The safetensors of a model folder, judged by their headers: whole, plain numbers, and exactly what was asked for.

*.safetensors -> 8 bytes of header length, a JSON header -> name, dtype and shape of each tensor; no weight is read
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from opd_async.data.decoder import quantised
from opd_async.data.json_object import read_object
from opd_async.errors import InputError

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
PLAIN_DTYPES = ("F32", "BF16", "F16")
_SHOWN = 3
_HARMLESS = ".rotary_emb.inv_freq"
"""A table that old checkpoints carry along; it follows from the config."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a header announces it."""

    file: str
    dtype: str
    """The format's name: `F32`, `BF16`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]


def weight_files(folder: Path, any_name: bool = False) -> list[Path]:
    """The files that the index names, or the one without an index; `InputError` where neither is there.

    With `any_name`, as SGLang reads a folder: without an index every `*.safetensors` counts.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{index}: has no weight_map from tensors to files; copy it again")
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    others = sorted(folder.glob("*.safetensors"))
    if others and any_name:
        return others
    if others:
        shown = ", ".join(file.name for file in others[:_SHOWN])
        raise InputError(
            f"{folder} has {shown}, but no {SINGLE_NAME} and no {INDEX_NAME}; save the weights under these names"
        )
    raise InputError(f"{folder} has no *.safetensors; save the weights as safetensors")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by name; `InputError` for files that are missing, cut short or no safetensors."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= _header(file)
    return tensors


def file_problems(folder: Path, any_name: bool = False) -> list[str]:
    """Every file of weights that is missing or broken, "found; what to do" each; `any_name` as in `weight_files`."""
    try:
        files = weight_files(folder, any_name)
    except InputError as error:
        return [str(error)]
    problems = [
        f"{folder} has no {file.name}, which {INDEX_NAME} names; copy it again" for file in files if not file.is_file()
    ]
    for file in files:
        if file.is_file():
            try:
                _header(file)
            except InputError as error:
                problems.append(str(error))
    return problems


def plain_problems(folder: Path) -> list[str]:
    """Weights that are not plain numbers, of which a loader would read codes without their scales."""
    try:
        config, stored = read_object(folder / "config.json"), stored_tensors(folder)
    except InputError as error:
        return [str(error)]
    problems = [f"{folder / 'config.json'}: {problem}"] if (problem := quantised(config)) else []
    if (folder / "hf_quant_config.json").is_file():
        problems.append(f"{folder} has hf_quant_config.json: quantised weights are not supported; give plain weights")
    odd = {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype not in PLAIN_DTYPES}
    odd = {name: dtype for name, dtype in odd.items() if not name.endswith(_HARMLESS)}
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        problems.append(f"{folder}: {_named(odd)} stored as {kinds}, not {', '.join(PLAIN_DTYPES)}; give plain weights")
    return problems


def tensor_problems(folder: Path, wanted: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()) -> list[str]:
    """Where the tensors of `folder` are not those of `wanted` (shape by name); `optional` ones may be missing or more.

    A tensor that nobody asked for is refused: who ignores it may compute another model than the one that was trained.
    """
    problems = plain_problems(folder)
    try:
        stored = stored_tensors(folder)
    except InputError:
        return problems
    if missing := [name for name in wanted if name not in stored and name not in optional]:
        problems.append(f"{folder}: {_named(missing)} missing, which its config.json asks for; copy it again")
    others = [name for name in stored if name not in wanted and name not in optional and not name.endswith(_HARMLESS)]
    if others:
        problems.append(
            f"{folder}: {_named(others)} stored, for which this architecture has no place; give the folder of a model "
            "that is what its config.json says"
        )
    problems += [
        f"{folder}: {name} is {list(stored[name].shape)} where config.json asks for {list(shape)}; give the config "
        "that belongs to the weights"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ][:_SHOWN]
    return problems


def _named(names: Collection[str]) -> str:
    """The first names and how many more, as the subject of a sentence without its verb."""
    shown = ", ".join(list(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size:
                raise InputError(f"{file} is cut short at {size} bytes; copy it again")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        found = {
            name: StoredTensor(file.name, str(entry["dtype"]), tuple(int(length) for length in entry["shape"]))
            for name, entry in tensors.items()
        }
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise InputError(f"{file} is not a safetensors file; copy it again") from None
    if size < 8 + length + end:
        raise InputError(f"{file} is cut short: {size} bytes of {8 + length + end}; copy it again")
    return found
