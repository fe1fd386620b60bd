"""A null learner: checks what it is given to train, token by token, and answers at once.

Train -> every row against the pattern, every response from 0 and without gaps -> LearnerReply
SyncWeights -> the null engines hear the version; SaveCheckpoint -> empty files
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
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


async def obey(plan: Plan, mine: RolePlan) -> None:
    """Commands until Stop."""
    context, account, version = zmq.asyncio.Context(), Account(), 0
    with (
        ControlClient(context, plan.batches, "rank-0", passport=Passport.of_environment("rank-0")) as commands,
        ControlClient(context, plan.control, mine.name, passport=Passport.of_environment(mine.name)) as up,
    ):
        for channel in (commands, up):
            await channel.send(m.Hello(mine.name, incarnation()))
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            while True:
                command = await commands.receive()
                stats: dict[str, float] = {}
                match command:
                    case m.Train():
                        found = sum(account.check(batch) for batch in from_message(command).micro_batches)
                        if found != command.loss_tokens:
                            raise RoleError(f"step {command.version}: {found} tokens of {command.loss_tokens}")
                        if not command.last:
                            await commands.send(m.PartDone(command.version, command.part))
                            continue
                        version, stats = command.version + 1, {"checked_tokens": float(account.tokens)}
                    case m.SyncWeights():
                        for url in command.engines:
                            async with session.post(f"{url}/update_weight_version", json={"new_version": str(version)}):
                                pass
                    case m.SaveCheckpoint():
                        await asyncio.to_thread(save_no_weights, Path(command.folder))
                    case m.Stop():
                        return
                await up.send(m.LearnerReply(type(command).__name__, version, None, stats))
