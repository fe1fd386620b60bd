"""What holds for every test: its deadline grows with the machine's load, and a coroutine runs in a loop of its own."""

from __future__ import annotations

import asyncio
import inspect
import os

import pytest
from deadlines import patience

if os.environ.get("OPD_TEST_DEVICE", "cpu") == "cpu":
    # before torch looks, here and in every process that a test starts: the tests say what a CPU does
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test the time that its folder or the configuration allows, on a machine as busy as this one."""
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
