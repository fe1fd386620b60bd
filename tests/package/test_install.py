"""`requirements/venv.sh`: Pythons that are too old, environments of another Python. No package is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from installed import ROOT

SCRIPT = ROOT / "requirements/venv.sh"


def python(folder: Path, version: str) -> Path:
    """A Python that says it is of this version, and can make environments of it."""
    path = folder / f"python{version}"
    numbers = version.replace(".", ", ")
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = -m ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
else
  exec {sys.executable} -c "import sys; sys.version_info = ({numbers}, 0); exec(sys.argv[1])" "$2"
fi
"""
    )
    path.chmod(0o755)
    return path


def fit(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of the script."""
    ended = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def version_in(environment: Path) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run(
        [environment / "bin/python", "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def test_a_python_that_is_too_old_is_one_line(tmp_path: Path) -> None:
    old = python(tmp_path, "3.10")
    code, said = fit(tmp_path / "env", old)
    advice = "opd_async needs Python 3.11 or newer: name one, as in make install PYTHON=python3.11\n"
    assert (code, said) == (2, f"{old} is Python 3.10; {advice}")
    assert fit(tmp_path / "env", "no-such-python") == (2, f"no-such-python does not start; {advice}")
    assert not (tmp_path / "env").exists()


def test_an_environment_of_another_python_is_made_anew(tmp_path: Path) -> None:
    environment = tmp_path / "env"
    assert fit(environment, python(tmp_path, "3.11")) == (0, "")
    (environment / "old").touch()
    assert fit(environment, python(tmp_path, "3.11")) == (0, "") and (environment / "old").exists()
    code, said = fit(environment, python(tmp_path, "3.12"))
    assert (code, said) == (0, f"{environment} is of another Python (3.11, not 3.12): making it anew\n")
    assert version_in(environment) == "3.12" and not (environment / "old").exists()


def test_an_environment_stays_where_no_python_is_named(tmp_path: Path) -> None:
    environment = tmp_path / "env"
    fit(environment, python(tmp_path, "3.12"))
    assert fit(environment, python(tmp_path, "3.11"), "keep") == (0, "") and version_in(environment) == "3.12"
    (environment / "bin/python").unlink()
    assert fit(environment, python(tmp_path, "3.11"), "keep")[0] == 0 and version_in(environment) == "3.11"
