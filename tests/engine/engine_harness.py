"""Tiny models, an engine server as a subprocess, and HTTP calls to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import aiohttp
import torch
from claimed_ports import claimed_port
from deadlines import patience
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from opd_async.keys import engine_environment
from opd_async.plan.free_ports import free_ports

API_KEY, ADMIN_KEY = "key-for-generation", "key-for-control"
START_SECONDS = 90.0
CONFIGS = {
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma3": Gemma3TextConfig,
}


def make_model(folder: Path, family: str = "qwen3", seed: int = 0, **overrides: Any) -> Path:
    """A random two-layer model whose distributions are far from flat."""
    config = CONFIGS[family](
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_position_embeddings": 2048,
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        | overrides
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load_reference(folder: Path) -> PreTrainedModel:
    """The same model as transformers runs it, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log softmax of the logits at every position, float32 [len(ids), vocab]."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].float() / temperature, dim=-1)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    return free_ports("127.0.0.1", 1)[0]


@dataclass(slots=True)
class Server:
    """A running engine."""

    url: str
    process: subprocess.Popen[str]

    def call(self, path: str, body: Any = None, *, key: str | None = None, timeout: float = 60.0) -> tuple[int, Any]:
        """POST `body` as JSON (GET without one); status and decoded answer. Picks the key that the route takes."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key or _key_for(path)}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout if timeout < 1.0 else patience(timeout)) as reply:
                return reply.status, _decode(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _decode(error.read())

    def generate(self, **body: Any) -> Any:
        """A /generate call that must work."""
        status, answer = self.call("/generate", body)
        assert status == 200, answer
        return answer


def _key_for(path: str) -> str:
    control = ("/pause", "/continue", "/abort", "/flush", "/init", "/destroy", "/begin", "/end", "/update", "/weights")
    return ADMIN_KEY if path.startswith(control) else API_KEY


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


def command(model: Path, port: int, *flags: str) -> list[str]:
    """The command line of an engine."""
    return [
        sys.executable,
        "-m",
        "opd_async.actors.engine.server",
        "--model-path",
        str(model),
        "--port",
        str(port),
        *flags,
    ]


@contextmanager
def running(model: Path, *flags: str) -> Iterator[Server]:
    """Start an engine, wait until it is ready, and stop it by SIGTERM; it must then exit with 0."""
    with claimed_port() as port:
        yield from _running(model, port, *flags)


def _running(model: Path, port: int, *flags: str) -> Iterator[Server]:
    """The same on this port."""
    process = subprocess.Popen(
        command(model, port, *flags),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | engine_environment(API_KEY, ADMIN_KEY),
    )
    assert process.stdout is not None
    deadline = Timer(patience(START_SECONDS), process.kill)
    deadline.start()
    try:
        line = process.stdout.readline()
        deadline.cancel()
        assert line.startswith("engine ready"), f"engine did not start: {line!r}"
        yield Server(f"http://127.0.0.1:{port}", process)
        process.terminate()
        assert process.wait(timeout=patience(30)) == 0
    finally:
        deadline.cancel()
        process.kill()
        process.wait(timeout=patience(30))
        process.stdout.close()


async def events(session: aiohttp.ClientSession, server: Server, **body: Any) -> AsyncIterator[dict[str, Any]]:
    """The events of one streamed call, without the final [DONE], which must come."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with session.post(server.url + "/generate", json=body | {"stream": True}, headers=headers) as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        buffer = b""
        async for data in reply.content.iter_any():
            buffer += data
            *complete, buffer = buffer.split(b"\n\n")
            for item in complete:
                if item == b"data: [DONE]":
                    return
                yield json.loads(item.removeprefix(b"data: "))
    raise AssertionError("the stream ended without [DONE]")


async def control(session: aiohttp.ClientSession, server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """POST to a control route from a coroutine."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    async with session.post(server.url + path, json=body, headers=headers) as reply:
        return reply.status, _decode(await reply.read())
