"""Engines that lie: a proxy in front of an engine, and what it has told."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from claimed_ports import claimed_port
from harness import ROOT


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A helper process, ended with the block."""
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        try:
            yield running
        finally:
            running.terminate()


@contextmanager
def liar(url: str, every: int, lies: list[str], first: int = 0) -> Iterator[str]:
    """A proxy to the engine at `url` that spoils every so many answers, and notes how in `lies`; yields its URL.
    It begins with kind number `first`."""
    script = str(Path(__file__).with_name("lying_proxy.py"))
    with claimed_port() as port, process(script, str(port), url, str(every), str(first)) as running:
        assert running.stdout is not None
        reader = threading.Thread(
            target=lambda: lies.extend(line.strip() for line in running.stdout or ()), daemon=True
        )
        reader.start()
        yield f"http://127.0.0.1:{port}"


@contextmanager
def embedded_engine(model: Path, port: int | None = None) -> Iterator[str]:
    """An embedded engine, on a free port unless one is given; yields its URL. Killed with the block."""
    with claimed_port() if port is None else nullcontext(port) as own:
        arguments = ("--model-path", str(model), "--host", "127.0.0.1", "--port", str(own), "--context-length", "256")
        with process("-m", "opd_async.actors.engine.server", *arguments, "--max-total-tokens", "8192"):
            yield f"http://127.0.0.1:{own}"
