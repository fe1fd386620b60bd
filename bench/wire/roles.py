"""The processes of a null run that are not those of a run.

python -m bench.wire.roles KIND --plan FILE [--index N]

engine kinds     the null server
learner          the null learner
rollout, teacher the actor itself, its engine client exchanged for the null client
"""

from __future__ import annotations

import os
import sys

from opd_async.actors.rollout import actor as rollout
from opd_async.actors.rollout import engines as rollout_engines
from opd_async.actors.teacher import actor as teacher
from opd_async.bench.wire import learner, server
from opd_async.bench.wire.client import NullClient
from opd_async.plan.plan import RoleKind
from opd_async.process import configure_logging, run_role
from opd_async.role import role_arguments

CORE_ENV = "OPD_BENCH_CORE"
"""The core that belongs to the data plane; null engines and the null learner stay away from it."""


def main() -> None:
    """Run one of them."""
    kind = RoleKind(sys.argv.pop(1))
    match kind:
        case RoleKind.ROLLOUT:
            vars(rollout_engines)["EngineClient"] = NullClient
            run_role(rollout.main)
        case RoleKind.TEACHER:
            vars(teacher)["EngineClient"] = NullClient
            run_role(teacher.main)
    plan, index = role_arguments("A null engine or a null learner.")
    mine = plan.role(kind, index)
    configure_logging(mine.name)
    if core := os.environ.get(CORE_ENV):
        os.sched_setaffinity(0, set(range(os.cpu_count() or 1)) - {int(core)})
    if kind is RoleKind.LEARNER:
        run_role(lambda: learner.obey(plan, mine))
    run_role(lambda: server.serve(mine))


if __name__ == "__main__":
    main()
