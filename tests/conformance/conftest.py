"""One server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from server_under_test import Server, load_reference, make_model, running
from transformers import PreTrainedModel
from weight_trainer import Trainer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A real server takes its time to start, the first test waits for it."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(400))


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


@pytest.fixture(scope="module")
def weight_group(server: Server) -> Iterator[Trainer]:
    """One weight group for a file: tests of other folders end all groups of their process."""
    torch.set_num_threads(1)
    trainer = Trainer(server)
    yield trainer
    trainer.sender.close()


@pytest.fixture
def trainer(weight_group: Trainer, first: PreTrainedModel) -> Iterator[Trainer]:
    """The trainer; afterwards the server holds `first` again."""
    yield weight_group
    if not weight_group.sender.connected:
        weight_group.connect()
    weight_group.send(first)
