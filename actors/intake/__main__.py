"""`python -m actors.intake`: the process of this role."""

from __future__ import annotations

from opd_async.actors.intake.actor import main
from opd_async.process import run_role

if __name__ == "__main__":
    run_role(main)
