"""A null learner: checks what it is given to train, token by token, and answers at once.

Train -> every row against the pattern, every response from 0 and without gaps -> LearnerReply
SyncWeights -> the null engines hear the version; SaveCheckpoint -> empty files
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import numpy as np
import zmq.asyncio

from opd_async.bench.no_weights import save_no_weights
from opd_async.bench.wire.pattern import LOGPROBS, PROMPT_TOKENS, SCORES, TOKENS
from opd_async.errors import RoleError
from opd_async.keys import incarnation
from opd_async.plan.plan import Plan, RolePlan
from opd_async.scheduling.packing import from_message
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlClient
from opd_async.transport.door import Passport
from opd_async.transport.step_batch import MicroBatch


class Account:
    """What has been trained of each prompt; `RoleError` for a token that is wrong, missing or comes twice."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = defaultdict(int)

    @property
    def tokens(self) -> int:
        """Response tokens so far."""
        return sum(self._ends.values())

    def check(self, batch: MicroBatch) -> int:
        """Trained tokens of one micro-batch, all of them found to be the right ones."""
        cuts = np.searchsorted(batch.rows, batch.cu_seqlens)
        for first, last, low, high in zip(batch.cu_seqlens, batch.cu_seqlens[1:], cuts, cuts[1:], strict=False):
            ids, targets = batch.token_ids[first:last], batch.rows[low:high] - first + 1
            prompt = int(ids[0])
            start = self._ends[prompt]
            new = slice(PROMPT_TOKENS + start, len(ids))
            right = (
                np.array_equal(targets, np.arange(new.start, new.stop))
                and np.array_equal(ids[1:], TOKENS[1 : len(ids)])
                and np.allclose(batch.behaviour_logprobs[low:high], LOGPROBS[new])
                and np.allclose(batch.teacher_logprobs[low:high], SCORES[new])
            )
            if not right:
                raise RoleError(f"prompt {prompt}: what came behind its response token {start} is not what was sent")
            self._ends[prompt] = len(ids) - PROMPT_TOKENS
        return len(batch.rows)


class Ranks:
    """All ranks of the learner in one process: a step is trained when each has had its last part of it."""

    def __init__(self, plan: Plan, mine: RolePlan) -> None:
        self._plan, self._mine = plan, mine
        self._context, self._account = zmq.asyncio.Context(), Account()
        self._version = 0
        self._found = self._told = 0
        """Tokens of the open step that ranks have been given, and that it is said to have."""
        self._whole = asyncio.Barrier(plan.topology.learner.ranks)

    async def obey(self) -> None:
        """Commands until Stop. On cancel: sockets are closed."""
        try:
            async with aiohttp.ClientSession(raise_for_status=True) as session, asyncio.TaskGroup() as group:
                for rank in range(self._plan.topology.learner.ranks):
                    group.create_task(self._rank(rank, session))
        finally:
            self._context.destroy(linger=0)  # sockets that are closed already still deliver what they hold

    async def _rank(self, rank: int, session: aiohttp.ClientSession) -> None:
        plan, name = self._plan, f"rank-{rank}"
        with ExitStack() as channels:
            commands = channels.enter_context(self._channel(plan.batches[plan.intake_of_rank(rank)], name))
            up = channels.enter_context(self._channel(plan.control, self._mine.name)) if rank == 0 else None
            for channel in (commands, up):
                if channel is not None:
                    await channel.send(m.Hello(self._mine.name, incarnation()))
            while True:
                command = await commands.receive()
                if isinstance(command, m.Stop):
                    return
                if isinstance(command, m.Train):
                    self._found += sum(self._account.check(batch) for batch in from_message(command).micro_batches)
                    self._told += command.loss_tokens if rank == 0 else 0
                    if not command.last:
                        if rank == 0:
                            await commands.send(m.PartDone(command.version, command.part))
                        continue
                    await self._whole.wait()
                if up is not None:
                    stats = await self._done(command, session)
                    await up.send(m.LearnerReply(type(command).__name__, self._version, None, stats))

    def _channel(self, address: str, name: str) -> ControlClient:
        return ControlClient(self._context, address, name, passport=Passport.of_environment(name))

    async def _done(self, command: m.Message, session: aiohttp.ClientSession) -> dict[str, float]:
        """Do what the first rank does, once for all; returns the figures of its answer."""
        match command:
            case m.Train():
                found, told, self._found, self._told = self._found, self._told, 0, 0
                if found != told:
                    raise RoleError(f"step {command.version}: {found} tokens of {told}")
                self._version = command.version + 1
                return {"checked_tokens": float(self._account.tokens)}
            case m.SyncWeights():
                for url in command.engines:
                    version = {"new_version": str(self._version)}
                    async with session.post(f"{url}/update_weight_version", json=version):
                        pass
            case m.SaveCheckpoint():
                return await asyncio.to_thread(save_no_weights, Path(command.folder))
        return {}


async def obey(plan: Plan, mine: RolePlan) -> None:
    """As `Ranks.obey`."""
    await Ranks(plan, mine).obey()
