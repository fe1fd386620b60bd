"""Which messages the dispatcher believes: who may say what, and what the state of the run allows.

Checked before anything is done with a message, beyond the bounds of the wire (`opd_async.transport.bounds`): a role
that has gone mad, or was restarted with old messages under way, changes nothing.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from opd_async.plan.plan import Plan, RoleKind, role_name
from opd_async.run.barrier import Barrier
from opd_async.run.evaluation_responses import EVAL_IDS
from opd_async.run.state import RunState
from opd_async.transport import messages as m

_EVERYBODY = frozenset(RoleKind)
_INTAKE = frozenset({RoleKind.INTAKE})
SPEAKERS: dict[type, frozenset[RoleKind]] = {
    m.Hello: _EVERYBODY,
    m.Heartbeat: _EVERYBODY,
    m.Failure: _EVERYBODY,
    m.LeaseDone: frozenset({RoleKind.ROLLOUT}),
    m.LeaseAway: frozenset({RoleKind.ROLLOUT}),
    m.FurtherWanted: frozenset({RoleKind.ROLLOUT}),
    m.FurtherUnused: frozenset({RoleKind.ROLLOUT}),
    m.EvalDone: frozenset({RoleKind.ROLLOUT}),
    m.EnginePace: frozenset({RoleKind.ROLLOUT, RoleKind.TEACHER}),
    m.SuspectScores: frozenset({RoleKind.TEACHER}),
    m.Paused: frozenset({RoleKind.ROLLOUT, RoleKind.TEACHER}),
    m.ResetDone: frozenset({RoleKind.ROLLOUT, RoleKind.TEACHER}),
    m.LearnerReply: frozenset({RoleKind.LEARNER}),
    m.RankBeat: frozenset(),
    **dict.fromkeys((m.Acks, m.PartStarted, m.StepStarted, m.Reclaimed, m.DrainRequest, m.Frontier), _INTAKE),
    **dict.fromkeys((m.Quiesced, m.NotSaved, m.TrainedSample), _INTAKE),
}
"""Which roles may send which message to the dispatcher, and nobody any other. Learner ranks send beats alone."""

OF_EVERY_INTAKE = (m.Hello, m.Heartbeat, m.Failure, m.TrainedSample)
"""What other intakes than the first one may send; the rest of `SPEAKERS` is for who decides."""


class Run(Protocol):
    """What is asked of the run."""

    plan: Plan
    barrier: Barrier
    state: RunState


class ControlBounds:
    """What the dispatcher's messages may say at this moment."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first = role_name(RoleKind.INTAKE, 0)
        self._newest_step = 0
        self.grow()

    def grow(self) -> None:
        """Believe the roles and the learner's ranks of the plan as it is now."""
        self._kinds = {role.name: role.kind for role in self._run.plan.roles}
        self._ranks = {f"rank-{rank}" for rank in range(self._run.plan.topology.learner.ranks)}

    def problem(self, role: str, message: m.Message) -> str | None:
        """Why a message is not believed; None if it is."""
        if role in self._ranks:
            mine = isinstance(message, m.RankBeat) and role == f"rank-{message.rank}"
            return None if mine else "a learner rank has beats of its own to send, and nothing else"
        kind = self._kinds.get(role)
        if kind is None:
            return "no role of this run"
        if kind not in SPEAKERS.get(type(message), frozenset()):
            return f"a {kind.value} has none to send"
        if kind is RoleKind.INTAKE and role != self._first and not isinstance(message, OF_EVERY_INTAKE):
            return "the first intake alone has any to send"
        if getattr(message, "role", role) != role:
            return f"role {message.role!r}"
        match message:
            case m.Acks():
                return self._acks(message)
            case m.PartStarted() | m.StepStarted():
                return self._step_started(message)
            case m.LeaseDone():
                return self._lease_done(role, message)
            case m.LeaseAway() | m.FurtherWanted() | m.FurtherUnused():
                return self._held_by_another(role, message.sample_id)
            case m.EnginePace() | m.SuspectScores():
                urls = self._run.plan.driven_by(role)
                return None if message.url in urls else f"url {message.url!r:.100} is no engine of its own"
            case m.EvalDone():
                return self._ids("token_ids", message.token_ids) or (
                    f"sample_id {message.sample_id} is of no evaluation" if message.sample_id < EVAL_IDS else None
                )
            case m.Paused():
                return self._paused(role, message)
            case m.ResetDone():
                asked = self._run.state.resetting.get(role)
                return None if asked == message.request else f"request {message.request} where {asked} is open"
            case m.Reclaimed():
                return self._ids("tokens", message.tokens) or self._reclaimed(message)
            case m.TrainedSample():
                # it follows its step, which the learner may have trained meanwhile
                ids = self._ids("prompt", message.prompt) or self._ids("response", message.response)
                return ids or self._due(message.version, self._run.state.version, self._run.state.version - 1)
            case m.Frontier():
                return self._frontier(message)
            case m.DrainRequest():
                return self._due(message.version, self._run.state.version)
            case m.LearnerReply() | m.Quiesced() | m.NotSaved():
                # while nothing is established the learner says from which version it goes on
                return self._due(message.version, self._run.state.version, self._run.state.version + 1)
        return None

    def _due(self, version: int, *expected: int) -> str | None:
        if self._run.state.version < 0 or version in expected:
            return None
        return f"version {version} while engines hold {self._run.state.version}"

    def _ids(self, name: str, ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str | None:
        vocab = self._run.plan.vocab_size
        return f"{name}: {int(ids.max())} in a vocabulary of {vocab}" if ids.size and int(ids.max()) >= vocab else None

    def _paused(self, role: str, paused: m.Paused) -> str | None:
        if not self._run.barrier.expects(role, paused.request):
            return f"request {paused.request} is not open"
        return self._unleased(paused.sample_ids) or self._too_long(paused.ends)

    def _reclaimed(self, reclaimed: m.Reclaimed) -> str | None:
        ids, book = frozenset(reclaimed.sample_ids.tolist()), self._run.state.book
        if book is None or ids not in self._run.state.reclaiming:
            return "nobody asked for these samples"
        rows = zip(
            reclaimed.sample_ids.tolist(),
            reclaimed.attempts.tolist(),
            reclaimed.ends.tolist(),
            reclaimed.complete.tolist(),
            strict=True,
        )
        for sample_id, attempt, end, complete in rows:
            if not complete and end < (trained := book.trained_end(sample_id)):
                return f"{end} tokens of sample {sample_id}, of which {trained} are trained"
            if attempt > (book.attempt_of(sample_id) or 0) + 1:
                return f"attempt {attempt} of sample {sample_id}"
        return self._too_long(reclaimed.ends)

    def _unleased(self, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str | None:
        book = self._run.state.book
        strange = next((one for one in ids.tolist() if book is not None and not book.was_leased(one)), None)
        return None if strange is None else f"sample {strange} was never leased"

    def _too_long(self, ends: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str | None:
        longest = self._run.plan.topology.engines.student.context_tokens + 1  # one more: the end itself is known
        return f"{int(ends.max())} tokens of a response" if ends.size and int(ends.max()) > longest else None

    def _acks(self, acks: m.Acks) -> str | None:
        actors = len(self._run.plan.actors)
        if acks.actors.size and int(acks.actors.max()) >= actors:
            return f"actor {int(acks.actors.max())} of {actors}"
        if self._run.state.version >= 0 and acks.next_step > self._run.state.version + 1:
            return f"step {acks.next_step} while engines hold weights {self._run.state.version}"
        book = self._run.state.book
        for sample_id, attempt in zip(acks.sample_ids.tolist(), acks.attempts.tolist(), strict=True):
            newest = None if book is None else book.attempt_of(sample_id)
            if newest is not None and attempt > newest + 1:  # one more: what was given up, and is leased again soon
                return f"attempt {attempt} of sample {sample_id}, of which {newest} is the newest"
        return self._unleased(acks.sample_ids) or self._too_long(acks.ends)

    def _step_started(self, started: m.PartStarted | m.StepStarted) -> str | None:
        book = self._run.state.book
        if book is None:
            return "no step can start yet"
        if text := self._unleased(started.taken_ids) or self._too_long(started.taken_ends):
            return text
        for sample_id, end in zip(started.taken_ids.tolist(), started.taken_ends.tolist(), strict=True):
            if book.is_completed(sample_id):
                return f"sample {sample_id} has been trained to its end before"
            if end < (trained := book.trained_end(sample_id)):
                return f"sample {sample_id} up to {end}, of which {trained} are trained"
        if started.taken_given is not None and (started.taken_given > started.taken_ends).any():
            return "more tokens were given than there are"
        if len(np.unique(started.taken_ids)) != len(started.taken_ids):
            return "a sample is taken twice"
        if started.version < self._newest_step:
            return f"step {started.version} after step {self._newest_step}"
        # it may be overtaken by the learner's answer to the step, and by the weight update that follows
        problem = self._due(started.version, self._run.state.version, self._run.state.version - 1)
        self._newest_step = self._newest_step if problem else started.version
        return problem

    def _lease_done(self, role: str, done: m.LeaseDone) -> str | None:
        # what was leased before the learner went back to a checkpoint is not in the book: its end says nothing
        longest = self._run.plan.topology.engines.student.context_tokens
        if done.response_tokens > longest:
            return f"a response of {done.response_tokens} tokens in a context of {longest}"
        if done.given_tokens > done.response_tokens:
            return f"a response of {done.response_tokens} tokens, of which {done.given_tokens} were given"
        return self._held_by_another(role, done.sample_id)

    def _held_by_another(self, role: str, sample_id: int) -> str | None:
        holder = None if self._run.state.book is None else self._run.state.book.holder(sample_id)
        return f"sample {sample_id} is leased to {holder}" if holder not in (None, role) else None

    def _frontier(self, frontier: m.Frontier) -> str | None:
        low, high = frontier.completed[:, 0], frontier.completed[:, 1]
        if frontier.completed.shape[1] != 2 or (low >= high).any() or (low[1:] <= high[:-1]).any():
            return "completed: no ascending intervals"
        if frontier.partial_given is not None and (frontier.partial_given > frontier.partial_ends).any():
            return "partial_given: more tokens were given than there are"
        problem = self._ids("partial_tokens", frontier.partial_tokens)
        self._newest_step = self._newest_step if problem else frontier.version
        return problem
