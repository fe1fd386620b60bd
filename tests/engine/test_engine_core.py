"""The engine's loop in this process: memory pressure, pauses, model families, half precision, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deadlines import patience
from engine_harness import load_reference, make_model, reference_logprobs

from opd_async.actors.engine import model as engine_model
from opd_async.actors.engine.core import EngineCore, PauseMode
from opd_async.actors.engine.errors import ApiError
from opd_async.actors.engine.metrics import EngineMetrics
from opd_async.actors.engine.model import ModelRunner
from opd_async.actors.engine.request import LogprobSpec, Request
from opd_async.actors.engine.sampling import SamplingParams
from opd_async.actors.engine.scheduler import Limits
from opd_async.errors import InputError


def make_runner(folder: Path, pool: int, dtype: str = "float32") -> ModelRunner:
    return ModelRunner(folder, dtype=dtype, device="cpu", pool_tokens=pool, seed=0)


def host(runner: ModelRunner, use: Callable[[EngineCore], Awaitable[None]], **limits: int) -> EngineCore:
    """Run `use` beside the engine's loop."""

    async def main() -> EngineCore:
        core = EngineCore(runner, Limits(**({"context_length": 256} | limits)), "v0", EngineMetrics())
        async with asyncio.timeout(patience(60)), asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(core.run())
            await use(core)
            loop.cancel()
        return core

    return asyncio.run(main())


def make_request(rid: str, ids: list[int], new: int, start: int = -1, **more: Any) -> Request:
    params = SamplingParams(max_new_tokens=new, greedy=True)
    return Request(rid=rid, input_ids=ids, params=params, logprob=LogprobSpec(enabled=True, start=start), **more)


async def finished(requests: list[Request]) -> None:
    """Return when all of them have finished."""
    done = asyncio.Event()

    def look() -> None:
        if all(request.finished for request in requests):
            done.set()

    for request in requests:
        request.on_update = look
    look()
    await done.wait()


def check_greedy(reference: Any, request: Request) -> None:
    ids = request.input_ids + request.output_ids
    logprobs = reference_logprobs(reference, ids)
    rows = logprobs[len(request.input_ids) - 1 : -1]
    np.testing.assert_allclose(request.output_logprobs, rows.max(dim=1)[0], atol=1e-4)
    if request.logprob.start >= 0:
        found = np.concatenate(request.input_logprobs)
        targets = request.input_ids[request.logprob.start + 1 :]
        want = logprobs[range(request.logprob.start, len(request.input_ids) - 1), targets]
        np.testing.assert_allclose(found, want, atol=1e-4)


def test_memory_pressure_retracts_and_changes_no_result(model_folder: Path, reference: Any) -> None:
    rng = np.random.default_rng(0)
    requests = [
        make_request(str(i), rng.integers(0, 96, 5 + i).tolist(), 60, start=i % 4 if i % 2 else -1) for i in range(10)
    ]

    async def use(core: EngineCore) -> None:
        for request in requests:
            core.submit(request)
        await finished(requests)
        async with core.between_steps():
            assert core.scheduler.flush()
            assert core.scheduler.pool.free_count == 150

    core = host(make_runner(model_folder, 150), use, pool_tokens=150, prefill_budget=16)
    assert core.scheduler.retractions > 0
    assert sum(request.num_retractions for request in requests) == core.scheduler.retractions
    for request in requests:
        assert len(request.output_ids) == 60
        check_greedy(reference, request)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 8, "rope_parameters": YARN}),
        ("gemma3", {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20}),
    ],
)
def test_other_families(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    folder = make_model(tmp_path / "model", family, **overrides)
    rng = np.random.default_rng(1)
    requests = [make_request(str(i), rng.integers(0, 96, 3 + 5 * i).tolist(), 12, start=0) for i in range(5)]

    async def use(core: EngineCore) -> None:
        for request in requests:
            core.submit(request)
        await finished(requests)

    host(make_runner(folder, 400), use, pool_tokens=400, prefill_budget=20)
    reference = load_reference(folder)
    for request in requests:
        check_greedy(reference, request)


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(
    model_folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of 7 rows at a time, across the borders of requests."""
    monkeypatch.setattr(engine_model, "LOGITS_ELEMENTS_CPU", 7 * 96)
    rng = np.random.default_rng(2)
    requests = [make_request(str(i), rng.integers(0, 96, 5 + 9 * i).tolist(), 2, start=0) for i in range(4)]

    async def use(core: EngineCore) -> None:
        for request in requests:
            core.submit(request)
        await finished(requests)

    host(make_runner(model_folder, 400), use, pool_tokens=400, prefill_budget=200)
    for request in requests:
        check_greedy(reference, request)


def test_bfloat16_runs_and_reports_float32_logprobs(model_folder: Path, reference: Any) -> None:
    request = make_request("a", [1, 2, 3, 4], 6, start=0)

    async def use(core: EngineCore) -> None:
        core.submit(request)
        await finished([request])

    host(make_runner(model_folder, 64, "bfloat16"), use, pool_tokens=64)
    want = reference_logprobs(reference, request.input_ids)[range(3), request.input_ids[1:]]
    np.testing.assert_allclose(np.concatenate(request.input_logprobs), want, atol=0.3)
    assert request.input_logprobs[0].dtype == np.float32


def test_a_retract_pause_frees_everything_and_the_requests_go_on(model_folder: Path, reference: Any) -> None:
    requests = [make_request(str(i), [i + 1, 2, 3], 80, stream=True, stream_interval=1000) for i in range(3)]

    async def use(core: EngineCore) -> None:
        for request in requests:
            core.submit(request)
        first = asyncio.Event()
        requests[-1].on_update = first.set
        await first.wait()
        requests[-1].on_update = None
        for request in requests:
            request.sent = 10**6  # nobody reads these streams
        emitted = await core.pause(PauseMode.RETRACT)
        assert emitted == {request.rid: len(request.output_ids) for request in requests}
        assert not core.scheduler.running
        assert core.scheduler.flush()
        core.set_weight_version("v1")
        core.resume()
        await finished(requests)

    host(make_runner(model_folder, 400), use, pool_tokens=400)
    for request in requests:
        assert request.num_retractions == 1
        assert [span.version for span in request.versions] == ["v0", "v1"]
        check_greedy(reference, request)


def test_quiet_gives_up_at_its_deadline_and_lets_later_requests_in(model_folder: Path) -> None:
    running, late = make_request("running", [1], 200), make_request("late", [2], 2)

    async def use(core: EngineCore) -> None:
        core.submit(running)
        with pytest.raises(ApiError, match="1 requests still ran"):
            async with core.quiet(0.02):
                raise AssertionError("the request cannot be done yet")
        core.submit(late)
        await finished([late])
        core.forget(running)
        await finished([running])

    host(make_runner(model_folder, 400), use, pool_tokens=400)
    assert running.finish_reason is not None


async def test_a_model_failure_ends_the_loop(model_folder: Path) -> None:
    class Broken:
        def step(self, batch: object) -> Any:
            raise RuntimeError("out of luck")

    core = EngineCore(Broken(), Limits(64, 64), "v0", EngineMetrics())
    core.submit(make_request("a", [1], 2))
    with pytest.raises(RuntimeError, match="out of luck"):
        await core.run()


def test_threads_of_torch_are_those_asked_for() -> None:
    assert torch.get_num_threads() == 1


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", list(ROPES))
def test_scores_do_not_depend_on_how_a_sequence_is_cut(kind: str, tmp_path: Path) -> None:
    """Three parts of a sequence longer than the original context, beside the whole; or the model is refused."""
    options = {"rope_type": kind, "rope_theta": 1e4} | ROPES[kind]
    folder = make_model(tmp_path / kind, max_position_embeddings=64, rope_parameters=options)
    if kind in ("dynamic", "longrope"):
        with pytest.raises(InputError, match=f"rope_type {kind}, whose angles depend on the length of a call"):
            make_runner(folder, 1024)
        return
    ids = np.random.default_rng(0).integers(0, 96, 200).tolist()
    reference = load_reference(folder)
    for budget in (70, 512):
        request = make_request("r", ids, 4, start=0)

        async def use(core: EngineCore, request: Request = request) -> None:
            core.submit(request)
            await finished([request])

        host(make_runner(folder, 1024), use, pool_tokens=1024, prefill_budget=budget)
        check_greedy(reference, request)
