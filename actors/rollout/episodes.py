"""The user's episodes (`rollout.function`): run beside one another in a rollout actor, counted, ended in time.

    Lease -> async def episode(session, row) -> turns of the student, given tokens -> the end, and a reward

An episode that fails leaves the tokens that it has: they were sampled by the student where it stood, and are trained
like every other; it has no reward. Only what waits for the episode's own code counts against its deadline: a turn may
take as long as engines and weight updates do. On cancel: the episode is cancelled at the place where it waits.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from opd_async.actors.rollout.episode_generation import DivergedError, EpisodeGeneration
from opd_async.actors.rollout.generation import Student
from opd_async.actors.rollout.given_text import GivenText
from opd_async.actors.rollout.session import Limits, ResponseFullError, Session, number_of
from opd_async.config.rewards import RewardKind
from opd_async.data.tokenizer import Tokenizer
from opd_async.hooks import add_working_directory, load_hook
from opd_async.role import Role
from opd_async.transport import messages as m

log = logging.getLogger(__name__)

KEY = "rollout.function"
AWAY_AFTER_S = 0.2
"""A tool that takes longer frees its episode's slot; telling of shorter ones would cost more than it gains."""
Step = Callable[[EpisodeGeneration], Awaitable[None]]


class Episodes:
    """The episodes of one rollout actor; none where the topology names no function."""

    def __init__(self, role: Role) -> None:
        """Load the function and the tokenizer; raises `InputError` if that cannot be done."""
        topology = role.plan.topology
        self._role = role
        self._settings = topology.rollout
        self._rewards = topology.reward.kind is RewardKind.EPISODE
        self._function: Any = None
        if (path := topology.rollout.function) is not None:
            add_working_directory()
            self._function = load_hook(KEY, path)
            tokenizer = Tokenizer(topology.models.student.path, topology.data.chat_template)
            self._text = GivenText(tokenizer, topology.data.chat_template_kwargs)

    def wants(self, lease: m.Lease) -> bool:
        """Whether an episode makes the response, and not the student alone or a data set."""
        return self._function is not None and lease.given is None

    def generation(self, lease: m.Lease, rid: str, student: Student, *, awaits_reward: bool) -> EpisodeGeneration:
        """The state of a lease that an episode will fill."""
        return EpisodeGeneration(lease=lease, rid=rid, student=student, awaits_reward=awaits_reward)

    async def run(self, generation: EpisodeGeneration, generate: Step, deliver: Step) -> None:
        """Run one episode to its end, whatever it does. `generate` makes a turn, `deliver` sends what is there.

        On cancel: the episode is cancelled, and its response has not ended.
        """
        away = _Away(self._role, generation)
        limits = Limits(
            tokens=generation.lease.max_tokens or self._settings.sampling.max_response_tokens,
            stop_token_ids=self._role.plan.stop_token_ids,
            vocab=self._role.plan.vocab_size,
        )
        reward, end = None, "finished"
        try:
            async with self._role.clock.timeout(self._settings.episode_deadline_s) as scope:

                async def turn(generation: EpisodeGeneration) -> None:
                    left = _stopped(scope)
                    await away.back()
                    try:
                        await generate(generation)
                        await deliver(generation)
                    finally:
                        away.begins()
                        scope.reschedule(asyncio.get_running_loop().time() + left)

                session = Session(generation, self._text, limits, turn, deliver)
                away.begins()
                try:
                    returned = await self._function(session, self._row(generation.lease))
                    reward = number_of(session.reward if returned is None else returned)
                finally:
                    await session.close()
        except ResponseFullError:
            end = "full"
        except DivergedError as error:
            end = self._failed(generation, "diverged", str(error))
        except TimeoutError as error:
            expired = scope.expired()
            text = f"its own code took longer than {self._settings.episode_deadline_s:g} s" if expired else repr(error)
            end = self._failed(generation, "deadline" if expired else "raised", text)
        except Exception as error:  # the edge of the user's code: whatever it raises ends the episode alone
            end = self._failed(generation, "raised", repr(error))
        finally:
            await away.ends()
        if end == "finished" and generation.length == generation.given_tokens:
            end = "empty"
        self._role.metrics["opd_rollout_episodes_total"].labels(end).inc()
        generation.finish = {"finished": m.Finish.STOP, "empty": m.Finish.STOP, "full": m.Finish.LENGTH}.get(
            end, m.Finish.FAILED
        )
        if self._rewards or generation.finish is m.Finish.FAILED:
            generation.rewarded(reward)
        await deliver(generation)

    def _row(self, lease: m.Lease) -> dict[str, Any]:
        """What an episode is told of its prompt."""
        prompt = self._text.decode(lease.prompt.tolist())
        kind = "train" if lease.kind == m.LeaseKind.TRAIN else "evaluation"
        return {"prompt": prompt, "label": lease.label, "metadata": json.loads(lease.metadata), "kind": kind}

    def _failed(self, generation: EpisodeGeneration, end: str, text: str) -> str:
        self._role.count("episodes_failed")
        log.warning("%s: the episode of sample %d failed (%s): %s", KEY, generation.lease.sample_id, end, text)
        return end


def _stopped(scope: asyncio.Timeout) -> float:
    """Stop the clock of a deadline; returns the seconds that were left."""
    when = scope.when()
    assert when is not None
    scope.reschedule(None)
    return when - asyncio.get_running_loop().time()


class _Away:
    """Tells the dispatcher when an episode has waited for its own code for a while, and when it is back: meanwhile it
    needs no slot."""

    def __init__(self, role: Role, generation: EpisodeGeneration) -> None:
        self._role = role
        self._generation = generation
        self._said = False
        self._task: asyncio.Task[None] | None = None

    def begins(self) -> None:
        """The episode's own code has the word."""
        self._generation.away = True
        if self._generation.lease.kind == m.LeaseKind.TRAIN:
            self._task = self._role.spawn(self._tell_later(), f"away-{self._generation.lease.sample_id}")

    async def _tell_later(self) -> None:
        await self._role.clock.sleep(AWAY_AFTER_S)
        self._said = True
        await self._tell(True)

    async def back(self) -> None:
        """The student has the word. On cancel: the dispatcher may think that the episode is away still."""
        await self.ends()
        if self._said:
            self._said = False
            await self._tell(False)

    async def ends(self) -> None:
        """Nothing more is to be told."""
        self._generation.away = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _tell(self, away: bool) -> None:
        lease = self._generation.lease
        await self._role.control.send(m.LeaseAway(lease.sample_id, lease.attempt, away))
