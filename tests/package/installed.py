"""Distributions of this project, built from a copy of it, and environments that have nothing of it but a wheel."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from deadlines import patience

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = patience(70.0)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "data")
MADE = Path("examples/smollm2/models")
"""A gigabyte of models where somebody has made them; a copy has a small file there, which is to be in no package."""


def environment() -> dict[str, str]:
    """This process's variables without those that say where Python looks for modules."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """What a command prints; it must end with code 0, or, if it `fails`, with another: then its errors as well."""
    ended = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE_S,
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert (ended.returncode != 0) is fails, f"{command} ended with {ended.returncode}:\n{said}"
    return said if fails else ended.stdout


def copy_of_the_project(folder: Path) -> Path:
    """The repository's files, links as links; `opd_async/data` among them, made data not."""

    def left_out(inside: str, names: list[str]) -> set[str]:
        made = {MADE.name} if Path(inside) == ROOT / MADE.parent else set()
        return NOT_COPIED(inside, names) | made

    copy = shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=left_out)
    (copy / MADE / "teacher").mkdir(parents=True)
    (copy / MADE / "teacher" / "model.safetensors").write_bytes(b"made")
    shutil.copytree(ROOT / "opd_async/data", copy / "opd_async/data", ignore=shutil.ignore_patterns("__pycache__"))
    for hidden in (".ci", ".github", ".gitignore", ".pre-commit-config.yaml"):
        if (source := ROOT / hidden).is_dir():
            shutil.copytree(source, copy / hidden)
        elif source.exists():
            shutil.copy(source, copy / hidden)
    return copy


def build(kind: str, project: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` with the backend that pyproject.toml names; nothing is downloaded."""
    folder.mkdir(exist_ok=True)
    name = run(sys.executable, "-c", BUILD, f"build_{kind}", folder, cwd=project).split()[-1]
    return folder / name


@dataclass(frozen=True)
class Installed:
    """An environment with a wheel installed, and the packages that this one has: dependencies, but not the project."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def opd(self) -> Path:
        """Its command."""
        return self.folder / "bin" / "opd"


def install(wheel: Path, folder: Path) -> Installed:
    """Install the wheel alone, beside this environment's packages but not its project.

    A .pth file names their folder; the .pth files in there, such as that of an editable project, are not read then.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    made = Installed(folder)
    packages = run(made.python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    Path(packages, "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", made.python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return made
