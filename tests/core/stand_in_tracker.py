"""A package that stands in for wandb and writes what it is told to `told.jsonl`, for tests of `tracking.trackers`.

The variable TOLD makes it `raise` at step 2, `hang`, `die`, or have `no login`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PACKAGE = '''
"""A stand-in for wandb that writes what it is told."""
import json, os, sys, time

print("a word of the package")
Table = lambda columns, data: {"columns": columns, "data": data}

class Run:
    def __init__(self, folder, **given):
        self.id = given["id"] or "first"
        self.summary = {}
        self.file = open(os.path.join(folder, "told.jsonl"), "a")
        self.write({"init": given})

    def write(self, row):
        print(json.dumps(row), file=self.file, flush=True)

    def define_metric(self, names, step_metric):
        self.write({"defined": [names, step_metric]})

    def log(self, values):
        what = os.environ.get("TOLD", "")
        if what == "raise" and values["step"] == 2:
            raise SystemExit("no room at the other side")
        if what == "hang":
            time.sleep(1e6)
        if what == "die":
            os._exit(7)
        self.write(values)

    def finish(self, exit_code):
        self.write({"finish": exit_code, **self.summary})

def init(dir, **given):
    if os.environ.get("TOLD") == "no login":
        raise ValueError("no login")
    return Run(dir, **given)

def login(prompt, verify):
    return os.environ.get("TOLD") != "no login"
'''


def write_package(folder: Path) -> None:
    """Put the package into a new folder."""
    folder.mkdir()
    (folder / "wandb.py").write_text(PACKAGE)


def write_python(folder: Path) -> Path:
    """Make a Python that has the package, as an environment of its own would; returns its path."""
    write_package(folder / "packages")
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{folder / 'packages'}' exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    return python


def told(run_folder: Path) -> list[dict[str, Any]]:
    """What the package was told in all launches of a run so far."""
    path = run_folder / "tracking/wandb/told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
