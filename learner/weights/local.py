"""Weights for engines on the learner's own machine: handles to its memory, or a folder of files.

TensorSender  bucket -> handles (CUDA IPC; shared memory on a CPU) -> POST /update_weights_from_tensor
              nothing is copied on the way: for SGLang engines on the learner's own GPUs
DiskSender    named tensors -> Hugging Face folder -> POST /update_weights_from_disk
              the slowest and the most patient: for engines that can reach the learner by a file system only

wait                      unblocked by   deadline
an engine's HTTP answer   the engine     timeout_s, names the engine
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from opd_async.learner.errors import WeightSyncError
from opd_async.learner.hf.files import Spec, write_folder
from opd_async.learner.weights.base import SendReport, Tally, WeightTransport
from opd_async.learner.weights.buckets import Bucket, buckets
from opd_async.learner.weights.engine_http import EngineAddress

DEVICE_ARGUMENT = 6
"""Where torch's `rebuild_cuda_tensor` is told the device."""


class LocalTransport(WeightTransport):
    """Connected once the engines have said how many ranks they have; nothing else holds the two sides together."""

    def __init__(self, engines: Sequence[EngineAddress], timeout_s: float) -> None:
        super().__init__(engines, timeout_s)
        self._found = False

    @property
    def connected(self) -> bool:
        """True between a `connect` and the next failure or `close`."""
        return self._found

    def connect(self, name: str) -> None:
        """See `WeightTransport.connect`."""
        self._engines.find()
        self._found = True


class TensorSender(LocalTransport):
    """Sends handles. They are pickled, because that is SGLang's own format of this route; engines never read ours."""

    def __init__(self, engines: Sequence[EngineAddress], *, bucket_bytes: int, timeout_s: float) -> None:
        super().__init__(engines, timeout_s)
        self._bucket_bytes = bucket_bytes
        # the default passes file descriptors through a socket that the engine has no key to
        torch.multiprocessing.set_sharing_strategy("file_system")

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool = True) -> SendReport:
        """See `WeightTransport.send`."""
        tally, source = Tally(version, checksums and self._engines.hashing), iter(named_tensors)
        try:
            sessions = self._engines.begin()
            for bucket in buckets(source, self._bucket_bytes):
                tally.add_bucket(bucket)
                self._ship(bucket, version)
            self._engines.end(sessions)
        except WeightSyncError:
            for _ in source:
                pass
            self._found = False
            self._engines.clean(("/end_weight_update", {}))
            raise
        return tally.report()

    def _ship(self, bucket: Bucket, version: int) -> None:
        """One bucket to all engines; each of an engine's ranks gets a handle of its own."""
        tensors = list(zip(bucket.names, bucket.tensors, strict=True))
        bodies = [
            {
                "serialized_named_tensors": [_handles(tensors) for _ in range(ranks)],
                "flush_cache": False,
                "abort_all_requests": False,
                **({"weight_version": str(version)} if bucket.last else {}),
            }
            for ranks in self._engines.ranks
        ]
        self._engines.together("/update_weights_from_tensor", bodies)


def _handles(tensors: list[tuple[str, Tensor]]) -> str:
    """Base64 of pickled (name, handle) pairs; the memory stays ours and must not go before the engine has answered."""
    buffer = io.BytesIO()
    pickler = ForkingPickler(buffer)
    pickler.dispatch_table = pickler.dispatch_table | {Tensor: _handle}
    pickler.dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


def _handle(tensor: Tensor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Reduce a tensor to a handle that names its GPU by UUID, which SGLang looks up among those that it sees.

    torch says the index that the GPU has in this process; an engine that sees others would open the handle elsewhere.
    """
    rebuild, arguments = reductions.reduce_tensor(tensor)
    if rebuild is not reductions.rebuild_cuda_tensor:
        return rebuild, arguments
    uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_ARGUMENT]).uuid)
    return rebuild, (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])


class DiskSender(LocalTransport):
    """Writes one folder per update below `folder`, and removes the one before."""

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        *,
        folder: Path,
        source: Path,
        specs: Sequence[Spec],
        dtype: torch.dtype,
        timeout_s: float,
    ) -> None:
        """`source` is the Hugging Face folder of the model's configuration; weights come as `specs` say, in `dtype`."""
        super().__init__(engines, timeout_s)
        self._folder, self._source, self._specs, self._dtype = folder, source, specs, dtype

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool = True) -> SendReport:
        """See `WeightTransport.send`; a folder that cannot be written is a `WeightSyncError` too."""
        tally, source = Tally(version, checksums and self._engines.hashing), iter(named_tensors)
        path = self._folder / f"version_{version}"
        body = {
            "model_path": str(path.absolute()),
            "weight_version": str(version),
            "flush_cache": False,
            "abort_all_requests": False,
        }
        try:
            write_folder(path, self._source, self._specs, self._dtype, _counted(source, tally))
            self._engines.together("/update_weights_from_disk", [body] * len(self.addresses))
        except (WeightSyncError, OSError) as error:
            for _ in source:
                pass
            self._found = False
            raise WeightSyncError(f"weights by way of {path}: {error}") from error
        for old in self._folder.glob("version_*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
        return tally.report()


def _counted(source: Iterator[tuple[str, Tensor]], tally: Tally) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source:
        tally.add([name], [tensor])
        yield name, tensor
