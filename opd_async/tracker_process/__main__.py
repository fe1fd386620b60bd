"""Start the process of a tracker, under a Python that may have nothing but the tracker's package.

python -P tracker_process/__main__.py                           the launcher speaks to it (`process.py`)
python -P tracker_process/__main__.py --check wandb online      prints why this tracker cannot be used, if so
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    # this room alone, under its name: what else is beside the project's folder must not hide the tracker's own packages
    project = ModuleType("opd_async")
    project.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["opd_async"] = project
    from opd_async.tracker_process.process import main

    sys.exit(main(sys.argv[1:]))
