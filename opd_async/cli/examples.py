"""`opd example`: the examples that are part of the package, written where a person wants to start from them.

A topology goes to the folder itself, and what it needs beside it; paths in it begin there then, instead of in the
repository.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import opd_async
from opd_async.cli.commands import in_words
from opd_async.errors import InputError
from opd_async.telemetry.terminal import show

PACKAGED = Path(opd_async.__file__ or "").parent / "examples"
NEEDS = {"quickstart": "addition"}
"""By example: the folder of examples that it needs beside it."""
DATA_SCRIPT = "make_data.py"
SCHEMA = "topology.schema.json"
"""What editors check a topology with; its first line names it."""
_LEAVE_OUT = shutil.ignore_patterns("__pycache__", "data")


def names() -> list[str]:
    """The examples that there are."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def write_example(name: str, folder: Path) -> list[Path]:
    """Write an example into `folder` and make its data; returns what was written.

    Raises `InputError` if something of that name is there already, or the folder cannot be written.
    """
    topology, beside = folder / f"{name}.yaml", NEEDS.get(name)
    schema = folder / SCHEMA
    written = [topology, *([] if schema.exists() else [schema]), *([folder / beside] if beside else [])]
    if there := next((path for path in written if path.exists()), None):
        raise InputError(f"{there} exists already; remove it, or give another folder with --to")
    text = (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace("python -m opd_async.launch --topology examples/", "opd run ").replace("examples/", "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        topology.write_text(text, encoding="utf-8")
        shutil.copyfile(PACKAGED / SCHEMA, schema)
        if beside:
            shutil.copytree(PACKAGED / beside, folder / beside, ignore=_LEAVE_OUT)
            subprocess.run([sys.executable, folder / beside / DATA_SCRIPT], check=True, stdout=subprocess.DEVNULL)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    return written


@in_words
def example(arguments: argparse.Namespace) -> None:
    """`opd example`: write one, or list them."""
    if arguments.name is None:
        for name in names():
            lines = (PACKAGED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            first = next(line for line in lines if not line.startswith("# yaml-language-server"))
            show(f"{name:<24}{first.removeprefix('# ')}")
        return
    for path in write_example(arguments.name, arguments.to):
        show(str(path))
    command = "opd run" if arguments.to == Path() else f"cd {arguments.to} && opd run"
    show(f"next: {command} {arguments.name}.yaml")
