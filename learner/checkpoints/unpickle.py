"""Read a checkpoint's pickles without running what they say: only the plain records that the format needs are made.

    .metadata                torch.distributed.checkpoint's index, unpickled here with an allow-list
    common.pt                torch.load with `weights_only`, which is its default and megatron-core's
    objects among the shards  checked by the same rule before they are taken

A pickle is a program: whoever wrote the file decides what its reader calls. A checkpoint may come from anywhere.
"""

from __future__ import annotations

import io
import pickle
import re
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
ALLOWED = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("_MEM_FORMAT_ENCODING",)),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}
"""(module, name) of every class that an index is made of; `_get_layout` looks a name up in a table."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")
        return super().find_class(module, name)


def load_index(file: IO[bytes]) -> Any:
    """The object in a pickled index; `UnpicklingError` if it holds anything but what an index needs, or is damaged."""
    try:
        return _Unpickler(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged pickles raise whatever their first wrong byte leads to
        raise pickle.UnpicklingError(f"damaged: {error or type(error).__name__}") from None


def plain(error: BaseException) -> str:
    """The text of an error that a load ended with, in a line where a pickle was refused.

    torch's own is a page that proposes to trust the file, or hides the refusal in an error of another type.
    """
    if found := re.search(r"GLOBAL\s+(\S+)", text := str(error)):
        return f"it refers to {found[1]}, which no checkpoint needs, and none of its code was run"
    return f"it is no pickle of a checkpoint ({text})" if isinstance(error, pickle.UnpicklingError) else text


def install() -> None:
    """Have torch read checkpoints by these rules; once, before the first load."""
    vars(filesystem)["pickle"] = _RULES
    setattr(default_planner.DefaultLoadPlanner, "load_bytes", _load_bytes)  # noqa: B010 - the type checker forbids =


_RULES: Any = SimpleNamespace(load=load_index, dump=pickle.dump)
_original_load_bytes = default_planner.DefaultLoadPlanner.load_bytes


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    torch.load(value, weights_only=True)
    value.seek(0)
    _original_load_bytes(self, read_item, value)
