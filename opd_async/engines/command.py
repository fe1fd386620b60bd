"""Make the command and the environment of one engine replica, whatever its kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from opd_async.config.topology import EngineKind, EngineSection
from opd_async.engines.sglang import server_command, server_environment


def engine_command(
    section: EngineSection,
    model: Path,
    devices: Sequence[str],
    host: str,
    ports: dict[str, int],
    seed: int,
    keys_file: Path | None = None,
    counters_file: Path | None = None,
) -> tuple[str, ...]:
    """Make the command of one replica on its `devices`; `ports` has `http`, and `metrics` for the embedded engine.

    The command holds no keys, because every process of the machine can read it. The embedded engine reads its keys from
    the environment, SGLang from `keys_file`. The embedded engine keeps the counters of its metrics in `counters_file`.

    Replicas need different seeds: they must not sample the same random numbers.
    """
    if section.kind is EngineKind.SGLANG:
        return server_command(section, model, devices, host, ports["http"], seed, keys_file)
    options: dict[str, object] = {
        "--model-path": model,
        "--host": host,
        "--port": ports["http"],
        "--device": devices[0],
        "--dtype": section.dtype,
        "--max-total-tokens": section.kv_tokens,
        "--max-running-requests": section.max_running,
        "--context-length": section.context_tokens,
        "--threads": section.threads,
        "--seed": seed,
        "--metrics-port": ports["metrics"],
        "--counters-file": counters_file,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    # Requests and answers are token ids only, as on SGLang.
    return (sys.executable, "-m", "opd_async.actors.engine.server", *given, "--skip-tokenizer-init")


def engine_environment(section: EngineSection, devices: Sequence[str], spare_port: int) -> dict[str, str]:
    """Make the environment variables of one replica; the supervisor adds its own. Raises as `installed_version`."""
    return server_environment(section, devices, spare_port) if section.kind is EngineKind.SGLANG else {}
