"""One request's state: what was asked, what was computed, what may be sent. Pure, no torch, no sockets.

    waiting -> running (prefill, then decode) -> finished
       ^          |
       +-- retracted (KV dropped, tokens kept)

`tokens` is prompt plus response. `computed` counts the leading tokens whose KV lies in the pool; `table_row` names the
row of the scheduler's slot table. `ready` is how many response tokens the HTTP side may send.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_async.actors.engine.radix import Node
from opd_async.actors.engine.sampling import SamplingParams

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int64]
TopRows = tuple[FloatArray, IdArray]  # logprobs [rows, k], token ids [rows, k]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSpec:
    """Which logprobs a request wants.

    `start` is SGLang's logprob_start_len (-1: none of the prompt), `top` the k of the top-k rows,
    `ids` the ids to report at every position.
    """

    enabled: bool = False
    start: int = -1
    top: int = 0
    ids: tuple[int, ...] = ()
    flat: bool = False
    flat_b64: bool = False
    text: bool = False


@dataclass(slots=True)
class VersionSpan:
    """Response tokens [start, end) were sampled under weight version `version`."""

    version: str
    start: int
    end: int


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A single sequence to generate from or to score."""

    rid: str
    input_ids: list[int]
    params: SamplingParams
    logprob: LogprobSpec
    namespace: str = ""
    stream: bool = False
    stream_interval: int = 1
    stop_ids: frozenset[int] = frozenset()
    on_update: Callable[[], None] | None = None

    tokens: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    output_top: list[TopRows] = field(default_factory=list)
    output_ids_logprobs: list[FloatArray] = field(default_factory=list)
    input_logprobs: list[FloatArray] = field(default_factory=list)
    input_top: list[TopRows] = field(default_factory=list)
    input_ids_logprobs: list[FloatArray] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    finish_version: str = ""
    ready: int = 0
    sent: int = 0

    serial: int = -1
    table_row: int = -1
    node: Node | None = None
    tree_tokens: int = 0
    computed: int = 0
    prompt_done: bool = False
    cached_tokens: int | None = None
    num_retractions: int = 0
    created: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tokens = list(self.input_ids)

    @property
    def finished(self) -> bool:
        """True once a finish reason is set; nothing is computed after that."""
        return self.finish_reason is not None

    @property
    def prefill_only(self) -> bool:
        """True for scoring requests, which sample nothing."""
        return self.params.max_new_tokens == 0

    @property
    def max_prefix(self) -> int:
        """How many leading tokens may come from the cache: at least one is computed, and all that need a logprob."""
        last = len(self.tokens) - 1
        if self.prompt_done or not self.logprob.enabled or self.logprob.start < 0:
            return last
        return min(last, self.logprob.start)

    @property
    def remaining(self) -> int:
        """Response tokens that may still come."""
        return self.params.max_new_tokens - len(self.output_ids)

    def append(self, token: int, logprob: float, version: str) -> None:
        """Add one sampled token, then see whether it ends the response (by length first, as SGLang does)."""
        self.tokens.append(token)
        self.output_ids.append(token)
        self.output_logprobs.append(logprob)
        count = len(self.output_ids)
        spans = self.versions
        if spans and spans[-1].version == version:
            spans[-1].end = count
        else:
            spans.append(VersionSpan(version, count - 1, count))
        # A stop token in the last place is reported as length: SGLang looks at the length first.
        if count >= self.params.max_new_tokens:
            self.finish({"type": "length", "length": count}, version)
        elif token in self.stop_ids and count >= self.params.min_new_tokens:
            self.finish({"type": "stop", "matched": token}, version)
        # The first token goes out at once: it shows the client that the request runs.
        elif count == 1 or count - self.ready >= self.stream_interval:
            self.release()

    def finish(self, reason: dict[str, Any], version: str) -> None:
        """End the request; everything sampled becomes sendable. The first reason stays."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.finish_version = version
            self.release()

    def release(self) -> None:
        """Let the HTTP side send all tokens so far."""
        # A request that is not streamed has nothing to send before its end.
        if self.stream or self.finished:
            self.ready = len(self.output_ids)
            if self.on_update is not None:
                self.on_update()

    def restart(self) -> None:
        """Forget the KV (a retraction). A half-scored prompt starts over; a scored one keeps its logprobs."""
        self.num_retractions += 1
        self.computed = self.tree_tokens = 0
        self.node, self.table_row = None, -1
        if not self.prompt_done:
            self.input_logprobs.clear()
            self.input_top.clear()
            self.input_ids_logprobs.clear()
