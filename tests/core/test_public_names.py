"""The public surface: which names there are, that each says what it is, and that importing them costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import opd_async

PUBLIC = [
    "DeadlineError",
    "Evaluation",
    "FinishedGroup",
    "HookError",
    "InputError",
    "InterruptedRun",
    "LossOutput",
    "LossRows",
    "OpdError",
    "Report",
    "RoleError",
    "Topology",
    "__version__",
    "run",
    "run_async",
]


def test_the_public_names_are_these() -> None:
    """A name that goes or comes is a change for users: CHANGELOG.md says it, and this list."""
    assert sorted(opd_async.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(opd_async, name)
    assert value.__doc__ and value.__name__ == name and value.__module__.startswith("opd_async.")


def test_the_version_is_that_of_the_metadata() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{opd_async.__version__}"\n' in text


def test_importing_the_package_loads_nothing() -> None:
    code = """
import sys
before = set(sys.modules)
import opd_async
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert loaded <= {"opd_async"} | sys.stdlib_module_names, loaded
assert [name for name in sys.modules if name.startswith("opd_async.")] == []
from opd_async import InputError
assert "pydantic" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


def test_run_is_the_function_whatever_was_imported_before() -> None:
    """The room `opd_async.run` bears the same name; importing it must not put it in the function's place."""
    import opd_async.run.script
    from opd_async import run

    assert isinstance(run, FunctionType) and opd_async.run is run
    with pytest.raises(AttributeError, match="module 'opd_async' has no attribute 'walk'"):
        _ = opd_async.walk
