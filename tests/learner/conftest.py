"""A learner of one rank in the pytest process, and tiny Hugging Face models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deadlines import patience
from tiny_learner import write_model

from opd_async.learner.config import ParallelConfig
from opd_async.learner.distributed import parallel

# megatron-core 0.16.1 with torch 2.13: deprecated names inside the library, nothing that our code could do otherwise.
THIRD_PARTY = (
    "ignore::DeprecationWarning:megatron\\..*",
    "ignore:`torch.distributed.*is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for rule in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture(scope="session")
def alone() -> Iterator[parallel.Place]:
    """Process groups of one rank."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        place = parallel.start(ParallelConfig(timeout_s=patience(60)), seed=0)
    yield place
    parallel.stop()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with tied embeddings and a vocabulary of 33."""
    return write_model(tmp_path_factory.mktemp("qwen3"), "qwen3-tied")
