"""One real server for all tests of this folder, which `make test-sglang` runs and `make test` does not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sglang_harness import ADMIN_KEY, API_KEY, Server, load_reference, make_model, running
from transformers import PreTrainedModel

from learner.engine_http import EngineAddress
from learner.weights import SendReport, WeightSender

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # the whole-run harness


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape: `first` is served at the start, `second` comes as an update."""
    path = tmp_path_factory.mktemp("models")
    make_model(path / "first", seed=1)
    make_model(path / "second", seed=2)
    return path


@pytest.fixture(scope="session")
def first(folder: Path) -> PreTrainedModel:
    """What the server holds at the start of each test."""
    return load_reference(folder / "first")


@pytest.fixture(scope="session")
def second(folder: Path) -> PreTrainedModel:
    """Other weights."""
    return load_reference(folder / "second")


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    """The server."""
    with running(folder / "first", folder / "server.log") as started:
        yield started


class Trainer:
    """Sends models to the server as the learner does."""

    def __init__(self, server: Server) -> None:
        self.engine = EngineAddress(server.url, 1, ADMIN_KEY, API_KEY)
        self._versions = itertools.count(1)
        # small buckets, so that an update takes several broadcasts
        options = {"backend": "gloo", "bind_host": "127.0.0.1", "bucket_bytes": 40_000, "timeout_s": 60.0}
        self.sender = WeightSender([self.engine], **options)
        self.sender.connect("tests")

    def send(self, model: PreTrainedModel) -> SendReport:
        """One update; the version is new each time."""
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
        return self.sender.send(tensors.items(), next(self._versions))


@pytest.fixture(scope="session")
def weight_group(server: Server) -> Iterator[Trainer]:
    """One weight group for the session."""
    torch.set_num_threads(1)
    trainer = Trainer(server)
    yield trainer
    trainer.sender.close()


@pytest.fixture
def trainer(weight_group: Trainer, first: PreTrainedModel) -> Iterator[Trainer]:
    """The trainer; afterwards the server holds `first` again."""
    yield weight_group
    weight_group.send(first)
