"""The rooms of the house, in the order in which they may know one another, and the page that lists their modules.

    python tests/core/rooms.py > docs/modules.md

A room may import its neighbours inside and everything above it, never what is below. A name without a folder is a
module that stands between rooms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

ORDER: dict[str, tuple[str, ...]] = {
    "opd_async": (
        *("errors", "extras", "hooks", "clock", "files", "keys", "signals", "freed_memory", "process"),
        *("config", "estimators"),
        *("transport",),
        *(
            "scheduling",
            "data",
            "engines",
            "plan",
            "tracker_process",
            "telemetry",
            "forecast",
            "role",
            "cluster",
            "agent",
            "run",
            "checks",
        ),
        *("options", "door", "command", "launch", "cli"),
    ),
    "actors": ("client", "rewards", "rollout", "teacher", "intake", "engine"),
    "learner": (
        *(
            "errors",
            "config",
            "progress",
            "distributed",
            "model",
            "hf",
            "checkpoints",
            "losses",
            "metrics",
            "open_step",
            "optimizer",
            "critic",
        ),
        *("teacher", "average", "trainer", "opinion", "weights", "from_topology", "resume", "beats", "convert", "main"),
    ),
    "bench": (
        *(
            "no_weights",
            "sim",
            "schedules",
            "sweeps",
            "baselines",
            "profile",
            "forecasts",
            "agents",
            "crosscheck",
            "convert",
            "learner",
            "memory",
            "weights",
        ),
        *("resume", "soak", "teacher", "wire", "learning", "peers", "real", "gpu"),
    ),
}
"""Package by package, the first may be imported by all that follow."""


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(room, file) of every module of a package but its `__init__.py`."""
    for name in ORDER[package]:
        folder = ROOT / package / name
        if folder.is_dir():
            yield from ((name, file) for file in sorted(folder.glob("*.py")) if file.name != "__init__.py")
        else:
            yield name, folder.with_suffix(".py")


def first_sentence(file: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def page() -> str:
    """`docs/modules.md`."""
    lines = [
        "# Modules",
        "",
        "Made by `python tests/core/rooms.py` from the first sentence of each module; a test keeps this page equal",
        "to it. A room imports its own modules and those of rooms above it, never what is below.",
    ]
    for package in ORDER:
        lines += ["", f"## `{package}`", "", first_sentence(ROOT / package / "__init__.py")]
        before = ""
        for room, file in modules(package):
            kind = room if file.parent.name == room else "-"
            if kind != before:
                lines += _head(package, room, file)
                before = kind
            lines.append(f"| `{file.relative_to(ROOT)}` | {first_sentence(file)} |")
    return "\n".join(lines) + "\n"


def _head(package: str, room: str, file: Path) -> list[str]:
    if file.parent.name != room:
        return ["", "| between rooms | what it is |", "|---|---|"]
    what = first_sentence(file.parent / "__init__.py")
    return ["", f"### `{package}/{room}/`", "", what, "", "| module | what it is |", "|---|---|"]


if __name__ == "__main__":
    print(page(), end="")
