"""One response while it is being generated: tokens received, chunks that are due, requests to go on with."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.engine_client import Sampling
from opd_async.actors.client.replies import Delta
from opd_async.actors.client.routed_client import GenerationClient, RoutedClient
from opd_async.clock import WALL
from opd_async.config.topology import RolloutSection
from opd_async.errors import EngineError, EngineFault
from opd_async.estimators.topk import TopK
from opd_async.estimators.topk_kl import Divergences
from opd_async.scheduling.breaker import Failures
from opd_async.transport import messages as m


@dataclass(slots=True, kw_only=True)
class Student:
    """A student engine as a rollout actor sees it. The gate is open while it may generate with weights `version`."""

    client: GenerationClient
    urls: tuple[str, ...]
    """The engine itself; behind a router, all engines there."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    version: int = -1
    down: bool = False
    """The engine is gone: it cannot be paused, and will send no more tokens."""
    slow: bool = False
    """The engine is far slower than its peers: others get its work."""
    listed: bool = False
    """Generation stands still, and the tokens that exist are being said: what comes now is in no list."""

    @property
    def routed(self) -> bool:
        """Whether it is behind a router: which engine has a request is not known, and other actors' requests run there
        too."""
        return isinstance(self.client, RoutedClient)

    def lost(self) -> None:
        """Close the gate of an engine that is gone, until its successor has the weights.

        Behind a router only one of several is gone: the others generate on, and must still be paused.
        """
        self.gate.clear()
        self.down = not self.routed


class Comparison(NamedTuple):
    """What an evaluation's response is compared with, in n places: the teacher's logprobs float32[n] and both
    divergences, float64[n]; or, where the launcher asks the teacher, the student's likeliest tokens. None: not asked
    for."""

    teacher_logprobs: NDArray[np.float32] | None = None
    divergences: Divergences | None = None
    student_topk: TopK | None = None


@dataclass(slots=True, kw_only=True)
class Generation:
    """The state of one lease. Tokens wait in `_pending` until a chunk is due; a chunk has one weight version."""

    lease: m.Lease
    rid: str
    student: Student
    finish: m.Finish | None = None
    failures: Failures = field(default_factory=Failures)
    received: int = 0
    """Tokens that the current request has delivered."""
    away: bool = False
    """The episode's own code has the word: nothing is to be generated now."""
    awaits_reward: bool = False
    """The response is to be judged when it has ended: its end is not announced before `rewarded`."""
    streaming: bool = False
    """A request to the student engine is under way."""
    scope: asyncio.Timeout | None = None
    """Around a request to a student engine: what ends it early when another engine is to go on."""
    given_tokens: int = 0
    """Tokens of the response so far that nobody sampled."""
    episode: int | None = None
    """Of a further conversation that is trained: the leased sample whose episode it is."""
    further: list[int] = field(default_factory=list)
    """The further samples that the episode of this leased one has begun."""
    first_version: int | None = None
    """Weight version of the first request: what a prefix cache holds of this response was begun under it."""
    _tokens: list[NDArray[np.int32]] = field(default_factory=list)
    _pending: list[Delta] = field(default_factory=list)
    _pending_tokens: int = 0
    _given_waits: bool = False
    _sent_end: int = 0
    _made_at: float = 0.0
    _closed: bool = False
    _reward: float | None = None
    _turns: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sent_end = len(self.lease.prefix)

    @property
    def length(self) -> int:
        """Response tokens so far, the prefix of earlier attempts included."""
        return len(self.lease.prefix) + sum(len(part) for part in self._tokens)

    @property
    def ended(self) -> bool:
        """Whether no further request is needed for now."""
        return self.finish is not None

    @property
    def reward(self) -> float | None:
        """What the response has earned, where that is known."""
        return self._reward

    def settle(self, max_tokens: int, stop_token_ids: tuple[int, ...]) -> bool:
        """Note how the response ended, if the tokens at hand already end it; returns whether they do."""
        self.finish = self.natural_finish(max_tokens, stop_token_ids)
        return self.ended

    def new_request(self) -> None:
        """Prepare the next request after one that failed: it goes on behind the tokens that arrived."""
        self.rid = f"{self.lease.sample_id:016x}-{uuid.uuid4().hex[:12]}"
        self.received = 0

    def cache_key(self, keep: bool) -> str:
        """Namespace of the next request in the engine's prefix cache: the weight version, or, to `keep` the keys and
        values that earlier requests of this response have left there, the version of the first."""
        if self.first_version is None or not keep:
            self.first_version = self.student.version
        return str(self.first_version)

    def input_ids(self) -> NDArray[np.int32]:
        """int32[prompt + response so far]."""
        return np.concatenate([self.lease.prompt, self.lease.prefix, *self._tokens]).astype(np.int32)

    def max_tokens(self, settings: RolloutSection) -> int:
        """Most tokens that the response may have, its prefix included."""
        return self.lease.max_tokens or settings.sampling.max_response_tokens

    def sampling(self, settings: RolloutSection, stop_token_ids: tuple[int, ...]) -> Sampling:
        """Parameters of the request for the rest of the response."""
        sampling = settings.sampling
        return Sampling(
            temperature=self.lease.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=self.max_tokens(settings) - self.length,
            stop_token_ids=stop_token_ids,
            stream_interval=settings.stream_interval,
        )

    def natural_finish(self, max_tokens: int, stop_token_ids: tuple[int, ...]) -> m.Finish | None:
        """How the response ended, if the tokens at hand already end it (its last event may have been lost)."""
        if self._ends_with(stop_token_ids):
            return m.Finish.STOP
        return m.Finish.LENGTH if self.length >= max_tokens else None

    def _ends_with(self, token_ids: tuple[int, ...]) -> bool:
        parts = [self.lease.prefix, *self._tokens]
        last = next((part[-1] for part in reversed(parts) if len(part)), None)
        return last is not None and int(last) in token_ids

    def take(self, delta: Delta, on_teacher: bool, stop_token_ids: tuple[int, ...]) -> int:
        """Add streamed tokens; returns how many. `EngineError` when they were not made by the weights of the last
        `Resume`, or come between the list of what exists and the next `Resume`: such tokens are in no mark, and could
        be trained too late. An engine sends some that was only thought to be gone, or that somebody else has started.
        """
        if len(delta.token_ids):
            expected = str(self.student.version)
            if not on_teacher and delta.weight_version != expected:
                text = f"weight_version: {delta.weight_version!r} where the learner sent {expected}"
                raise EngineError(text, EngineFault.FOREIGN)
            if not on_teacher and self.student.listed:
                raise EngineError("tokens of an engine that has been stopped, or is gone", EngineFault.FOREIGN)
            self._made_at = WALL.now()
            self._tokens.append(delta.token_ids)
            self._pending.append(delta)
            self._pending_tokens += len(delta.token_ids)
            self.received += len(delta.token_ids)
            self.failures = Failures()
        self.finish = delta.finish
        if self.finish is m.Finish.LENGTH and self._ends_with(stop_token_ids):
            # engines say "length" when the last allowed token happens to be a stop token
            self.finish = m.Finish.STOP
        return len(delta.token_ids)

    def give(self, token_ids: NDArray[np.int32]) -> None:
        """Append int32[n], n > 0, that nobody sampled: context for what comes behind them, never trained or scored.

        They leave with the next `due_chunks`, in a chunk of their own.
        """
        version = str(max(self.student.version, 0))
        self.given_tokens += len(token_ids)
        self._made_at = WALL.now()
        self._tokens.append(token_ids)
        self._pending.append(Delta(token_ids, np.zeros(0, np.float32), version, None, False, sampled=False))
        self._pending_tokens += len(token_ids)
        self._given_waits = True

    def done(self) -> m.LeaseDone:
        """What the dispatcher is told when the response has ended."""
        lease, finish = self.lease, self.finish or m.Finish.STOP
        return m.LeaseDone(lease.sample_id, lease.attempt, self.length, finish.value, self.given_tokens)

    def due_chunks(self, chunk_tokens: int, actor: int) -> list[m.Chunk]:
        """Chunks that must leave now: of an older weight version, at `chunk_tokens`, of given tokens and what stands
        before them, or at the end of the response.

        Tokens do not wait for a reward: an empty chunk behind them then says how the response ended and what it earned.
        """
        if self.finish is None and self._pending_tokens < chunk_tokens and self._may_wait():
            return []
        self._given_waits = False
        end = None if self.awaits_reward else self.finish
        chunks: list[m.Chunk] = []
        while self._pending:
            run = list(next(groupby(self._pending, _kind))[1])
            is_last_run, sampled = len(run) == len(self._pending), run[0].sampled
            few = sampled and sum(len(delta.token_ids) for delta in run) < chunk_tokens
            if is_last_run and self.finish is None and few:
                break
            del self._pending[: len(run)]
            chunks.append(self._chunk(run, actor, end if is_last_run and sampled else None))
        if end is not None and not self._closed:
            chunks.append(self._chunk([], actor, end))
        return chunks

    def _may_wait(self) -> bool:
        """Whether all that waits was sampled from the same weights; versions never go back."""
        if self._given_waits or not self._pending:
            return not self._given_waits
        return self._pending[0].weight_version == self._pending[-1].weight_version

    def rewarded(self, reward: float | None, turns: Mapping[int, float] = MappingProxyType({})) -> None:
        """Set the reward (None: it could not be judged), and what turns have earned of it, by the position after each;
        the end of the response may now be announced."""
        self._reward, self._turns, self.awaits_reward = reward, {} if reward is None else dict(turns), False

    def _chunk(self, deltas: list[Delta], actor: int, finish: m.Finish | None) -> m.Chunk:
        ids = [delta.token_ids for delta in deltas]
        logprobs = [delta.logprobs for delta in deltas]
        turns = self._turns if finish is not None else {}
        chunk = m.Chunk(
            sample_id=self.lease.sample_id,
            attempt=self.lease.attempt,
            actor=actor,
            prompt_id=self.lease.prompt_id,
            prompt_tokens=len(self.lease.prompt),
            start=self._sent_end,
            weight_version=int(deltas[0].weight_version) if deltas else max(self.student.version, 0),
            finish=None if finish is None else finish.value,
            label=self.lease.label,
            made_at=self._made_at,
            token_ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            behaviour_logprobs=np.concatenate(logprobs) if logprobs else np.zeros(0, np.float32),
            reward=self._reward if finish is not None else None,
            teacher=self.lease.teacher,
            grant=self.lease.grant,
            teacher_prompt_tokens=0 if self.lease.teacher_prompt is None else len(self.lease.teacher_prompt),
            contrast_prompt_tokens=0 if self.lease.contrast_prompt is None else len(self.lease.contrast_prompt),
            sampled=deltas[0].sampled if deltas else True,
            episode=self.episode,
            further=np.array(self.further, np.int64) if self.further and finish is not None else None,
            turn_ends=np.array(list(turns), np.int32) if turns else None,
            turn_rewards=np.array(list(turns.values()), np.float32) if turns else None,
        )
        self._sent_end = chunk.end
        self._pending_tokens -= len(chunk.token_ids)
        self._closed = finish is not None
        return chunk

    def response(self) -> NDArray[np.int32]:
        """int32[n], the response so far."""
        return self.input_ids()[len(self.lease.prompt) :]

    def logprobs(self) -> NDArray[np.float32]:
        """float32[n], nats: with what the tokens of an evaluation's response were sampled. Chunks are made in training
        alone: every token is still here."""
        return np.concatenate([np.zeros(0), *(delta.logprobs for delta in self._pending)]).astype(np.float32)

    @property
    def versions(self) -> set[str]:
        """The weight versions, as engines name them, of all tokens of an evaluation's response."""
        return {delta.weight_version for delta in self._pending}

    def evaluation(self, reward: float | None, compared: Comparison | None = None) -> m.EvalDone:
        """The complete response of an evaluation lease, and what it earned, or what the teacher thinks of it, where
        that was asked for."""
        finish = self.finish.value if self.finish else ""
        version = max(self.student.version, 0)
        own = None if compared is None else self.logprobs()
        teacher, divergences, lists = compared or (None, None, None)
        return m.EvalDone(
            sample_id=self.lease.sample_id,
            finish=finish,
            weight_version=version,
            token_ids=self.response(),
            reward=reward,
            student_logprobs=own,
            teacher_logprobs=teacher,
            reverse_kl=None if divergences is None else divergences.reverse.astype(np.float32),
            forward_kl=None if divergences is None else divergences.forward.astype(np.float32),
            student_topk_ids=None if lists is None else lists.ids,
            student_topk_logprobs=None if lists is None else lists.logprobs,
        )


def _kind(delta: Delta) -> tuple[bool, str]:
    """What is alike of all tokens of a chunk."""
    return delta.sampled, delta.weight_version
