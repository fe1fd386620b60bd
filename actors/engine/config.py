"""Command line of the embedded engine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from opd_async.keys import ADMIN_API_KEY_ENV, API_KEY_ENV

VERSION = "0.1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine process runs. Names follow SGLang's flags; sizes are tokens, times are seconds."""

    model_path: Path
    host: str = "127.0.0.1"
    port: int = 30000
    device: str = "cpu"
    dtype: str = "float32"
    max_total_tokens: int | None = None
    max_running_requests: int = 256
    context_length: int | None = None
    chunked_prefill_size: int = 2048
    stream_interval: int = 1
    weight_version: str = "default"
    api_key: str | None = None
    admin_api_key: str | None = None
    metrics_port: int | None = None
    counters_file: Path | None = None
    skip_tokenizer_init: bool = False
    weight_timeout: float = 300.0
    seed: int = 0
    threads: int = 1


_HELP = {
    "model_path": "Hugging Face model folder (config.json, *.safetensors, tokenizer files when there are any)",
    "dtype": "torch dtype of weights, KV and activations",
    "max_total_tokens": "size of the KV pool in tokens (default: what 512 MiB hold, at most 262144)",
    "max_running_requests": "requests that share one forward",
    "context_length": "longest prompt plus response (default: the model's max_position_embeddings)",
    "chunked_prefill_size": "prompt tokens computed per step",
    "stream_interval": "tokens per stream event; sampling_params.stream_interval overrides it",
    "weight_version": "name of the weights that model_path holds",
    "api_key": "bearer key for generation and information routes",
    "admin_api_key": "bearer key for weight, pause, abort and flush routes",
    "metrics_port": "serve /metrics on a port of its own as well",
    "counters_file": "keep the counters of /metrics there, and go on with them",
    "skip_tokenizer_init": "ids in, ids out; no text",
    "weight_timeout": "deadline for joining a weight group and for each broadcast",
    "threads": "torch threads of the model",
}
_TYPES = {
    "model_path": Path,
    "port": int,
    "metrics_port": int,
    "counters_file": Path,
    "weight_timeout": float,
    "seed": int,
    "threads": int,
}
_FROM_ENVIRONMENT = {"api_key": API_KEY_ENV, "admin_api_key": ADMIN_API_KEY_ENV}
"""Every process of the machine can read a command line."""
_COUNTS = {
    "max_total_tokens",
    "max_running_requests",
    "context_length",
    "chunked_prefill_size",
    "stream_interval",
    "threads",
}


def parse_args(argv: Sequence[str] | None = None) -> EngineConfig:
    """Read the command line. Exits with status 2 and a message when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m actors.engine.server",
        description="A small inference server with SGLang's HTTP API, for CPU runs and tests.",
    )
    for item in fields(EngineConfig):
        flag = "--" + item.name.replace("_", "-")
        text = _HELP.get(item.name, "")
        if item.name == "skip_tokenizer_init":
            parser.add_argument(flag, action="store_true", help=text)
        elif item.name == "model_path":
            parser.add_argument(flag, type=Path, required=True, help=text)
        elif item.name in _FROM_ENVIRONMENT:
            variable = _FROM_ENVIRONMENT[item.name]
            parser.add_argument(flag, default=os.environ.get(variable), help=f"{text} (default: ${variable})")
        else:
            kind = _positive if item.name in _COUNTS else _TYPES.get(item.name, str)
            parser.add_argument(flag, type=kind, default=item.default, help=text)
    return EngineConfig(**vars(parser.parse_args(argv)))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
