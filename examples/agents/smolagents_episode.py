"""A smolagents agent, unmodified, as an episode (`rollout.function`): it gets the endpoint's address and key.

    pip install "smolagents[openai]"

smolagents writes its history anew on each step: the calls of the student come back as text in a message of its own
form. So each step is another conversation, a further sample of the episode, which was given what came before.
"""

from __future__ import annotations

import asyncio
from typing import Any

from smolagents import OpenAIServerModel, ToolCallingAgent, tool

STEPS = 4


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


async def episode(session: Any, row: dict[str, Any]) -> float:
    """Let the agent answer the row's prompt; 1 where it says the label, else 0."""
    model = OpenAIServerModel("student", api_base=session.base_url, api_key=session.api_key)
    agent = ToolCallingAgent(tools=[add], model=model, max_steps=STEPS, verbosity_level=0)
    answer = await asyncio.to_thread(agent.run, row["prompt"])  # it blocks
    return float(str(answer).strip() == row["label"])
