"""How the code may be written, where a linter has no rule for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("opd_async", "actors", "learner", "bench")
MOST_POSITIONAL = 5
"""A class called with more values by position is a swap that no type checker sees: neighbours share their types."""


def sources() -> list[Path]:
    """Every module of the packages, once: `opd_async` holds the others as links, which `rglob` may follow."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted({path.resolve() for path in found})


def class_name(call: ast.Call) -> str:
    """The name of the class that is called, or "" where it is a function: classes begin with a capital."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name if name.lstrip("_")[:1].isupper() else ""


def wide_calls(tree: ast.AST) -> Iterator[str]:
    """Calls of classes with too many values by position, as "line: name"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and class_name(node) and len(node.args) > MOST_POSITIONAL:
            yield f"{node.lineno}: {class_name(node)}"


def dataclass_decorator(node: ast.ClassDef) -> ast.expr | None:
    for decorator in node.decorator_list:
        func = decorator.func if isinstance(decorator, ast.Call) else decorator
        if "dataclass" in (getattr(func, "id", ""), getattr(func, "attr", "")):
            return decorator
    return None


def wide_records(tree: ast.AST) -> Iterator[str]:
    """Dataclasses with too many fields for a call by position that allow one, as "line: name"."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or (decorator := dataclass_decorator(node)) is None:
            continue
        fields = 0
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                if ast.unparse(statement.annotation) in ("KW_ONLY", "dataclasses.KW_ONLY"):
                    break
                fields += "ClassVar" not in ast.unparse(statement.annotation)
        if fields > MOST_POSITIONAL and "kw_only=True" not in ast.unparse(decorator):
            yield f"{node.lineno}: {node.name}"


@pytest.mark.parametrize("rule", [wide_calls, wide_records], ids=lambda rule: rule.__name__)
def test_wide_records_are_made_by_keyword(rule) -> None:  # type: ignore[no-untyped-def]
    found = [f"{path.relative_to(ROOT)}:{one}" for path in sources() for one in rule(ast.parse(path.read_text()))]
    assert found == []


def silent_coroutines(tree: ast.AST) -> Iterator[str]:
    """Public coroutines of which neither they, nor their class or module, say what a cancel does, as "line: name"."""

    def within(node: ast.AST, said: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.ClassDef, ast.AsyncFunctionDef)) or child.name.startswith("_"):
                continue
            text = said + (ast.get_docstring(child) or "")
            if isinstance(child, ast.AsyncFunctionDef):
                if "cancel" not in text.lower():
                    yield f"{child.lineno}: {child.name}"
            elif not any("Protocol" in ast.unparse(base) for base in child.bases):
                yield from within(child, text)

    assert isinstance(tree, ast.Module)
    return within(tree, ast.get_docstring(tree) or "")


def test_public_coroutines_say_what_a_cancel_leaves_behind() -> None:
    """Those of the run and of the actors; the embedded engine answers requests, whose cancel is the client's."""
    files = [file for file in sources() if file.relative_to(ROOT).parts[0] in ("opd_async", "actors")]
    files = [file for file in files if file.relative_to(ROOT).parts[:2] != ("actors", "engine")]
    found = [
        f"{file.relative_to(ROOT)}:{one}" for file in files for one in silent_coroutines(ast.parse(file.read_text()))
    ]
    assert found == []


def test_a_silent_coroutine_is_seen() -> None:
    coroutines = {"a": "Waits.", "b": "Waits. On cancel: nothing is lost.", "_c": "Waits."}
    code = "".join(f"async def {name}():\n    '{text}'\n" for name, text in coroutines.items())
    assert list(silent_coroutines(ast.parse(code))) == ["1: a"]


def test_the_counter_sees_what_it_is_for() -> None:
    code = "Row(1, 2, 3, 4, 5)\nm.Row(1, 2, 3, 4, 5, 6)\nrow(1, 2, 3, 4, 5, 6)\n_Row(1, 2, 3, 4, 5, a=6)\n"
    assert list(wide_calls(ast.parse(code))) == ["2: Row"]
    names = "abcdef"
    fields = "".join(f"    {name}: int\n" for name in names)
    for decorator, found in (
        ("@dataclass", True),
        ("@dataclass(slots=True)", True),
        ("@dataclass(kw_only=True)", False),
    ):
        assert bool(list(wide_records(ast.parse(f"{decorator}\nclass Row:\n{fields}")))) is found
    half = f"@dataclass\nclass Row:\n    a: int\n    _: KW_ONLY\n{fields}"
    assert list(wide_records(ast.parse(half))) == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports each by its bare name: two of one name pass alone, and fail where both are collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 100
    assert sorted({name for name in names if names.count(name) > 1}) == []
