"""Which chunks a teacher actor and the intake believe: those of a leased sample, within what the plan allows.

Beyond the bounds of the wire (`opd_async.transport.bounds`), and before any state changes. How old a token may be, and
that versions never go back within a sample, is for the assembler, which knows what it holds.
"""

from __future__ import annotations

from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan, RoleKind
from opd_async.scheduling.further import FURTHER_IDS, MAX_FURTHER, is_further
from opd_async.scheduling.grants import Grants
from opd_async.transport.messages import Chunk, ScoredChunk


class ChunkBounds:
    """Checks of one run. A `sender` is who has shown a key, None on an open socket."""

    def __init__(self, plan: Plan, keys: RunKeys | None) -> None:
        """`keys` are those of the run; without them (a test) leases are not checked."""
        self._vocab = plan.vocab_size
        self._context = plan.topology.engines.student.context_tokens
        self._teacher_contexts = {name: side.engines.context_tokens for name, side in plan.topology.teachers.items()}
        self._live = plan.topology.opd.on_student_engines
        self._actors = plan.actors
        self._teachers = {role.name: role.teacher for role in plan.of_kind(RoleKind.TEACHER)}
        self._grants = Grants(keys)

    def of_chunk(self, sender: str | None, chunk: Chunk) -> str | None:
        """Why a chunk on its way to a teacher is not believed; None if it is."""
        if sender is not None and sender != self._actors.get(chunk.actor):
            return f"actor {chunk.actor} from {sender}"
        room, read = self._teacher_contexts.get(chunk.teacher, self._context), max(chunk.read_prompts)
        if read + chunk.end > room:
            return f"{read} + {chunk.end} tokens in the teacher's context of {room}"
        if chunk.context is not None and chunk.teacher_prompt_tokens and chunk.teacher_prompt is None:
            return f"a context without the teacher's prompt of {chunk.teacher_prompt_tokens} tokens"
        if chunk.context is not None and chunk.contrast_prompt_tokens and chunk.contrast_prompt is None:
            return f"a context without the contrast's prompt of {chunk.contrast_prompt_tokens} tokens"
        return self._common(chunk)

    def of_scored(self, sender: str | None, chunk: ScoredChunk, newest: int) -> str | None:
        """The same of a scored one; no engine holds weights beyond version `newest`."""
        if sender is not None and sender != chunk.teacher_id:
            return f"teacher_id {chunk.teacher_id!r:.80} from {sender}"
        if self._teachers and self._teachers.get(chunk.teacher_id) != chunk.teacher:
            return f"{chunk.teacher_id!r:.80} does not score for {chunk.teacher!r:.80}"
        if not self._teachers and chunk.teacher_id != self._actors.get(chunk.actor):
            return f"actor {chunk.actor} from {chunk.teacher_id!r:.80}"
        if chunk.weight_version > newest:
            return f"weight version {chunk.weight_version}, the newest is {newest}"
        if problem := self._of_scores(chunk, newest):
            return problem
        topk = chunk.topk_ids
        if topk is not None and topk.size and int(topk.max()) >= self._vocab:
            return f"topk_ids: {int(topk.max())} in a vocabulary of {self._vocab}"
        return self._common(chunk)

    def _of_scores(self, chunk: ScoredChunk, newest: int) -> str | None:
        """The same of the student's weights that have scored it, where these teach: the bound covers them."""
        version, tells = chunk.scored_version, self._live and chunk.sampled and bool(len(chunk.token_ids))
        if (version is not None) != tells:
            return f"scored by weights {version}, where {'live' if self._live else 'no'} weights of the student teach"
        if version is not None and not chunk.weight_version <= version <= newest:
            return f"scored by weights {version}: its tokens are of {chunk.weight_version}, the newest is {newest}"
        return None

    def _common(self, chunk: Chunk | ScoredChunk) -> str | None:
        if chunk.actor not in self._actors:
            return f"there is no actor {chunk.actor}"
        if not self._grants.holds(chunk.grant, chunk.sample_id, chunk.attempt, chunk.actor):
            return f"sample {chunk.sample_id}, attempt {chunk.attempt} was never leased to actor {chunk.actor}"
        if is_further(chunk.sample_id) != (chunk.episode is not None):
            return f"sample {chunk.sample_id} of episode {chunk.episode}"
        if (begun := chunk.further) is not None and (len(begun) > MAX_FURTHER or (begun < FURTHER_IDS).any()):
            return f"further: {len(begun)} samples, the first is {begun[0] if len(begun) else None}"
        if chunk.prompt_tokens + chunk.end > self._context:
            return f"{chunk.prompt_tokens} + {chunk.end} tokens in a context of {self._context}"
        for name in ("token_ids", "context", "teacher_prompt", "contrast_prompt"):
            ids = getattr(chunk, name)
            if ids is not None and ids.size and int(ids.max()) >= self._vocab:
                return f"{name}: {int(ids.max())} in a vocabulary of {self._vocab}"
        return None
