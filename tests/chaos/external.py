"""An engine that a run did not start: somebody else does, and starts it again when it has died."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
from claimed_ports import claimed_port
from harness import ROOT

from opd_async.keys import ADMIN_API_KEY_ENV, API_KEY_ENV


class External:
    """An embedded engine with the model in a folder; a context manager that kills it at the end."""

    def __init__(self, model: Path, key: str) -> None:
        self._claims = ExitStack()
        self._port = self._claims.enter_context(claimed_port())
        self._model = model
        self._keys = {API_KEY_ENV: key, ADMIN_API_KEY_ENV: key}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address, which stays."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> External:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._claims:
            self._end()

    def process(self) -> psutil.Process:
        """The process that serves now."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def restart(self, after_s: float) -> None:
        """Kill it, and start it again `after_s` seconds later."""
        self._end()
        time.sleep(after_s)
        self._start()

    def _start(self) -> None:
        words = ("--model-path", str(self._model), "--host", "127.0.0.1", "--port", str(self._port))
        limits = ("--context-length", "256", "--max-total-tokens", "8192")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opd_async.actors.engine.server", *words, *limits],
            cwd=ROOT,
            env={**os.environ, **self._keys, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
