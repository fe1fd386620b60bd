"""Who may import whom: the core needs no torch, and the three packages stay apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "megatron", "sglang")
FORBIDDEN = {"opd_async": ("actors", "learner"), "actors": ("learner",), "learner": ("actors",)}


def core_modules() -> list[str]:
    files = [
        *Path("opd_async").glob("**/*.py"),
        *(Path("actors") / f"{name}.py" for name in ("rollout", "teacher", "intake")),
    ]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files if file.is_file()]
    return sorted(name for name in names if not name.endswith("__main__"))


def test_the_core_imports_no_torch() -> None:
    code = f"""
import importlib, sys
for name in {core_modules()!r}:
    importlib.import_module(name)
    found = sorted(set({HEAVY!r}) & set(sys.modules))
    assert not found, f"{{name}} imports {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def imports(file: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_packages_stay_apart(package: str) -> None:
    found = [
        f"{file} imports {name}"
        for file in Path(package).glob("**/*.py")
        for name in imports(file)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not found
