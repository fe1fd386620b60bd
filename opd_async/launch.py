"""Start a run: check everything, then supervise it to its report.

    opd run cluster.yaml ..., or, which is the same:
    python -m opd_async.launch --topology cluster.yaml [--set a.b=c ...] [--dry-run] [--resume | --overwrite]
                               [--plan --device H100 --link NVLink --lengths 2000,8000,16384]
                               [--use-opd --opd-type sglang|megatron --opd-kl-coef 1.0
                                --opd-teacher-load DIR --opd-teacher-ckpt-step N]

The options of distillation have slime's names; they stand for keys under `opd` and win over the file.

Exit codes: 0 the run did what was asked; 2 the input cannot be used and nothing was started; 1 the run failed;
130 it was stopped by a signal.

This module is small, so that a signal is answered from the first moment on: `opd_async.command` takes seconds to load.
"""

from __future__ import annotations

import sys

from opd_async.signals import answered


def main() -> None:
    """Entry point; ends the process with the exit code of the run."""
    with answered():
        from opd_async.command import command

        code = command()
    sys.exit(code)


if __name__ == "__main__":
    main()
