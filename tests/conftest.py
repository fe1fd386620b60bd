"""What holds for every test: its deadline grows with the machine's load, and a coroutine runs in a loop of its own.

Several workers (`-n 3`) share the tests out in pieces: a file is one, because its tests share what was made for them,
but each whole run of `tests/e2e/` and `tests/cluster/` stands alone, except those that share one Ray. Long pieces come
first, so that none is left to one worker at the end.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

if os.environ.get("OPD_TEST_DEVICE", "cpu") == "cpu":
    # before torch looks, here and in every process that a test starts: the tests say what a CPU does
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# how long an example takes, and drawing it, says how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

HERE = Path(__file__).parent
WHOLE_RUNS = ("tests/e2e/", "tests/cluster/")
ON_ONE_CLUSTER = "tests/cluster/test_ray.py"
LONG_FIRST = (
    "cluster/test_ray.py",
    "cluster/test_several_hosts.py",
    "learner/test_ranks.py",
    "gpu/test_liger.py",
    "e2e",
    "bench",
    "learner",
    "gpu",
    "package",
    "conformance",
)
"""Files and folders; the others follow in the order of their names."""


def _long_first(item: pytest.Item) -> int:
    """Where in `LONG_FIRST` the file of a test stands."""
    path = item.path.relative_to(HERE)
    places = (place for place, name in enumerate(LONG_FIRST) if path.is_relative_to(name))
    return next(places, len(LONG_FIRST))


class Pieces(LoadScopeScheduling):
    """Hand out pieces of work in the order in which tests were collected."""

    def _split_scope(self, nodeid: str) -> str:
        alone = nodeid.startswith(WHOLE_RUNS) and not nodeid.startswith(ON_ONE_CLUSTER)
        return nodeid if alone else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Pieces | None:
    """Share the tests out, unless `--dist` asks for another way."""
    config.option.loadscopereorder = False  # which would begin with the files that have most tests
    return Pieces(config, log) if config.getoption("dist") == "load" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test the time that its folder or the configuration allows, on a machine as busy as this one."""
    items.sort(key=_long_first)
    usual = float(config.getoption("timeout") or config.getini("timeout"))
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = usual if marker is None else float(marker.args[0])
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def test_...`; leave all other tests to pytest."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
