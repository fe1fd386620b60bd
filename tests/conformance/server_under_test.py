"""The server under test: a tiny model, the server as a run would start it, clients of it.

One suite for two engines, so that the embedded one cannot drift from the one that users run: `make test` starts the
embedded engine, `make test-sglang` a real SGLang server (`OPD_TEST_ENGINE=sglang`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from deadlines import patience
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from opd_async.actors.client.engine_client import Endpoint, EngineClient, Sampling
from opd_async.config.topology import EngineKind, EngineSection
from opd_async.engines.command import engine_command, engine_environment
from opd_async.engines.sglang import installed_version, keys_yaml, release
from opd_async.keys import engine_environment as key_variables
from opd_async.plan.free_ports import free_ports

KIND = EngineKind(os.environ.get("OPD_TEST_ENGINE", "embedded"))
DEVICE = os.environ.get("OPD_TEST_DEVICE", "cpu")
PYTHON = Path(os.environ.get("SGLANG_PYTHON", ".venv-sglang/bin/python"))
ROOT = Path(__file__).parents[2]
API_KEY, ADMIN_KEY = "key-for-generation", "key-for-control"
VOCAB = 256
CONTEXT = 512
START_S = 240.0
VERSION = (
    tuple(int(part) for part in release(installed_version(PYTHON)).split(".")) if KIND is EngineKind.SGLANG else None
)
"""Of SGLang; None is the embedded engine, which follows the newest one."""
SETTINGS = EngineSection(
    kind=KIND,
    python=PYTHON if KIND is EngineKind.SGLANG else None,
    context_tokens=CONTEXT,
    kv_tokens=16384,
    max_running=64,
    api_key=API_KEY,
    admin_api_key=ADMIN_KEY,
)


def make_model(folder: Path, seed: int) -> Path:
    """A random two-layer model whose distributions are far from flat, and that never stops by itself."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def load_reference(folder: Path) -> PreTrainedModel:
    """The same model as transformers runs it, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, ids: NDArray[np.int32], start: int) -> NDArray[np.float32]:
    """log p(ids[i] | ids[:i]) for i >= start, float32[N - start]."""
    everything = torch.log_softmax(model(torch.tensor(ids[None].astype(np.int64))).logits[0].float(), dim=-1)
    return everything[np.arange(start - 1, len(ids) - 1), ids[start:].astype(np.int64)].numpy()


def prompt(length: int, seed: int) -> NDArray[np.int32]:
    """int32[length] random ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def sampling(max_new_tokens: int, stream_interval: int = 16) -> Sampling:
    """At temperature 1, until `max_new_tokens`."""
    return Sampling(
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(),
        stream_interval=stream_interval,
    )


@dataclass(slots=True)
class Server:
    """A running server."""

    url: str
    pid: int

    def post(self, path: str, body: dict[str, Any], *, admin: bool = True) -> Any:
        """The decoded answer of a call that must work; None where it is plain text."""
        return self._call(path, json.dumps(body).encode(), ADMIN_KEY if admin else API_KEY)

    def running(self) -> int:
        """Requests that run at this moment."""
        answer = self._call("/v1/loads", None, API_KEY)
        return sum(int(load["num_running_reqs"]) for load in answer["loads"])

    def _call(self, path: str, data: bytes | None, key: str) -> Any:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=patience(60.0)) as reply:
            kind, text = reply.headers.get_content_type(), reply.read()
        return json.loads(text) if kind == "application/json" and text else None

    @asynccontextmanager
    async def client(self, topk: int = 0) -> AsyncIterator[EngineClient]:
        """The actors' own client."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            endpoint = Endpoint(url=self.url, api_key=API_KEY, admin_api_key=ADMIN_KEY)
            yield EngineClient(session, endpoint, VOCAB, topk)


@contextmanager
def running(model: Path, log: Path, settings: EngineSection = SETTINGS, **environment: str) -> Iterator[Server]:
    """Start a server with the command of a run, wait until it answers, and end it with all its children."""
    port, spare = free_ports("127.0.0.1", 2)
    devices = (DEVICE,) * settings.tensor_parallel
    keys_file = log.with_suffix(".yaml")
    keys_file.write_text(keys_yaml(settings.api_key, settings.admin_api_key))
    command = engine_command(settings, model, devices, "127.0.0.1", {"http": port, "metrics": spare}, 0, keys_file)
    variables = engine_environment(settings, devices, spare)
    variables |= key_variables(settings.api_key, settings.admin_api_key)
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables | environment,
            start_new_session=True,
        )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, log)
        yield Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(family, timeout=patience(20))


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(url + "/model_info", headers={"Authorization": f"Bearer {API_KEY}"})
    give_up = time.monotonic() + START_S
    while True:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < give_up, f"no answer in {START_S} s:\n{log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(request, timeout=5.0):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
