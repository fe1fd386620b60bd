"""One process that runs the tools of episodes, one call at a time: what hangs or dies there is killed there.

    rollout actor -> stdin  [name, arguments as JSON]
                     stdout [ready, schemas as JSON, ""], then for each call [kind, text, characters cut off]

Frames are MessagePack behind their length. What a tool prints goes to the actor's log. The limit on memory is the
kernel's on address space: it stops a tool that runs wild, and is no sandbox.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, BinaryIO, NoReturn, cast

import msgpack
from pydantic import TypeAdapter, validate_call

from opd_async.hooks import add_working_directory, load_hook
from opd_async.process import die_with_parent

KEY = "rollout.tools.functions"
LENGTH = struct.Struct(">I")
READY, ANSWERED, RAISED = "ready", "answered", "raised"
Tool = Callable[..., Any]


def frame(value: Any) -> bytes:
    """A value as it travels."""
    body = bytes(msgpack.packb(value))
    return LENGTH.pack(len(body)) + body


def opened(body: bytes) -> Any:
    """What `frame` has packed, without its length."""
    return msgpack.unpackb(body)


def schema_of(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates and agents read it: from its signature and its docstring.

    Raises what pydantic does for a signature that has no schema.
    """
    signature: TypeAdapter[Any] = TypeAdapter(cast(Any, tool))
    described = {"name": tool.__name__, "description": inspect.getdoc(tool) or ""}
    return {"type": "function", "function": described | {"parameters": signature.json_schema()}}


class Tools:
    """The tools by name, and how much each may say."""

    def __init__(self, paths: Sequence[str], longest: int) -> None:
        loaded = [load_hook(KEY, path) for path in paths]
        self.schemas = [schema_of(tool) for tool in loaded]
        self._tools: Mapping[str, Tool] = {tool.__name__: validate_call(tool) for tool in loaded}
        self._longest = longest

    def call(self, name: str, arguments: str) -> tuple[str, str, int]:
        """What a call of a tool has answered, or what it raised; characters beyond the limit are cut off, and counted.

        A text is answered as it is, anything else as JSON.
        """
        try:
            result = self._tools[name](**json.loads(arguments))
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
            kind, text = ANSWERED, result if isinstance(result, str) else json.dumps(result, default=str)
        except (Exception, SystemExit) as error:  # the edge of the user's code: whatever it raises is an answer
            kind, text = RAISED, f"{type(error).__name__}: {error}"
        whole = text[: self._longest].encode(errors="replace").decode()  # half of a surrogate pair is no text
        return kind, whole, max(len(text) - self._longest, 0)


async def _awaited(result: Any) -> Any:
    return await result


def limit_memory(mib: int) -> None:
    """Have allocations fail beyond this much address space."""
    resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))


def serve(tools: Tools, calls: BinaryIO, answers: BinaryIO) -> NoReturn:
    """Until the actor closes the line, or is gone: what is under way then is ended with all that it started.

    A thread reads, since the call under way may never return. Inside a container the kernel does not end a worker with
    its actor, which is not its parent there.
    """
    asked: SimpleQueue[tuple[str, str]] = SimpleQueue()
    threading.Thread(target=_listen, args=(calls, asked), daemon=True).start()
    answers.write(frame([READY, json.dumps(tools.schemas), 0]))
    answers.flush()
    while True:
        name, arguments = asked.get()
        answers.write(frame(tools.call(name, arguments)))
        answers.flush()


def _listen(calls: BinaryIO, asked: SimpleQueue[tuple[str, str]]) -> NoReturn:
    while len(head := calls.read(LENGTH.size)) == LENGTH.size:
        name, arguments = opened(calls.read(LENGTH.unpack(head)[0]))
        asked.put((name, arguments))
    os.killpg(0, signal.SIGKILL)
    os._exit(0)  # the first process of a container is not killed from within


def main() -> None:
    """Load the tools and serve."""
    parser = argparse.ArgumentParser(description="Run the tools of episodes.")
    parser.add_argument("--memory-mib", type=int, required=True)
    parser.add_argument("--characters", type=int, required=True)
    parser.add_argument("functions", nargs="+")
    arguments = parser.parse_args()
    die_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    add_working_directory()
    tools = Tools(arguments.functions, arguments.characters)
    limit_memory(arguments.memory_mib)
    serve(tools, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
