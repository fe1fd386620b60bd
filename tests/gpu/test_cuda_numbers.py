"""The learner on a GPU that is not there, with numbers: what it computes is what it computes on the CPU.

Parity of three losses, of a resumed run and of two tensor-parallel ranks, by the script that will ask a real GPU the
same (`opd_async.bench.gpu.step`). The rules of the pretended device have their own tests in `numbers_rank.rules`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import patience
from test_cuda_paths import HERE, ROOT, guard

from opd_async.bench.gpu import step
from opd_async.bench.gpu.found import Findings
from opd_async.plan.free_ports import free_ports

DEADLINE_S = 150.0


def take(way: str, folder: Path, library: Path) -> None:
    """Take the steps of a way on ranks that all believe to have a GPU."""
    [port] = free_ports("127.0.0.1", 1)
    count = step.WAYS[way].ranks
    command = [sys.executable, str(HERE / "numbers_rank.py"), way, str(folder), str(patience(DEADLINE_S))]
    variables = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"{way}-{rank}.log" for rank in range(count)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            environment = os.environ | variables | {"RANK": str(rank)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    try:
        ended = [rank.wait(patience(DEADLINE_S)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ended == [0] * count, "\n".join(log.read_text()[-3000:] for log in logs)


def test_steps_are_the_cpus(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    cache = getattr(request.config, "cache", None)  # pytest may run without one
    library = guard(tmp_path if cache is None else Path(cache.mkdir("cuda_guard")))
    step.prepare(tmp_path, tiny=True)
    step.run("cpu", tmp_path, True, patience(DEADLINE_S))
    findings = Findings()
    for way in ("float32", "tensor"):
        take(way, tmp_path, library)
        step.compare(findings, way, tmp_path)
    assert findings.failed == []
    assert len(findings.checks) == 2 * 3 * (1 + 2 * step.STEPS + 1) + 1
    apart = [check.value for check in findings.checks if check.name.endswith("moved apart")]
    assert max(apart) < 1e-2, "in float32 two ways are one but for rounding"
