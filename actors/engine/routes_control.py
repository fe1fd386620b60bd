"""Control routes: pause, abort, flush, and everything about weights.

    pause -> begin -> update (bucket, bucket, ...) -> end -> continue

Weight operations run one at a time and hold the engine between steps; without a pause they first wait until the
running requests are done.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from opd_async.actors.engine.app import ENGINE, Engine, read_object, required, success
from opd_async.actors.engine.core import PauseMode
from opd_async.actors.engine.errors import ApiError, WeightError
from opd_async.actors.engine.groups import GroupSpec
from opd_async.actors.engine.threads import in_thread

_NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running. "
    "Pause with mode retract, or send flush_cache: false."
)


async def pause_generation(http: web.Request) -> web.Response:
    """Stop generating after the running step; the answer tells how many tokens each live stream has been given."""
    body = await read_object(http)
    try:
        mode = PauseMode(body.get("mode") or PauseMode.ABORT)
    except ValueError as error:
        raise ApiError(f"mode must be one of {[str(m) for m in PauseMode]}, got {body.get('mode')!r}") from error
    emitted = await http.app[ENGINE].core.pause(mode)
    return web.json_response({"status": "ok", "emitted": emitted})


async def continue_generation(http: web.Request) -> web.Response:
    """Undo a pause."""
    await read_object(http)
    http.app[ENGINE].core.resume()
    return web.json_response({"status": "ok"})


async def abort_request(http: web.Request) -> web.Response:
    """Abort by rid prefix, or everything; fire and forget."""
    body = await read_object(http)
    rid = body.get("rid") or ""
    if not isinstance(rid, str):
        raise ApiError(f"rid must be a string, got {rid!r}")
    http.app[ENGINE].core.abort(rid, everything=bool(body.get("abort_all")))
    return web.Response()


async def flush_cache(http: web.Request) -> web.Response:
    """Empty the prefix cache; refused while requests hold KV."""
    core = http.app[ENGINE].core
    # Between steps: slots that a running step writes must not be handed out again.
    async with core.between_steps():
        flushed = core.scheduler.flush()
    if flushed:
        return web.Response(text="Cache flushed.\n")
    return web.Response(text="Flush cache failed.\n", status=400)


async def init_group(http: web.Request) -> web.Response:
    """Join a weight-update group; answers when all ranks have joined."""
    engine, body = http.app[ENGINE], await read_object(http)
    spec = GroupSpec(
        master_address=required(body, "master_address", str),
        master_port=required(body, "master_port", int),
        rank=required(body, "rank_offset", int),
        world_size=required(body, "world_size", int),
        group_name=body.get("group_name") or "weight_update_group",
        backend=body.get("backend") or "nccl",
    )
    # Not on the model thread: generation goes on while the other ranks are awaited.
    await in_thread("join", partial(engine.groups.join, spec))
    return success("Succeeded to initialize custom process group.")


async def destroy_group(http: web.Request) -> web.Response:
    """Leave a weight-update group."""
    engine, body = http.app[ENGINE], await read_object(http)
    async with engine.weight_lock:
        await in_thread("leave", partial(engine.groups.leave, body.get("group_name") or "weight_update_group"))
    return success("Succeeded to destroy custom process group.")


async def begin_update(http: web.Request) -> web.Response:
    """Open an update session."""
    engine = http.app[ENGINE]
    await read_object(http)
    async with _exclusive(engine):
        if engine.updating:
            raise WeightError("begin_weight_update() was called twice without end_weight_update()")
        engine.updating = True
    return success("Weight update session started.")


async def end_update(http: web.Request) -> web.Response:
    """Close an update session."""
    engine = http.app[ENGINE]
    await read_object(http)
    async with _exclusive(engine):
        if not engine.updating:
            raise WeightError("end_weight_update() was called without begin_weight_update()")
        engine.updating = False
    return success("Weight update session ended.")


async def update_from_distributed(http: web.Request) -> web.Response:
    """Receive announced tensors from rank 0 of a group and load them. Nothing is received when refused."""
    engine, body = http.app[ENGINE], await read_object(http)
    group = body.get("group_name") or "weight_update_group"
    load_format = body.get("load_format")
    if load_format not in (None, "flattened_bucket"):
        raise WeightError(f"load_format must be null or flattened_bucket, got {load_format!r}")
    names, dtypes, shapes = (required(body, key, list) for key in ("names", "dtypes", "shapes"))
    if not isinstance(version := body.get("weight_version"), str | None):
        raise ApiError(f"weight_version must be a string, got {version!r}")
    _abort_if_asked(engine, body, default=False)
    async with _exclusive(engine):
        if not engine.updating:
            raise WeightError(
                "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
            )
        # All checks come before the first receive, so a refused trainer still knows what the engine expects.
        engine.groups.require(group)
        specs = engine.weights.describe(names, dtypes, shapes)
        flattened = load_format is not None
        if flattened and not specs:  # nobody would send it, and it would be waited for
            raise WeightError("a flattened bucket without tensors was announced")
        await _timed_load(engine, lambda: engine.weights.load_broadcast(group, specs, flattened))
        _after_update(engine, body)
    return success("Succeeded to update parameter online.")


async def update_from_disk(http: web.Request) -> web.Response:
    """Load a folder of safetensors; a folder that does not fit changes nothing."""
    engine, body = http.app[ENGINE], await read_object(http)
    path = Path(required(body, "model_path", str))
    _abort_if_asked(engine, body, default=False)
    async with _exclusive(engine):
        paused = len(engine.core.scheduler.running) + len(engine.core.scheduler.waiting)
        await _timed_load(engine, lambda: engine.weights.load_folder(path))
        # SGLang reports the folder that was loaded last.
        engine.model_path = path
        _after_update(engine, body)
    return success("Succeeded to update model weights.", num_paused_requests=paused)


async def update_weight_version(http: web.Request) -> web.Response:
    """Rename the loaded weights. Aborts everything unless told not to, as SGLang does."""
    engine, body = http.app[ENGINE], await read_object(http)
    version = required(body, "new_version", str)
    _abort_if_asked(engine, body, default=True)
    async with engine.core.between_steps():
        engine.core.set_weight_version(version)
    return success(f"Weight version updated to {version}", new_version=version)


async def weights_checker(http: web.Request) -> web.Response:
    """Checksums of the loaded weights by Hugging Face name."""
    engine, body = http.app[ENGINE], await read_object(http)
    if body.get("action") != "checksum":
        raise WeightError(f"action must be checksum, got {body.get('action')!r}")
    async with engine.core.between_steps():
        sums = await engine.core.on_model_thread(engine.weights.checksums)
    return success("Success.", ranks=[{"checksums": sums}])


@asynccontextmanager
async def _exclusive(engine: Engine) -> AsyncIterator[None]:
    async with engine.weight_lock, engine.core.quiet(engine.config.weight_timeout):
        yield


async def _timed_load(engine: Engine, load: Any) -> None:
    # Tokens sampled under the old weights leave before the new ones are in.
    engine.core.flush_streams()
    started = time.perf_counter()
    await engine.core.on_model_thread(load)
    engine.metrics.weight_load.observe(time.perf_counter() - started)


def _after_update(engine: Engine, body: dict[str, Any]) -> None:
    """Name the new weights and flush. A refused flush is an error although the weights are in, as in SGLang."""
    # Named first: even when the flush is refused, tokens sampled from now on come from the new weights.
    version = body.get("weight_version")
    if isinstance(version, str):
        engine.core.set_weight_version(version)
    if body.get("flush_cache", True) and not engine.core.scheduler.flush():
        raise WeightError(_NOT_FLUSHED)


def _abort_if_asked(engine: Engine, body: dict[str, Any], default: bool) -> None:
    if body.get("abort_all_requests", default):
        engine.core.abort("", everything=True)


CONTROL_HANDLERS = {
    "/pause_generation": pause_generation,
    "/continue_generation": continue_generation,
    "/abort_request": abort_request,
    "/flush_cache": flush_cache,
    "/init_weights_update_group": init_group,
    "/destroy_weights_update_group": destroy_group,
    "/begin_weight_update": begin_update,
    "/end_weight_update": end_update,
    "/update_weights_from_distributed": update_from_distributed,
    "/update_weights_from_disk": update_from_disk,
    "/update_weight_version": update_weight_version,
    "/weights_checker": weights_checker,
}
