"""The benchmark of many agents, with two: everything is started, listened to and stopped."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

from opd_async.bench.agents import Row, measure, table


def test_agents_join_start_and_stop(tmp_path: Path) -> None:
    row = measure(2, 2, 0.5, tmp_path)
    assert row.agents == 2 and 0 < row.joined_s < 600 and row.started_s > 0 and row.stopped_s > 0
    assert 0 <= row.beats_cpu < 1 and row.start_cpu_s > 0
    logs = [f"role-{host}-{number}.log" for host in ("h1", "h2") for number in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == logs
    assert not [child for child in psutil.Process().children(recursive=True) if sleeps(child)]


def sleeps(process: psutil.Process) -> bool:
    """Whether it is one of those that the agents start; others may end while they are looked at."""
    with suppress(psutil.NoSuchProcess):
        return "sleep" in process.name()
    return False


def test_the_table_has_a_line_for_each_number() -> None:
    times = {"joined_s": 1.0, "started_s": 2.0, "start_cpu_s": 0.5, "beats_cpu": 0.04, "stopped_s": 3.0}
    rows = [Row(agents=count, **times) for count in (1, 128)]
    assert table(rows).splitlines()[-1] == "| 128 | 1.00 | 2.00 | 0.50 | 0.04 | 3.00 |"
