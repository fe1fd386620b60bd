"""Send the student's weights from learner rank 0 to every engine by broadcast.

    named tensors -> buckets -> POST /update_weights_from_distributed to all engines, concurrently with the broadcast
                                of the bucket -> /end_weight_update -> verify by version and checksum

    bucket of    broadcasts                            copies
    large ones   one for each tensor, from its place   none here; none in an engine that receives into its parameters
    small ones   one, of all tensors flattened         one on each side

    wait                      unblocked by                              deadline
    an engine's HTTP answer   the engine                                timeout_s, names the engine
    joining the group         every engine rank joining                 timeout_s, or the first refusal; with NCCL
                                                                        5 times that
    a broadcast               every engine rank receiving               the same, 5 times for a group's first

NCCL is loaded when a group is joined, and connects its members in the first broadcast. That is one of weights: engines
know no call for another, so nothing can be broadcast to warm a group before.

The next bucket is gathered from the learner's ranks while the last one is on its way. After a failure the group is
gone; `connect` with a new name starts over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from opd_async.learner.errors import WeightSyncError
from opd_async.learner.weights.base import SendReport, Tally, WeightTransport
from opd_async.learner.weights.buckets import DIRECT_BYTES, Bucket, buckets
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.group import connection, join, leave
from opd_async.learner.weights.lane import Lane

FIRST_SLOWER = 5
"""With NCCL, joining a group and its first broadcast may take so many times the deadline of others."""
NCCL_HINT = (
    "; it was the first broadcast of its group, in which NCCL connects the members: NCCL_DEBUG=WARN makes both sides "
    "say what it did not like"
)


class WeightSender(WeightTransport):
    """Learner rank 0's side of the weight group. Not for use by several threads at once."""

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        *,
        backend: str,
        store: TCPStore,
        bucket_bytes: int,
        timeout_s: float,
        device: torch.device | None = None,
        direct_bytes: int = DIRECT_BYTES,
    ) -> None:
        """`backend` is `gloo` or `nccl`; engines meet this process at `store`; tensors live on `device` (CPU).
        Tensors of `direct_bytes` and more are broadcast from where they are."""
        super().__init__(engines, timeout_s)
        self._backend, self._store = backend, store
        self._bucket_bytes, self._direct_bytes = bucket_bytes, direct_bytes
        self._lane = Lane(device or torch.device("cpu"))
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        self._fresh = False
        self._first_s = timeout_s * (FIRST_SLOWER if backend == "nccl" else 1)
        # one bucket is on its way while the next is filled
        self._rooms = [torch.empty(0, dtype=torch.uint8)] * 2

    @property
    def connected(self) -> bool:
        """True between a `connect` and the next failure or `close`."""
        return self._group is not None

    def connect(self, name: str) -> None:
        """Form the group with every rank of every engine; a group from before is dissolved first.

        Raises `WeightSyncError` that names the engine which refused or did not come.
        """
        self._dissolve()
        self._engines.find(numbered=True)
        world_size = 1 + sum(self._engines.ranks)
        store = connection(self._store, self._first_s)
        bodies, offset = [], 1
        for ranks in self._engines.ranks:
            bodies.append(
                {
                    "master_address": store.host,
                    "master_port": store.port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "group_name": name,
                    "backend": self._backend,
                }
            )
            offset += ranks
        joining = self._engines.submit(join, store, name, 0, world_size, self._backend, self._first_s)
        self._group_name = name
        try:
            self._engines.together("/init_weights_update_group", bodies, joining, timeout_s=self._first_s)
        except WeightSyncError:
            joining.add_done_callback(_leave_late)
            self._clean_engines()
            raise
        self._group, self._fresh = joining.result(), True

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool = True) -> SendReport:
        """See `WeightTransport.send`."""
        tally, source = Tally(version, checksums and self._engines.hashing), iter(named_tensors)
        shipping: Future[None] | None = None
        try:
            if self._group is None:
                raise WeightSyncError("the weight group is not connected; call connect() with a new group name")
            sessions = self._engines.begin()
            for bucket in buckets(source, self._bucket_bytes, self._direct_bytes):
                payload = [tensor.contiguous() for tensor in bucket.tensors] if bucket.direct else [self._fill(bucket)]
                if shipping is not None:
                    shipping.result()
                shipping = self._engines.submit(self._ship, bucket, payload, self._lane.ready(), version)
                tally.add_bucket(bucket)
            if shipping is not None:
                shipping.result()
            self._engines.end(sessions)
        except WeightSyncError:
            for _ in source:
                pass
            self._dissolve()
            raise
        return tally.report()

    def close(self) -> None:
        """Dissolve the group and stop the threads. Engines that do not answer are left alone."""
        self._dissolve()
        super().close()

    def _fill(self, bucket: Bucket) -> Tensor:
        """The bucket's bytes, in the room that was not used last."""
        self._rooms.reverse()
        payload = bucket.flatten(self._rooms[0])
        if len(payload) > len(self._rooms[0]):
            self._rooms[0] = payload
        return payload

    def _ship(self, bucket: Bucket, payload: Sequence[Tensor], ready: Any, version: int) -> None:
        """One bucket to all engines. The version goes with the last one, so that no engine claims half an update.

        NCCL makes its connections in the first broadcast of a group, which may take longer than any later one.
        """
        body: dict[str, Any] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._group_name,
            "load_format": None if bucket.direct else "flattened_bucket",
            "flush_cache": False,
            "abort_all_requests": False,
        }
        if bucket.last:
            body["weight_version"] = str(version)
        broadcasting = self._engines.submit(self._broadcast, payload, ready)
        bodies = [body] * len(self.addresses)
        first, self._fresh = self._fresh, False
        deadline_s = self._first_s if first else self._engines.timeout_s
        try:
            self._engines.together("/update_weights_from_distributed", bodies, broadcasting, timeout_s=deadline_s)
        except WeightSyncError as error:
            if first and self._backend == "nccl":
                raise WeightSyncError(f"{error}{NCCL_HINT}") from error
            raise

    def _broadcast(self, payload: Sequence[Tensor], ready: Any) -> None:
        failure = self._lane.broadcast(self._group, payload, ready)
        if failure:
            raise WeightSyncError(f"the broadcast failed: {failure}")

    def _dissolve(self) -> None:
        """Leave the group, if there is one, and let the engines do the same."""
        if self._group is not None:
            group, self._group = self._group, None
            leave(group)
            del group  # the last reference: an engine that waits for a broadcast answers nothing until we are gone
            self._clean_engines()

    def _clean_engines(self) -> None:
        """Make the engines forget the group and a half-done update."""
        self._engines.clean(
            ("/destroy_weights_update_group", {"group_name": self._group_name}), ("/end_weight_update", {})
        )


def _leave_late(joining: Future[dist.ProcessGroup]) -> None:
    """A group that formed after it was given up."""
    if joining.exception() is None:
        leave(joining.result())
