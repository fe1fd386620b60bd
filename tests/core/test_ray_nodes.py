"""What `backend: ray` asks of Ray, and what it says where there is none."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.checks.cluster import cluster_problems
from opd_async.cluster.ray_nodes import RayAgents, bundles
from opd_async.cluster.secret import SECRET_ENV
from opd_async.config.clustering import Backend, ClusterSection
from opd_async.errors import InputError


def section(**changes: Any) -> ClusterSection:
    """A cluster of three nodes."""
    return ClusterSection(backend=Backend.RAY, nodes=3, **changes)


def test_a_bundle_is_what_a_run_takes_of_a_node() -> None:
    assert bundles(section(slots_per_node=2)) == [{"CPU": 2}] * 3
    assert bundles(section(gpus_per_node=8)) == [{"GPU": 8}] * 3
    assert bundles(section(gpus_per_node=8, launcher_takes_devices=False)) == [{}, {"GPU": 8}, {"GPU": 8}]


def test_the_number_of_nodes_has_to_be_said(tmp_path: Path) -> None:
    words = "cluster.nodes: left out; write how many nodes of the Ray cluster the run takes"
    assert any(
        problem.startswith(words) for problem in cluster_problems(small_topology(tmp_path, "cluster.backend=ray"))
    )
    assert list(cluster_problems(small_topology(tmp_path, "cluster.backend=ray", "cluster.nodes=2"))) == []


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, rf"ray, and {sys.executable} has no Ray \(No module named 'ray'\); pip install 'opd_async\[ray\]', or"),
        ("/no/python", r"ray, and Ray's process has ended: cannot start /no/python: No such file or directory"),
    ],
)
def test_where_there_is_no_ray_that_is_said(python: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_ENV, "a secret of the cluster")

    async def enter() -> None:
        agents = RayAgents(section(ray_python=python), print)
        async with asyncio.timeout(patience(60)), agents:
            pass

    with pytest.raises(InputError, match=words):
        asyncio.run(enter())
