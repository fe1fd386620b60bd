"""Functions named in a topology: found beside what is installed, never instead of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from opd_async.errors import InputError
from opd_async.extras import need
from opd_async.hooks import load_hook


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which Python does not search by itself."""
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if path and Path(path) != tmp_path]
    monkeypatch.setattr(sys, "path", elsewhere)
    return tmp_path


def test_a_module_of_the_working_directory_is_found_and_nothing_stays_behind(here: Path) -> None:
    (here / "hooks_found_here.py").write_text("def answer():\n    return 42\n")
    before = list(sys.path)
    assert load_hook("opd.function", "hooks_found_here:answer")() == 42
    assert sys.path == before


def test_what_is_installed_comes_first(here: Path) -> None:
    (here / "this.py").write_text("raise RuntimeError('not this one')")
    (here / "colorsys.py").write_text("raise RuntimeError('not this one')")
    sys.modules.pop("colorsys", None)
    assert load_hook("opd.function", "colorsys:rgb_to_hsv")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'hooks_missing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('at import')", "SystemExit: at import"),
        ("other = 1", "AttributeError: module 'hooks_missing' has no attribute 'answer'"),
    ],
)
def test_what_cannot_be_loaded_is_named(here: Path, source: str | None, reason: str) -> None:
    if source is not None:
        (here / "hooks_missing.py").write_text(source)
    sys.modules.pop("hooks_missing", None)
    with pytest.raises(InputError) as caught:
        load_hook("opd.function", "hooks_missing:answer")
    assert str(caught.value) == f"opd.function: hooks_missing:answer cannot be loaded ({reason})"


def test_a_missing_extra_is_named() -> None:
    assert need("json", "plots", "a picture").loads("1") == 1
    with pytest.raises(InputError, match=r"a picture needs no_such_module .*; run: pip install 'opd_async\[plots\]'"):
        need("no_such_module", "plots", "a picture")
