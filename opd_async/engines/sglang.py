"""Make the command and the environment of an SGLang server, and check that its version is known to work.

SGLang lives in a Python environment of its own (`engines.<side>.python`); nothing of it is imported here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from opd_async.config.topology import EngineSection
from opd_async.errors import InputError

SUPPORTED = ("0.5.15", "0.5.20", "0.5.23")
RESERVED_TOKENS = 8
"""SGLang refuses prompts within 6 tokens of its context length and cuts responses 2 tokens short of it; ours may fill
`context_tokens`, so the server is given this many more."""
VERSION_DEADLINE_S = 60.0
_FURTHER = re.compile(r"(\.post\d+)?(\+[\w.]+)?$")
"""What follows a release in the version of a repaired one, or of a build for some CUDA."""

_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    "--disable-cuda-graph",
    # An idle scheduler spins otherwise, which slows everything else on the machine down.
    "--sleep-on-idle",
)


def release(version: str) -> str:
    """Return the release that a version belongs to: 0.5.15.post1 and 0.5.15+cu130 are 0.5.15, with its API."""
    return _FURTHER.sub("", version)


@cache
def installed_version(python: Path) -> str:
    """Return the version of SGLang in the environment of `python`; `InputError` if it cannot be run or has no SGLang.

    Only package metadata is read: SGLang itself takes many seconds to import.
    """
    code = "from importlib.metadata import version; print(version('sglang'))"
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=VERSION_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer in {VERSION_DEADLINE_S:.0f} s"
        raise InputError(f"{python} cannot be run ({reason}); make the environment with `make sglang`") from None
    if done.returncode != 0:
        raise InputError(f"{python} has no sglang installed; make the environment with `make sglang`")
    return done.stdout.strip()


def version_problem(python: Path) -> str | None:
    """Say why the environment of `python` cannot serve a run; None if it can."""
    try:
        version = installed_version(python)
    except InputError as error:
        return str(error)
    if release(version) not in SUPPORTED:
        return f"{python} has sglang {version}; supported are {', '.join(SUPPORTED)}"
    return None


def server_command(
    section: EngineSection,
    model: Path,
    devices: Sequence[str],
    host: str,
    port: int,
    seed: int,
    keys_file: Path | None,
) -> tuple[str, ...]:
    """Make the command of one server. On `cuda:N` SGLang chooses its own kernels. `section.args` come last and win."""
    on_cpu = devices[0] == "cpu"
    options: dict[str, object] = {
        "--model-path": model,
        "--host": host,
        "--port": port,
        "--dtype": section.dtype,
        "--max-total-tokens": section.kv_tokens,
        "--max-running-requests": section.max_running,
        "--context-length": section.context_tokens + RESERVED_TOKENS,
        # Replicas must not sample the same random numbers.
        "--random-seed": seed,
        "--tp-size": len(devices),
        # Not a number, so that it is never taken for a version of the learner's.
        "--weight-version": "start",
        # The only way to hand it keys that is not its command line (`keys_yaml`).
        "--config": keys_file,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    flags = [
        "--incremental-streaming-output",
        # Requests and answers are token ids only.
        "--skip-tokenizer-init",
        "--skip-server-warmup",
        "--enable-metrics",
        *(_CPU_FLAGS if on_cpu else ()),
    ]
    return (str(section.python), "-m", "sglang.launch_server", *given, *flags, *section.args)


def keys_yaml(api_key: str | None, admin_api_key: str | None) -> str:
    """Write the content of a server's `keys_file`: a mapping of options to values in JSON, which is YAML too."""
    given = {"api-key": api_key, "admin-api-key": admin_api_key}
    return json.dumps({option: key for option, key in given.items() if key is not None})


def server_environment(section: EngineSection, devices: Sequence[str], spare_port: int) -> dict[str, str]:
    """Make the environment variables of one server; the supervisor adds its own. Raises as `installed_version`."""
    variables = {
        # `RESERVED_TOKENS` may pass what the model was trained for; no token is ever there.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        # Logits of long prompts are computed in pieces: the default only since 0.5.16.
        "SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK": "1",
        # Seconds; the default of 5 is shorter than many a pause between two requests.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "300",
    }
    if section.python is not None and release(installed_version(section.python)) == "0.5.15":
        # Not listened on there, but its default, 10000 above the server's own, must be a port. Later ones would listen.
        variables["SGLANG_GRPC_PORT"] = str(spare_port)
    if devices[0] != "cpu":
        return variables | {"CUDA_VISIBLE_DEVICES": ",".join(device.removeprefix("cuda:") for device in devices)}
    variables["SGLANG_USE_CPU_ENGINE"] = "1"
    if len(devices) > 1:
        # One core for each rank: SGLang's own choice is a NUMA node, of which there may be too few.
        cores = sorted(os.sched_getaffinity(0))
        binding = [str(cores[rank % len(cores)]) for rank in range(len(devices))]
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(binding)
    return variables
