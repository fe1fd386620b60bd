"""What failed beside other tests is run once more, alone; what is broken stays broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ALONE = Path(__file__).resolve().parents[1] / "alone.py"
TESTS = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(5))
def test_some(number):
    failing, seen = {counts}, Path(f"seen-{{number}}")
    before = len(seen.read_text()) if seen.exists() else 0
    seen.write_text("x" * (before + 1))
    assert before >= failing[number]
"""


@pytest.mark.parametrize(
    ("counts", "runs", "expected"),
    [
        ([0, 0, 0, 0, 0], "11111", 0),
        ([0, 1, 0, 1, 0], "12121", 0),
        ([0, 9, 0, 1, 0], "12121", 1),
        ([1, 1, 1, 1, 0], "11111", 1),
    ],
    ids=["all pass", "two pass alone", "one is broken", "too many"],
)
def test_a_few_failures_are_run_again(tmp_path: Path, counts: list[int], runs: str, expected: int) -> None:
    (tmp_path / "test_some.py").write_text(TESTS.format(counts=counts))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = f"{sys.executable} -m pytest -q || {sys.executable} {ALONE} $?"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    assert "".join(str(len((tmp_path / f"seen-{number}").read_text())) for number in range(5)) == runs
    named = [line.strip() for line in done.stdout.splitlines() if line.startswith("  test_some.py::")]
    again = [f"test_some.py::test_some[{number}]" for number, count in enumerate(runs) if count == "2"]
    assert named == again + (again if expected == 0 else [])


def test_a_run_that_was_broken_off_is_not_run_again(tmp_path: Path) -> None:
    cache = tmp_path / ".pytest_cache/v/cache"
    cache.mkdir(parents=True)
    (cache / "lastfailed").write_text('{"test_some.py::test_some": true}')
    done = subprocess.run([sys.executable, ALONE, "2"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
