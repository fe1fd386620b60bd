"""An environment of `verifiers`, unmodified, as an episode (`rollout.function`): its model is the episode's endpoint.

    pip install verifiers uv        in an environment of its own: verifiers 0.4.0 wants openai below 3

The environment runs its own harness, tools and turns, and its rewards say what the episode has earned. The row's
metadata names the task: {"task": 0}. The harness is a process of `verifiers`, which asks its server, which asks the
endpoint: messages come back as they were, so that all turns are one sample.
"""

from __future__ import annotations

import os
from typing import Any

import verifiers.v1 as vf

TASKSET = "verifiers_sums"


def environment() -> vf.SingleAgentEnv:
    """The taskset, played by one agent with a chat loop as its harness, in a process beside."""
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    return vf.SingleAgentEnv(vf.SingleAgentEnvConfig.model_validate({"taskset": {"id": TASKSET}, "agent": agent}))


async def episode(session: Any, row: dict[str, Any]) -> float:
    """Play the row's task; what the environment's rewards add up to."""
    env = environment()
    task = list(env.taskset)[row["metadata"]["task"]]
    variable = f"OPD_KEY_{id(session)}"  # a client's key comes out of the environment
    os.environ[variable] = session.api_key
    try:
        client = vf.EvalClientConfig(base_url=session.base_url, api_key_var=variable)
        async with env.serving():
            played = await env.run_episode(task, vf.ModelContext(model="student", client=client))
    finally:
        del os.environ[variable]
    if not played.ok:
        raise RuntimeError(str(played.errors or [trace.errors for trace in played.traces])[:500])
    return sum(trace.reward for trace in played.traces)
