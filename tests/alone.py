"""Run the tests that failed beside others once more, alone: a few at most, and never quietly.

    python -m pytest -n 3 --cache-clear || python tests/alone.py $?

Whole runs share two cores with other tests and with whatever else the machine does. What fails there and passes alone
depends on time: the last lines name it, and it is to be mended. Where more than a few fail, nothing is run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FAILED = 1
"""pytest's exit code where tests have failed, and nothing else went wrong."""
MOST = 3
RECORD = Path(".pytest_cache/v/cache/lastfailed")


def main(exit_code: int) -> int:
    """The exit code of the tests that failed, run alone; that of the run with all tests where they are too many."""
    failed = list(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.exists() else []
    if exit_code != FAILED or not 0 < len(failed) <= MOST:
        return exit_code
    print(f"\n{len(failed)} failed beside other tests; once more, alone:", *failed, sep="\n  ", flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", *failed], check=False)
    if done.returncode == 0:
        print("Passed alone, and failed beside others, which is to be mended:", *failed, sep="\n  ", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
