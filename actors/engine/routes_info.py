"""Routes that only look: health, model and server information, load, metrics."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from aiohttp import web

from opd_async.actors.engine.app import ENGINE
from opd_async.actors.engine.config import VERSION

_SECRET = {"api_key", "admin_api_key"}


async def health(http: web.Request) -> web.Response:
    """200 while generating is possible, 503 when paused, as SGLang answers."""
    return web.Response(status=503 if http.app[ENGINE].core.paused else 200)


async def alive(http: web.Request) -> web.Response:
    """200 whenever the process serves, paused or not."""
    return web.Response()


async def model_info(http: web.Request) -> web.Response:
    """Which model and which weights are loaded, and whether the model moves: asked every few seconds."""
    engine = http.app[ENGINE]
    core = engine.core
    path = str(engine.model_path)
    return web.json_response(
        {
            "model_path": path,
            "served_model_name": str(engine.config.model_path),
            "tokenizer_path": str(engine.config.model_path),
            "is_generation": True,
            "weight_version": engine.core.weight_version,
            "load_format": "auto",
            "model_type": engine.model_type,
            "architectures": engine.architectures,
            "vocab_size": engine.limits.vocab_size,
            "paused": core.paused is not None,
            "step_s": 0.0 if core.step_began is None else time.perf_counter() - core.step_began,
            "longest_step_s": max(core.step_seconds, default=0.0),
        }
    )


async def server_info(http: web.Request) -> web.Response:
    """How the server was started and how large it is. Keys are not shown."""
    engine = http.app[ENGINE]
    config: dict[str, Any] = {}
    for item in fields(engine.config):
        value = getattr(engine.config, item.name)
        config[item.name] = str(value) if isinstance(value, Path) else value
    shown = {key: value for key, value in config.items() if key not in _SECRET}
    return web.json_response(
        shown
        | {
            "kind": "embedded",
            "version": VERSION,
            "frontend": "python",
            "weight_version": engine.core.weight_version,
            "max_total_num_tokens": engine.limits.pool_tokens,
            "max_req_input_len": engine.limits.context_length - 1,
            "context_length": engine.limits.context_length,
            "vocab_size": engine.limits.vocab_size,
            "incremental_streaming_output": True,
            "skip_tokenizer_init": engine.codec is None,
            "startup_time": engine.started,
            "internal_states": [{"paused": engine.core.paused, "busy_seconds": engine.core.busy_seconds}],
        }
    )


async def loads(http: web.Request) -> web.Response:
    """How busy the engine is now."""
    engine = http.app[ENGINE]
    scheduler = engine.core.scheduler
    used, total = scheduler.used_tokens, engine.limits.pool_tokens
    load = {
        "dp_rank": 0,
        "num_running_reqs": len(scheduler.running),
        "num_waiting_reqs": len(scheduler.waiting),
        "num_total_reqs": len(scheduler.running) + len(scheduler.waiting),
        "num_used_tokens": used,
        "max_total_num_tokens": total,
        "max_running_requests": engine.config.max_running_requests,
        "token_usage": used / total,
        "num_cached_tokens": scheduler.cache.evictable_tokens,
        "num_retractions": scheduler.retractions,
        "generated_tokens": engine.core.generated_tokens,
    }
    return web.json_response({"timestamp": time.time(), "dp_rank_count": 1, "loads": [load]})


async def metrics(http: web.Request) -> web.Response:
    """Prometheus exposition."""
    body = http.app[ENGINE].metrics.render()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


INFO_HANDLERS = {
    "/health": health,
    "/health_generate": health,
    "/ready": alive,
    "/ping": alive,
    "/model_info": model_info,
    "/get_model_info": model_info,
    "/server_info": server_info,
    "/get_server_info": server_info,
    "/v1/loads": loads,
    "/metrics": metrics,
}
