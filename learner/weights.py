"""Send the student's weights from learner rank 0 to every engine.

    named tensors -> buckets -> POST /update_weights_from_distributed to all engines, concurrently with one broadcast
                                of the bucket's bytes -> /end_weight_update -> verify by version and checksum

    wait                      unblocked by                              deadline
    an engine's HTTP answer   the engine                                timeout_s, names the engine
    joining the group         every engine rank joining                 timeout_s, or the first refusal
    a broadcast               every engine rank receiving               timeout_s, or the first refusal

The next bucket is gathered from the learner's ranks while the last one is on its way. After a failure the group is
gone; `connect` with a new name starts over.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.buckets import CHECKSUM_HEX, Bucket, buckets, checksum
from learner.engine_http import EngineAddress, call
from learner.errors import WeightSyncError
from learner.weight_group import join, leave, open_store

GRACE_S = 1.0  # what fails together may fail a little later
CLEANUP_S = 5.0  # engines that may be dead are told to clean up, but not waited for longer than this


@dataclass(frozen=True, slots=True)
class SendReport:
    """One weight update that all engines have loaded."""

    version: int
    bytes: int
    seconds: float
    checksums: dict[str, str]
    """Hugging Face name -> blake2b-128 hex of the bytes that were sent; empty if they were not asked for."""


class WeightSender:
    """Learner rank 0's side of the weight group. Not for use by several threads at once."""

    def __init__(
        self,
        engines: Sequence[EngineAddress],
        *,
        backend: str,
        bind_host: str,
        bucket_bytes: int,
        timeout_s: float,
        device: torch.device | None = None,
    ) -> None:
        """`backend` is `gloo` or `nccl`; engines reach this process at `bind_host`; tensors live on `device` (CPU)."""
        self.engines = tuple(engines)
        self._backend, self._host, self._timeout_s = backend, bind_host, timeout_s
        self._bucket_bytes = bucket_bytes
        self._device = device or torch.device("cpu")
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        # one thread per engine, one for the collective, one that ships a bucket while the next is gathered
        self._threads = ThreadPoolExecutor(len(self.engines) + 2, thread_name_prefix="weights")

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """True between a `connect` and the next failure or `close`."""
        return self._group is not None

    def connect(self, group_name: str) -> None:
        """Form the group with every engine; a group from before is dissolved first. `group_name` must be new.

        Raises `WeightSyncError` that names the engine which refused or did not come.
        """
        self._dissolve()
        self._find_engines()
        world_size = 1 + sum(engine.ranks for engine in self.engines)
        store, port = open_store(self._host, world_size, self._timeout_s)
        bodies, offset = [], 1
        for engine in self.engines:
            bodies.append(
                {
                    "master_address": self._host,
                    "master_port": port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "group_name": group_name,
                    "backend": self._backend,
                }
            )
            offset += engine.ranks
        joining = self._threads.submit(join, store, group_name, 0, world_size, self._backend, self._timeout_s)
        self._group_name = group_name
        try:
            self._together("/init_weights_update_group", bodies, joining)
        except WeightSyncError:
            joining.add_done_callback(_leave_late)
            self._clean_engines()
            raise
        self._group = joining.result()

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool = True) -> SendReport:
        """Load `named_tensors` (Hugging Face names, full tensors, the engines' dtype) into every engine as `version`.

        The iterable is always run to its end, because other learner ranks take part in it. Raises `WeightSyncError`
        that names the engine which refused, died or ran past its deadline; the engines' weights are then mixed, and
        stay so until an update has gone through.
        """
        started = time.perf_counter()
        source = iter(named_tensors)
        sums: dict[str, str] = {}
        total = 0
        shipping: Future[None] | None = None
        try:
            sessions = self._begin()
            for bucket in buckets(source, self._bucket_bytes):
                if shipping is not None:
                    shipping.result()
                shipping = self._threads.submit(self._ship, bucket, version)
                total += bucket.nbytes
                if checksums:
                    sums |= {name: checksum(tensor) for name, tensor in zip(bucket.names, bucket.tensors, strict=True)}
            if shipping is not None:
                shipping.result()
            self._together("/end_weight_update", [{} if open_session else None for open_session in sessions])
        except WeightSyncError:
            for _ in source:
                pass
            self._dissolve()
            raise
        return SendReport(version, total, time.perf_counter() - started, sums)

    def verify(self, engine: EngineAddress, report: SendReport) -> bool:
        """Prove that `engine` holds what `report` says; `WeightSyncError` names the first difference.

        The version is always compared. True if checksums were too: SGLang hashes fused parameters in its own way, if
        at all, which says nothing about what was sent (`learner.proof` does).
        """
        info = call(engine, "GET", "/model_info", None, timeout_s=self._timeout_s, admin=False) or {}
        if str(info.get("weight_version")) != str(report.version):
            raise WeightSyncError(
                f"engine {engine.url} says weight version {info.get('weight_version')} after {report.version} was sent"
            )
        try:
            answer = call(engine, "POST", "/weights_checker", {"action": "checksum"}, timeout_s=self._timeout_s) or {}
        except WeightSyncError:  # some versions of SGLang can compute them on GPUs only
            return False
        compared = False
        for rank, held in enumerate(answer.get("ranks", [])):
            found: Mapping[str, str] = held.get("checksums", {})
            if not any(len(found.get(name, "")) == CHECKSUM_HEX for name in report.checksums):
                continue
            compared = True
            for name, expected in report.checksums.items():
                if found.get(name) != expected:
                    raise WeightSyncError(
                        f"engine {engine.url} rank {rank} holds {name} with checksum {found.get(name)}, sent {expected}"
                    )
        return compared

    def close(self) -> None:
        """Dissolve the group and stop the threads. Engines that do not answer are left alone."""
        self._dissolve()
        self._threads.shutdown(wait=False)

    def _find_engines(self) -> None:
        """Ask every engine for a sign of life, so that joining is not begun with a dead one: it could not be undone."""
        asking = [
            self._threads.submit(call, engine, "GET", "/model_info", None, timeout_s=self._timeout_s, admin=False)
            for engine in self.engines
        ]
        for future in asking:
            future.result()

    def _begin(self) -> list[bool]:
        """Open an update session on every engine; False for one too old to know sessions."""
        if self._group is None:
            raise WeightSyncError("the weight group is not connected; call connect() with a new group name")
        answers = self._together("/begin_weight_update", [{"selector": "all"}] * len(self.engines))
        return [answer is not None for answer in answers]

    def _ship(self, bucket: Bucket, version: int) -> None:
        """One bucket to all engines. The version goes with the last one, so that no engine claims half an update."""
        body: dict[str, Any] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "abort_all_requests": False,
        }
        if bucket.last:
            body["weight_version"] = str(version)
        broadcasting = self._threads.submit(self._broadcast, bucket.flatten())
        self._together("/update_weights_from_distributed", [body] * len(self.engines), broadcasting)

    def _broadcast(self, payload: Tensor) -> None:
        failure = _broadcast_failure(self._group, payload, self._device)
        if failure:
            raise WeightSyncError(f"the broadcast failed: {failure}")

    def _together(
        self, path: str, bodies: Sequence[Mapping[str, Any] | None], collective: Future[Any] | None = None
    ) -> list[dict[str, Any] | None]:
        """POST to every engine at once (None: not to that one) while `collective` runs; the answers, in order.

        Raises at the first refusal, without waiting for the collective, which could not end any more.
        """
        calls = {
            self._threads.submit(call, engine, "POST", path, body, timeout_s=self._timeout_s): engine
            for engine, body in zip(self.engines, bodies, strict=True)
            if body is not None
        }
        everything: set[Future[Any]] = {*calls, *({collective} if collective else ())}
        done, waiting = wait(everything, timeout=self._timeout_s + CLEANUP_S, return_when=FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            # A dead engine breaks both: its missing answer names it, the broken collective lets go of the group.
            wait(everything, timeout=GRACE_S)
        for future in calls:
            if future.done() and future.exception() is not None:
                future.result()
        late = ", ".join(engine.url for future, engine in calls.items() if not future.done())
        if collective is not None and collective.done() and collective.exception() is not None:
            raise WeightSyncError(f"{path}: {collective.exception()}; engines without an answer: {late or 'none'}")
        if waiting:
            raise WeightSyncError(f"{path}: no answer within {self._timeout_s} s from {late or 'the collective'}")
        return [future.result() for future in calls]

    def _dissolve(self) -> None:
        """Leave the group, if there is one, and let the engines do the same."""
        if self._group is not None:
            group, self._group = self._group, None
            leave(group)
            del group  # the last reference: an engine that waits for a broadcast answers nothing until we are gone
            self._clean_engines()

    def _clean_engines(self) -> None:
        """Make the engines forget the group and a half-done update, for which some are too dead and others too new."""

        def clean(engine: EngineAddress) -> None:
            for path, body in (
                ("/destroy_weights_update_group", {"group_name": self._group_name}),
                ("/end_weight_update", {}),
            ):
                with suppress(WeightSyncError):
                    call(engine, "POST", path, body, timeout_s=CLEANUP_S)

        wait([self._threads.submit(clean, engine) for engine in self.engines], timeout=CLEANUP_S)


def _broadcast_failure(group: dist.ProcessGroup | None, payload: Tensor, device: torch.device) -> str:
    """Broadcast from rank 0; what went wrong, or nothing.

    It does not raise: a traceback would keep the group alive, and with it the connections whose end tells the other
    engines that nothing more will come.
    """
    if group is None:
        return "the group was given up"
    try:
        if payload.is_cuda:
            torch.cuda.set_device(device)
        dist.broadcast(payload, src=0, group=group)
        if payload.is_cuda:
            torch.cuda.current_stream().synchronize()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def _leave_late(joining: Future[dist.ProcessGroup]) -> None:
    """A group that formed after it was given up."""
    if joining.exception() is None:
        leave(joining.result())
