"""A LangGraph agent, unmodified, as an episode (`rollout.function`): it gets the endpoint's address and key.

    pip install langchain langchain-openai

LangGraph keeps its messages as they came, so that every step goes on with the same conversation: one sample.
"""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

STEPS = 4


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def episode(session: Any, row: dict[str, Any]) -> float:
    """Let the agent answer the row's prompt; 1 where it says the label, else 0."""
    model = ChatOpenAI(model="student", base_url=session.base_url, api_key=session.api_key, max_retries=0)
    agent = create_agent(model, [add])
    asked = {"messages": [{"role": "user", "content": row["prompt"]}]}
    state = await agent.ainvoke(asked, {"recursion_limit": 2 * STEPS + 1})
    return float(str(state["messages"][-1].content).strip() == row["label"])
