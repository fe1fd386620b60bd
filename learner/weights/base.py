"""What every way of sending weights has in common: whom it sends to, what it reports, how the result is proven.

learner.weights        broadcast into the engines' ranks (NCCL, gloo): any number of hosts
learner.weights_local  handles to the learner's own memory, or files: engines on the learner's machine
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from opd_async.learner.errors import WeightSyncError
from opd_async.learner.weights.buckets import CHECKSUM_HEX, Bucket, checksum
from opd_async.learner.weights.engine_http import EngineAddress, call
from opd_async.learner.weights.engines import Engines


@dataclass(frozen=True, slots=True)
class SendReport:
    """One weight update that all engines have loaded."""

    version: int
    bytes: int
    seconds: float
    checksums: dict[str, str]
    """Hugging Face name -> blake2b-128 hex of the bytes that were sent; empty if they were not asked for, or no engine
    could be asked to compare them."""


class Tally:
    """Adds up what is sent."""

    def __init__(self, version: int, checksums: bool) -> None:
        self._version, self._wanted = version, checksums
        self._started = time.perf_counter()
        self._bytes = 0
        self._sums: dict[str, str] = {}

    def add(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Count these tensors."""
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        if self._wanted:
            self._sums |= {name: checksum(tensor) for name, tensor in zip(names, tensors, strict=True)}

    def add_bucket(self, bucket: Bucket) -> None:
        """Count a bucket's tensors."""
        self.add(bucket.names, bucket.tensors)

    def report(self) -> SendReport:
        """What was sent, and how long it took since the tally began."""
        return SendReport(self._version, self._bytes, time.perf_counter() - self._started, self._sums)


class WeightTransport(ABC):
    """Learner rank 0's side of weight updates."""

    def __init__(self, addresses: Sequence[EngineAddress], timeout_s: float) -> None:
        self._engines = Engines(addresses, timeout_s)

    def __enter__(self) -> WeightTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def addresses(self) -> tuple[EngineAddress, ...]:
        """The engines."""
        return self._engines.addresses

    @property
    @abstractmethod
    def connected(self) -> bool:
        """True between a `connect` and the next failure or `close`."""

    @abstractmethod
    def connect(self, name: str) -> None:
        """Make ready to send; `name` must be new. Raises `WeightSyncError` that names the engine which refused."""

    @abstractmethod
    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool = True) -> SendReport:
        """Load `named_tensors` (Hugging Face names, full tensors, the engines' dtype) into every engine as `version`.

        The iterable is always run to its end, because other learner ranks take part in it. Raises `WeightSyncError`
        that names the engine which refused, died or ran past its deadline; the engines' weights are then mixed, and
        stay so until an update has gone through.
        """

    def close(self) -> None:
        """Let go of the engines; those that do not answer are left alone."""
        self._engines.close()

    def verify(self, engine: EngineAddress, report: SendReport) -> bool:
        """Prove that `engine` holds what `report` says; `WeightSyncError` names the first difference.

        The version is always compared. True if checksums were too: SGLang hashes fused parameters in its own way, if
        at all, which says nothing about what was sent (`learner.proof` does).
        """
        timeout_s = self._engines.timeout_s
        info = call(engine, "GET", "/model_info", None, timeout_s=timeout_s, admin=False) or {}
        if str(info.get("weight_version")) != str(report.version):
            raise WeightSyncError(
                f"engine {engine.url} says weight version {info.get('weight_version')} after {report.version} was sent"
            )
        try:
            answer = call(engine, "POST", "/weights_checker", {"action": "checksum"}, timeout_s=timeout_s) or {}
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
