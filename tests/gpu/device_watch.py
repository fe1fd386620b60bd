"""Watch the operations on a device: how many, how many bytes through them, how much memory lives, who copies."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from pretend_cuda import count_sync, here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = frozenset(
    (
        *("view", "t", "transpose", "slice", "select", "split", "detach", "expand", "unsqueeze", "squeeze", "permute"),
        *("alias", "as_strided", "_unsafe_view", "unflatten", "narrow", "reshape", "empty", "chunk", "unbind"),
        *("empty_strided", "split_with_sizes", "new_empty", "empty_like", "lift_fresh"),
        "prim::device",
    )
)
"""Operations that touch no element."""
FEW = 8192
"""So many numbers may be float64: a few of each row, never one for each word of the vocabulary."""


class DeviceWatch(TorchDispatchMode):
    """Counts inside its block; `restart` begins again from the memory that is alive."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}
        self.live = 0
        """Bytes of storages on the device."""
        self.peak, self.peak_at = 0, ""
        self.operations: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Bytes of the device tensors that went into and came out of operations, by operation."""
        self.wrong: list[str] = []
        """Operations that made float64 of more than a few numbers a row."""

    def restart(self) -> None:
        """Forget everything but what is alive."""
        self.operations.clear()
        self.bytes.clear()
        self.wrong.clear()
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        into = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        made = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        if name not in VIEWS:
            on_device = [tensor for tensor in (*into, *made) if tensor.device.type == "cuda"]
            self.operations[name] += bool(on_device)
            self.bytes[name] += sum(tensor.nbytes for tensor in on_device)
        devices = {tensor.device.type for tensor in (*into, *made)}
        if name in ("_to_copy", "copy_") and devices == {"cpu", "cuda"}:
            source = into[1] if name == "copy_" else into[0]
            count_sync(f"copy from {source.device.type}")
        for tensor in made:
            self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        if tensor.dtype is torch.float64 and tensor.numel() > FEW:
            self.wrong.append(f"float64 {tuple(tensor.shape)} at {here()}")
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_reference: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, here()
