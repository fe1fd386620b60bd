"""An engine without a model: the embedded engine's HTTP API, scheduler and prefix cache, and steps that only take time.

    HTTP (SGLang's API) -> EngineCore -> SimulatedRunner: sleep as long as the cost model says -> made-up tokens

    python -m bench.crosscheck.engine --side student|teacher [options of a scenario] [options of actors.engine.server]

A student's response ends where the scenario's lengths say, by the number in its request's id. Scores are a function of
the token alone. Loading weights takes the time of a weight update and loads nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from opd_async.actors.engine.app import Engine
from opd_async.actors.engine.batch import Batch
from opd_async.actors.engine.config import EngineConfig
from opd_async.actors.engine.core import EngineCore
from opd_async.actors.engine.groups import WeightGroups
from opd_async.actors.engine.metrics import EngineMetrics
from opd_async.actors.engine.model import StepResult
from opd_async.actors.engine.parse import ModelLimits
from opd_async.actors.engine.request import Request
from opd_async.actors.engine.scheduler import Limits
from opd_async.actors.engine.server import run
from opd_async.actors.engine.weights import ModelWeights
from opd_async.bench.crosscheck.scenario import PROMPT_TOKENS, Scenario, add_arguments
from opd_async.data.model_folder import read_model

PREFILL_TOKENS = 1 << 16
"""A step's: a scoring batch is computed in one step, as on the virtual clock."""
CATCH_UP_S = 0.05
"""A step that begins so soon after the last one was due begins then: the time of the event loop is part of a step."""
SPREAD = 7
"""Different scores of different tokens."""


class Pace:
    """Sleeps virtual seconds, so that steps that follow each other take as long in all as they should."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._due = 0.0

    def spend(self, seconds: float) -> None:
        """Return `seconds` of virtual time after the last call returned, or after now if that is longer ago."""
        now = time.monotonic()
        begin = self._due if now - self._due < CATCH_UP_S else now
        self._due = begin + seconds / self._scale
        time.sleep(max(self._due - now, 0.0))


class SimulatedRunner:
    """What the engine's loop takes for a model."""

    def __init__(self, scenario: Scenario, student: bool, stop_id: int) -> None:
        work = scenario.workload()
        self._decode, self._prefill = work.decode, work.prefill if student else work.score
        self._student = student
        self._lengths = scenario.response_tokens()
        self._pace = Pace(scenario.scale)
        self._stop_id = stop_id

    def step(self, batch: Batch) -> StepResult:
        """Take the time of one step."""
        self._pace.spend(self.seconds(batch))
        result = StepResult()
        if batch.sample is not None:
            result.tokens = [self._next(request) for request in batch.sample.requests]
            result.logprobs = [-1.0] * len(result.tokens)
        if batch.score is not None:
            cuts = np.cumsum([count for _, count in batch.score.spans])[:-1].tolist()
            scores_R = -0.5 - (batch.score.target_R % SPREAD).astype(np.float32) / SPREAD
            result.score = np.split(scores_R, cuts)
        return result

    def seconds(self, batch: Batch) -> float:
        """Virtual seconds of one step: a decode step of the running requests, and the prefills among them."""
        prefills = [work for work in batch.works if not work.request.prompt_done]
        seconds = sum(self._prefill.tokens_s(work.start, work.start + work.count) for work in prefills)
        if prefills and not self._student:
            seconds += self._prefill.floor_s
        decoding = [work for work in batch.works if work.request.prompt_done]
        if decoding:
            seconds += self._decode.seconds(1, len(decoding), sum(work.start for work in decoding))
        return seconds

    def _next(self, request: Request) -> int:
        made = len(request.tokens) - PROMPT_TOKENS
        sample_id = int(request.rid.partition("-")[0], 16)
        if made + 1 >= self._lengths[sample_id]:
            return self._stop_id
        return self._stop_id + 1 + (sample_id + made) % SPREAD


class SimulatedWeights(ModelWeights):
    """Weights that take time to load and are not there."""

    def __init__(self, groups: WeightGroups, scenario: Scenario) -> None:
        super().__init__(torch.nn.Module(), groups)
        self._seconds = scenario.workload().sync_s / scenario.scale

    def load_folder(self, path: Path) -> int:
        """Take as long as an update does."""
        time.sleep(self._seconds)
        return 0


def build(config: EngineConfig, scenario: Scenario, student: bool) -> Engine:
    """An engine as `actors.engine.server.build_engine` makes it, around a simulated model."""
    facts = read_model(config.model_path)
    pool, context = config.max_total_tokens or PREFILL_TOKENS, config.context_length or facts.max_tokens
    metrics, groups = EngineMetrics(), WeightGroups(config.weight_timeout, torch.device("cpu"))
    runner = SimulatedRunner(scenario, student, max(facts.eos_token_ids))
    limits = Limits(pool, context, config.max_running_requests, PREFILL_TOKENS)
    return Engine(
        config=config,
        core=EngineCore(runner, limits, config.weight_version, metrics),
        limits=ModelLimits(
            vocab_size=facts.vocab_size,
            context_length=context,
            pool_tokens=pool,
            eos_ids=frozenset(facts.eos_token_ids),
            stream_interval=config.stream_interval,
            encode=None,
        ),
        codec=None,
        weights=SimulatedWeights(groups, scenario),
        groups=groups,
        metrics=metrics,
        architectures=["Simulated"],
        model_type="simulated",
        model_path=config.model_path,
        started=time.time(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a simulated engine until a signal."""
    parser = argparse.ArgumentParser(prog="python -m bench.crosscheck.engine", add_help=False, allow_abbrev=False)
    parser.add_argument("--side", choices=("student", "teacher"), required=True)
    add_arguments(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    options, rest = parser.parse_known_args(given)
    scenario, student = Scenario.of(options), options.side == "student"
    run(rest, lambda config: build(config, scenario, student))


if __name__ == "__main__":
    main()
