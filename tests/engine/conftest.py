"""Models and servers that the engine's test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_harness import Server, load_reference, make_model, running
from transformers import PreTrainedModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3."""
    return make_model(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> PreTrainedModel:
    """The same model in transformers."""
    return load_reference(model_folder)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    """One engine per test module."""
    with running(model_folder, "--max-total-tokens", "20000", "--chunked-prefill-size", "64") as started:
        yield started
