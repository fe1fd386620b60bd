"""The way of tensors into the weight group: a CUDA stream of its own, beside which the next ones are gathered.

On the CPU there are no streams, and a collective that has been waited for is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Lane:
    """Broadcasts from rank 0 of a group, one list of tensors at a time."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where the tensors lie."""
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(self) -> Any:
        """A mark behind everything that the caller has asked of the device so far; pass it to `broadcast`."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def broadcast(self, group: dist.ProcessGroup | None, payload: Sequence[Tensor], ready: Any) -> str:
        """Broadcast each tensor once `ready` has passed; what went wrong, or nothing. Returns when all have arrived.

        The tensors must stay as they are until then; the caller's own stream is not held up. It does not raise: a
        traceback would keep the group alive, and with it the connections whose end tells the other engines that nothing
        more will come.
        """
        if group is None:
            return "the group was given up"
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._device)  # threads begin on the first device
            with self._own():
                if ready is not None:
                    self._stream.wait_event(ready)
                works = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in payload]
                for work in works:
                    if work is not None:
                        work.wait()
            if self._stream is not None:
                self._stream.synchronize()
        except (RuntimeError, ValueError) as error:
            return str(error)
        return ""

    def _own(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
