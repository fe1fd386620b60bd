"""Start the ranks of one learner on this host and end as the first of them that failed ends.

    python -m opd_async.cluster.ranks --nproc-per-node 2 ... -m opd_async.learner.main --plan PLAN

torch.distributed.run does the work. Its own report is left out: what a person reads last in the log are the last lines
of the rank, with its error, and the exit code says what that rank meant by it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import NoReturn

KILLED = 128
"""What shells add to the number of a signal."""


def main(arguments: list[str]) -> NoReturn:
    """Run torchrun with its own `arguments` and end the process: 0, or as the first rank that failed did."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        _quiet(name)
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        _end_as(first.exitcode)
    except SignalException as error:
        sys.exit(KILLED + error.sigval)
    sys.exit(0)


def _quiet(name: str) -> None:
    """Have the loggers below `name`, which have levels of their own, say nothing: each rank speaks for itself."""
    for logger in list(logging.root.manager.loggerDict):
        if logger == name or logger.startswith(f"{name}."):
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)


def _end_as(code: int) -> NoReturn:
    """End with the exit code, or by the signal that minus `code` is the number of."""
    if code >= 0:
        sys.exit(code)
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    sys.stdout.flush()
    os.kill(os.getpid(), -code)
    sys.exit(KILLED - code)  # a signal that does not end a process


if __name__ == "__main__":
    main(sys.argv[1:])
