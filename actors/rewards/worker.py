"""One process that judges responses, so that a slow or hanging rule costs a rollout actor nothing.

    rollout actor -> socket pair -> [id, prompt ids, response ids, label, metadata, finished]
                                    -> decode -> rule -> [id, reward or None, what went wrong] -> rollout actor

Frames are MessagePack behind their length (4 bytes, big-endian); the first one, with id -1, says that the rule is
loaded. What the user's function prints goes to the actor's log. On cancel: judgements under way are dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from opd_async.actors.rewards.rules import Response, Rule, load_rule
from opd_async.config.learning import RewardSection
from opd_async.data.tokenizer import Tokenizer
from opd_async.hooks import add_working_directory
from opd_async.process import configure_logging, die_with_parent
from opd_async.role import read_plan

READY = -1
"""Id of the frame that says so."""
TIMED_OUT = "timeout"
"""What went wrong, where it was the clock."""
_LENGTH = struct.Struct(">I")


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """The next frame's value; `asyncio.IncompleteReadError` when the other side is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return msgpack.unpackb(await reader.readexactly(length))


def frame(value: Any) -> bytes:
    """A value in the form in which it travels: its length, then MessagePack."""
    body = msgpack.packb(value)
    return _LENGTH.pack(len(body)) + bytes(body)


class Judge:
    """Answers requests, `concurrency` at once; a rule that blocks holds up all of them."""

    def __init__(self, rule: Rule, tokenizer: Tokenizer, section: RewardSection) -> None:
        self._rule = rule
        self._tokenizer = tokenizer
        self._timeout_s = section.timeout_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the actor closes the line. The actor keeps to `concurrency`; every request is begun at once."""
        writer.write(frame([READY, None, ""]))
        async with asyncio.TaskGroup() as group:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    group.create_task(self._answer(await read_frame(reader), writer), name="judge")

    async def _answer(self, request: list[Any], writer: asyncio.StreamWriter) -> None:
        reward, problem = await self._judge(*request[1:])
        with contextlib.suppress(ConnectionError):
            writer.write(frame([request[0], reward, problem]))
            await writer.drain()

    async def _judge(
        self, prompt: bytes, response: bytes, label: str, metadata: str, finished: bool
    ) -> tuple[float | None, str]:
        """The reward, or None and what went wrong: `timeout`, or the error in words."""
        texts = [self._tokenizer.decode(np.frombuffer(ids, np.int32).tolist()) for ids in (prompt, response)]
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._rule(Response(texts[0], texts[1], label, json.loads(metadata), finished)), ""
        except TimeoutError:
            return None, TIMED_OUT
        except Exception as error:  # the edge of the user's code: whatever it raises is an answer
            return None, f"{type(error).__name__}: {error}"


async def main(plan_file: Path, descriptor: int) -> None:
    """Load the rule of the plan and serve on the socket `descriptor`."""
    topology = read_plan(plan_file).topology
    rule = load_rule(topology.reward.kind, topology.reward.function, topology.evaluation.answer_pattern)
    judge = Judge(rule, Tokenizer(topology.models.student.path), topology.reward)
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor))
    try:
        await judge.serve(reader, writer)
    finally:
        writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Judge responses.")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json, written by the launcher")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    arguments = parser.parse_args()
    configure_logging("reward")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    die_with_parent()
    add_working_directory()
    asyncio.run(main(arguments.plan, arguments.fd))
