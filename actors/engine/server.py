"""The embedded engine: a small inference server with SGLang's HTTP API.

    python -m actors.engine.server --model-path DIR --port 30000

    HTTP (aiohttp, event loop) -> EngineCore (scheduler, event loop) -> ModelRunner (torch, one thread)

    loop      waits for                     unblocked by
    HTTP      a connection                  a client
    core      a request, or continue        submit, resume
    main      SIGTERM or SIGINT             the operator; the core failing ends it too

Shutdown order: stop listening, cancel open calls, stop the core, exit 0. Nothing that blocks on a peer is waited for.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import NoReturn

import torch
import uvloop
from aiohttp import web

from opd_async.actors.engine.app import ENGINE, MAX_BODY_BYTES, Engine, check_keys, errors_to_json
from opd_async.actors.engine.auth import Keys
from opd_async.actors.engine.config import EngineConfig, parse_args
from opd_async.actors.engine.core import EngineCore
from opd_async.actors.engine.groups import WeightGroups
from opd_async.actors.engine.metrics import EngineMetrics
from opd_async.actors.engine.model import ModelRunner
from opd_async.actors.engine.parse import ModelLimits
from opd_async.actors.engine.routes_control import CONTROL_HANDLERS
from opd_async.actors.engine.routes_generate import generate
from opd_async.actors.engine.routes_info import INFO_HANDLERS, metrics
from opd_async.actors.engine.scheduler import Limits
from opd_async.actors.engine.text import load_codec
from opd_async.actors.engine.weights import ModelWeights
from opd_async.errors import RoleError
from opd_async.freed_memory import give_back_regularly
from opd_async.process import configure_logging, die_with_parent, report_failure, stop_event

# How long the interpreter lets one thread run while the other wants to: short, since steps are a few milliseconds.
SWITCH_SECONDS = 0.0005


def build_engine(config: EngineConfig) -> Engine:
    """Load the model and wire the parts. Call inside a running event loop. Raises RoleError for an unusable model."""
    started = time.time()
    if not (config.model_path / "config.json").is_file():
        raise RoleError(
            f"--model-path {config.model_path}: no config.json there; it must be a Hugging Face model folder"
        )
    runner = ModelRunner(
        config.model_path,
        dtype=config.dtype,
        device=config.device,
        pool_tokens=config.max_total_tokens,
        seed=config.seed,
    )
    codec = None if config.skip_tokenizer_init else load_codec(config.model_path)
    context = config.context_length or int(runner.config.max_position_embeddings)
    engine_metrics = EngineMetrics(config.counters_file)
    # The slot table has a column per context token, so the context bounds every sequence.
    limits = Limits(runner.pool_tokens, context, config.max_running_requests, config.chunked_prefill_size)
    stop_check = codec.matched_stop if codec else None
    groups = WeightGroups(config.weight_timeout, runner.device)
    return Engine(
        config=config,
        core=EngineCore(runner, limits, config.weight_version, engine_metrics, stop_check),
        limits=ModelLimits(
            vocab_size=runner.vocab_size,
            context_length=context,
            pool_tokens=runner.pool_tokens,
            eos_ids=runner.eos_ids,
            stream_interval=config.stream_interval,
            encode=codec.encode if codec else None,
        ),
        codec=codec,
        weights=ModelWeights(runner.model, groups),
        groups=groups,
        metrics=engine_metrics,
        architectures=list(runner.config.architectures or []),
        model_type=str(runner.config.model_type),
        model_path=config.model_path,
        started=started,
    )


def build_app(engine: Engine) -> web.Application:
    """All routes of the main port."""
    keys = Keys(engine.config.api_key, engine.config.admin_api_key)
    app = web.Application(middlewares=[check_keys(keys), errors_to_json], client_max_size=MAX_BODY_BYTES)
    app[ENGINE] = engine
    app.router.add_post("/generate", generate)
    for path, handler in CONTROL_HANDLERS.items():
        app.router.add_post(path, handler)
    app.router.add_get("/flush_cache", CONTROL_HANDLERS["/flush_cache"])
    for path, handler in INFO_HANDLERS.items():
        app.router.add_get(path, handler)
    return app


async def serve(config: EngineConfig, build: Callable[[EngineConfig], Engine]) -> None:
    """Run until SIGTERM or SIGINT, or until the core fails."""
    engine = build(config)
    stop = stop_event(asyncio.get_running_loop())
    # If the core fails, the group cancels the wait below and the process ends with the core's error.
    async with asyncio.TaskGroup() as tasks:
        core = tasks.create_task(engine.core.run(), name="engine core")
        async with AsyncExitStack() as stack:
            await _listen(stack, build_app(engine), config.host, config.port)
            if config.metrics_port is not None:
                side = web.Application()
                side[ENGINE] = engine
                side.router.add_get("/metrics", metrics)
                await _listen(stack, side, config.host, config.metrics_port)
            _announce(engine)
            await stop.wait()
        core.cancel()


async def _listen(stack: AsyncExitStack, app: web.Application, host: str, port: int) -> None:
    # handler_cancellation: a client that leaves cancels its call, which aborts its requests.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise RoleError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error


def _announce(engine: Engine) -> None:
    config, limits = engine.config, engine.limits
    sys.stdout.write(
        f"engine ready: http://{config.host}:{config.port} model {config.model_path} ({engine.model_type}, "
        f"{config.dtype}, {config.device}), {limits.pool_tokens} KV tokens, pid {os.getpid()}\n"
    )
    sys.stdout.flush()


def run(argv: Sequence[str] | None, build: Callable[[EngineConfig], Engine]) -> NoReturn:
    """Run what `build` makes; exits with 0 after a signal, else with a code and a message that say what went wrong.

    The process is tied to its parent's life unless OPD_DETACHED=1.
    """
    config = parse_args(argv)
    configure_logging("engine")
    torch.set_num_threads(config.threads)
    sys.setswitchinterval(SWITCH_SECONDS)
    code = 0
    try:
        if os.environ.get("OPD_DETACHED") != "1":
            die_with_parent()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            give_back_regularly(runner.get_loop())
            runner.run(serve(config, build))
    except (Exception, KeyboardInterrupt) as error:  # the edge of the process: every error becomes an exit code
        code = report_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread inside a broadcast or a rendezvous would crash in torch's global destructors.
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run an engine with a model."""
    run(argv, build_engine)


if __name__ == "__main__":
    main()
