"""Play an example of `examples/agents` on a real rollout actor, whose engine says what is written down here.

    PYTHONPATH=$PWD:$PWD/examples/agents python tests/actors/foreign_agents.py smolagents   or langgraph, verifiers

No test of the suite: what an agent needs must be installed, and this project does not need it. Prints what came of the
episode, and exits with 1 where it was not right.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402
from talking_rollout import rollout  # noqa: E402

from opd_async.transport import messages as m  # noqa: E402


def call(name: str, **arguments: Any) -> str:
    """A call of a tool, as Hermes and Qwen write it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


DEADLINE_S = 30_000.0
"""Of a clock that is fifty times as fast as others: verifiers fetches packages when it starts."""
ANSWERS = {
    "smolagents": (call("add", a=2, b=3), call("final_answer", answer="5")),
    "langgraph": (call("add", a=2, b=3), "5"),
    "verifiers": (call("add", a=2, b=3), "5"),
}


async def play(name: str) -> bool:
    """Whether the episode came to its end with a reward of 1."""
    unmodified = importlib.import_module(f"{name}_episode").episode

    async def episode(session: Any, row: dict[str, Any]) -> Any:
        return await unmodified(session, row | {"metadata": {"task": 0}})

    patch, room = pytest.MonkeyPatch(), {"max_response_tokens": 30_000}
    with tempfile.TemporaryDirectory() as folder:
        async with rollout(episode, Path(folder), patch, *ANSWERS[name], sampling=room, deadline_s=DEADLINE_S) as (
            running,
            _,
        ):
            await running.lease()
            end = await running.end()
            await running.further_ends(0 if end.further is None else len(end.further))
            samples = [running.text(True), *(running.text(True, one) for one in sorted(running.further))]
            counts = {result: int(running.counted(result)) for result in ("begun", "extended", "refused")}
    patch.undo()
    print(f"{name}: finish {end.finish}, reward {end.reward}, requests {counts}, sampled {samples}")
    return end.finish == m.Finish.STOP and end.reward == 1.0


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in ANSWERS:
        sys.exit(f"say which: {', '.join(ANSWERS)}")
    sys.exit(0 if asyncio.run(play(sys.argv[1])) else 1)
