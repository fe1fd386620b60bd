"""Who may import whom: the core needs no torch, packages stay apart, and rooms know only those above them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from deadlines import patience
from rooms import ORDER, ROOT, modules

HEAVY = ("torch", "transformers", "megatron", "sglang")
FORBIDDEN = {
    "opd_async": ("actors", "learner", "bench"),
    "actors": ("learner", "bench"),
    "learner": ("actors", "bench"),
}
"""Sub-packages of `opd_async` that a package may not import; as folders of the repository they stand beside it."""
TORCH_FREE = ("client", "rollout", "teacher", "intake", "rewards")


def core_modules() -> list[str]:
    files = [file for _, file in modules("opd_async")]
    files += [file for room, file in modules("actors") if room in TORCH_FREE]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    whole = [name if name.startswith("opd_async.") else f"opd_async.{name}" for name in names]
    return sorted(name for name in whole if not name.endswith("__main__"))


def test_the_core_imports_no_torch() -> None:
    code = f"""
import importlib, sys
for name in {core_modules()!r}:
    importlib.import_module(name)
    found = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not found, f"{{name}} imports {{found}}"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(300), check=False
    )
    assert done.returncode == 0, done.stderr


def imports(file: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> tuple[str, str] | None:
    """(package, room) of one of our modules, by its dotted name; None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "opd_async" or len(parts) == 1:
        return None
    return (parts[1], parts[2]) if parts[1] in ORDER and len(parts) > 2 else ("opd_async", parts[1])


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_packages_stay_apart(package: str) -> None:
    wrong = {f"opd_async.{name}" for name in FORBIDDEN[package]}
    found = [
        f"{file} imports {name}"
        for _, file in modules(package)
        for name in imports(file)
        if ".".join(name.split(".")[:2]) in wrong
    ]
    assert not found


def test_every_module_has_one_name() -> None:
    """`actors`, `learner` and `bench` are imported as parts of `opd_async`, or a class would exist twice."""
    files = [file for package in ORDER for _, file in modules(package)] + sorted(ROOT.glob("tests/**/*.py"))
    found = [f"{file} imports {name}" for file in files for name in imports(file) if name.split(".")[0] in FORBIDDEN]
    assert [line for line in found if " imports opd_async" not in line] == []


def downward(package: str, order: tuple[str, ...], files: Iterator[tuple[str, Path]]) -> list[str]:
    """Imports of a room below, as `file imports name`."""
    place = {room: number for number, room in enumerate(order)}
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for room, file in files
        for name in imports(file)
        if (target := room_of(name)) is not None and target[0] == package and place[target[1]] > place[room]
    ]


@pytest.mark.parametrize("package", sorted(ORDER))
def test_rooms_know_only_those_above(package: str) -> None:
    assert downward(package, ORDER[package], modules(package)) == []


def test_an_import_of_a_room_below_is_found() -> None:
    first, second = next((a, b) for a, b in pairwise(ORDER["opd_async"]) if (a, b) == ("transport", "scheduling"))
    swapped = tuple({first: second, second: first}.get(room, room) for room in ORDER["opd_async"])
    assert any("scheduling" in line for line in downward("opd_async", swapped, modules("opd_async")))


@pytest.mark.parametrize("package", sorted(ORDER))
def test_every_room_is_in_the_table(package: str) -> None:
    there = {
        path.stem
        for path in (ROOT / package).iterdir()
        if not path.is_symlink() and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }
    assert there - {"__init__"} == set(ORDER[package])


@pytest.mark.parametrize("package", sorted(ORDER))
def test_every_room_says_what_is_in_it(package: str) -> None:
    for room in ORDER[package]:
        init = ROOT / package / room / "__init__.py"
        if init.is_file():
            assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init
