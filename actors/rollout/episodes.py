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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opd_async.actors.rollout.endpoint import Endpoint
from opd_async.actors.rollout.episode_generation import DivergedError, EpisodeGeneration
from opd_async.actors.rollout.generation import Student
from opd_async.actors.rollout.given_text import GivenText
from opd_async.actors.rollout.samples import EpisodeSamples, Work
from opd_async.actors.rollout.session import Limits, ResponseFullError, Session, number_of
from opd_async.actors.rollout.tool_pool import ToolPool
from opd_async.actors.rollout.waiting import Patience
from opd_async.config.rewards import RewardKind
from opd_async.data.tokenizer import Tokenizer
from opd_async.hooks import add_working_directory, load_hook
from opd_async.role import Role
from opd_async.scheduling.leases import UNDER_WAY
from opd_async.transport import messages as m

log = logging.getLogger(__name__)

KEY = "rollout.function"
FINISHES = {"finished": m.Finish.STOP, "empty": m.Finish.STOP, "full": m.Finish.LENGTH}
"""How the samples of an episode end, by its end; those of others have failed."""
OTHER_THREADS = 8
"""For what else of a rollout actor waits in a thread."""
MOST_SAID = 500
"""Characters of an error that a line of the log has."""


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
        self._tools = ToolPool(role, topology.rollout.tools)
        self._endpoint = Endpoint(role) if topology.rollout.endpoint else None

    def wants(self, lease: m.Lease) -> bool:
        """Whether an episode makes the response, and not the student alone or a data set."""
        return self._function is not None and lease.given is None

    def generation(self, lease: m.Lease, rid: str, student: Student, *, awaits_reward: bool) -> EpisodeGeneration:
        """The state of a lease that an episode will fill."""
        return EpisodeGeneration(lease=lease, rid=rid, student=student, awaits_reward=awaits_reward)

    def start(self) -> None:
        """Listen for agents, where there is an endpoint, and start the processes of tools, where there are any.

        Agents that block run in threads, by the user's `asyncio.to_thread`: there is one for each episode that may be
        under way. Those that waited for one would spend their deadline with it.
        """
        if self._function is not None:
            threads = UNDER_WAY * self._settings.slots + OTHER_THREADS
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "blocking"))
        for index in range(self._settings.tools.workers if self._settings.tools.functions else 0):
            self._role.spawn(self._tools.run(), f"tools-{index}")
        if self._endpoint is not None:
            self._role.spawn(self._endpoint.serve(), "endpoint")

    async def run(self, generation: EpisodeGeneration, work: Work) -> list[EpisodeGeneration]:
        """Run one episode to its end, whatever it does; returns the samples of its further conversations.

        On cancel: the episode is cancelled, and its response has not ended.
        """
        limits = Limits(
            tokens=generation.lease.max_tokens or self._settings.sampling.max_response_tokens,
            stop_token_ids=self._role.plan.stop_token_ids,
            vocab=self._role.plan.vocab_size,
        )
        samples = EpisodeSamples(
            role=self._role, first=generation, text=self._text, limits=limits, work=work, tools=self._tools
        )
        try:
            reward, end = await self._end(samples, generation)
            if end == "finished" and samples.empty:
                end = "empty"
            self._role.metrics["opd_rollout_episodes_total"].labels(end).inc()
            await samples.finish(FINISHES.get(end, m.Finish.FAILED), reward, rewards=self._rewards)
            return samples.further_ones
        finally:
            samples.leave()

    async def _end(self, samples: EpisodeSamples, generation: EpisodeGeneration) -> tuple[float | None, str]:
        """What the episode has earned, and how it ended."""
        try:
            async with self._role.clock.timeout(self._settings.episode_deadline_s) as scope:
                samples.begin(Patience(scope))
                try:
                    reward = await self._reward(samples, generation.lease)
                    generation.require_all_replayed()
                    return reward, "finished"
                finally:
                    await samples.close()
        except ResponseFullError:
            return None, "full"
        except DivergedError as error:
            return None, self._failed(generation, "diverged", str(error))
        except TimeoutError as error:
            expired = scope.expired()
            text = f"its own code took longer than {self._settings.episode_deadline_s:g} s" if expired else repr(error)
            return None, self._failed(generation, "deadline" if expired else "raised", text)
        except Exception as error:  # the edge of the user's code: whatever it raises ends the episode alone
            return None, self._failed(generation, "raised", repr(error))
        finally:
            await samples.rest()

    async def _reward(self, samples: EpisodeSamples, lease: m.Lease) -> float | None:
        """Run the user's function; what it has earned. An error that an agent let pass is the one that it was told."""
        session, row = samples.first, self._row(lease)
        if self._endpoint is None:
            returned = await self._call(session, row)
        else:
            async with self._endpoint.open(samples, lease.temperature) as conversations:
                try:
                    returned = await self._call(session, row)
                except Exception as error:
                    if conversations.fault is None:
                        raise
                    raise conversations.fault from error
        return number_of(session.earned if returned is None else returned)

    async def _call(self, session: Session, row: dict[str, Any]) -> Any:
        """The user's function. What it raises to end its own task, or the process, ends the episode alone."""
        try:
            return await self._function(session, row)
        except (asyncio.CancelledError, SystemExit) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # from outside: a deadline, or the end of the actor
            raise RuntimeError(f"the episode's own code ended with {error!r}") from error

    def _row(self, lease: m.Lease) -> dict[str, Any]:
        """What an episode is told of its prompt."""
        prompt = self._text.decode(lease.prompt.tolist())
        kind = "train" if lease.kind == m.LeaseKind.TRAIN else "evaluation"
        return {"prompt": prompt, "label": lease.label, "metadata": json.loads(lease.metadata), "kind": kind}

    def _failed(self, generation: EpisodeGeneration, end: str, text: str) -> str:
        self._role.count("episodes_failed")
        said = text[:MOST_SAID]
        log.warning("%s: the episode of sample %d failed (%s): %s", KEY, generation.lease.sample_id, end, said)
        return end
