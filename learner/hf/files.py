"""The files of a Hugging Face folder: read one tensor at a time, written as a stream.

    stream of (name, tensor) -> <path>.tmp/model-00001-of-0000N.safetensors ... + index + the source's other files
                             -> all on disk -> renamed to <path>

Neither direction holds more than a few tensors in memory: reading gives back its file mappings as it goes, and names
and shapes are known before the first tensor comes, so that each file's header is written first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opd_async.data.weight_files import INDEX_NAME, SINGLE_NAME
from opd_async.learner.errors import ModelError

SHARD_BYTES = 4 << 30
MAPPED_BYTES = 64 << 20
"""After so many bytes, files are closed and opened again: pages of a mapping count as this process's memory."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth")

Spec = tuple[str, tuple[int, ...]]
"""Name and shape of a tensor to be written."""


class Reader:
    """The safetensors files of a folder, opened lazily."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._given = 0
        self._file_of: dict[str, str] | None = None
        try:
            if (folder / INDEX_NAME).exists():
                self._file_of = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(f"{folder / INDEX_NAME} is not a safetensors index: {error!r}") from error

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored; `ModelError` if the folder does not hold it. Copy it: it may be a view of the file."""
        file_name = SINGLE_NAME if self._file_of is None else self._file_of.get(name, "")
        path = self._folder / file_name
        if self._given > MAPPED_BYTES:
            self._files, self._given = {}, 0
        try:
            if file_name not in self._files:
                self._files[file_name] = safe_open(str(path), framework="pt")
            tensor: Tensor = self._files[file_name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read weight {name} from {path}: {error}") from error
        self._given += tensor.nbytes
        return tensor


def write_folder(
    path: Path, source: Path, specs: Sequence[Spec], dtype: torch.dtype, weights: Iterator[tuple[str, Tensor]]
) -> None:
    """Write `weights`, which come with the names, shapes and order of `specs` in `dtype`, and `source`'s other files.

    `path` is whole or absent at any time; an existing one is replaced, but for its sub-folders, which stay. Raises
    `ValueError` if a tensor is not the one that `specs` announced, and `OSError` where there is no room.
    """
    folder = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _write_files(folder, source, specs, dtype, weights)
        put_in_place(folder, path)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)  # half of it is of no use, and takes room
        raise


def _write_files(
    folder: Path, source: Path, specs: Sequence[Spec], dtype: torch.dtype, weights: Iterator[tuple[str, Tensor]]
) -> None:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.suffix not in WEIGHT_SUFFIXES:
            shutil.copy2(file, folder / file.name)
    files = _files(specs, dtype)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(files, start=1):
        name = SINGLE_NAME if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {tensor_name: name for tensor_name, _ in members}
        with (folder / name).open("wb") as stream:
            _write_file(stream, members, dtype, weights)
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1:
        index = {"metadata": {"total_size": _bytes(specs, dtype)}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def put_in_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`, whose files go, and whose sub-folders are kept."""
    if path.is_dir():
        for kept in [entry for entry in path.iterdir() if entry.is_dir()]:
            kept.rename(folder / kept.name)
        shutil.rmtree(path)
    folder.rename(path)


def _files(specs: Sequence[Spec], dtype: torch.dtype) -> list[list[Spec]]:
    """Group the tensors, in order, into files of at most SHARD_BYTES (a larger tensor gets its own)."""
    files: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        nbytes = _bytes([spec], dtype)
        if files[-1] and size + nbytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += nbytes
    return files


def _write_file(
    file: BinaryIO, members: Sequence[Spec], dtype: torch.dtype, weights: Iterator[tuple[str, Tensor]]
) -> None:
    """The safetensors format: length of the header (8 bytes, little-endian), header (JSON), tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in members:
        start, end = end, end + _bytes([(name, shape)], dtype)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in members:
        found, tensor = next(weights, ("nothing", torch.empty(0)))
        if (found, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
            raise ValueError(f"{found} {tuple(tensor.shape)} {tensor.dtype} came in place of {name} {shape} {dtype}")
        file.write(as_bytes(tensor).cpu().numpy().data)


def _bytes(specs: Sequence[Spec], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for _, shape in specs) * dtype.itemsize


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8[nbytes]: the tensor's memory, row-major."""
    return tensor.contiguous().flatten().view(torch.uint8)
