"""Does anything grow in the data plane: the soak of `bench.soak` on a run whose engines and learner are null.

    python -m bench.wire.soak [--samples 100000] [--tokens 48] [--minutes M] [--every 2.0] [--json FILE]

Null engines and a null learner answer at once: as many samples pass in minutes as in days of a real run. Launcher,
rollout actor, teacher actor and intake are those of a run, and so are the prompts, which it keeps as columns. Responses
are short, so that what is kept of each shows.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import psutil
import uvloop

from opd_async.bench.soak import (
    LAUNCHER,
    Row,
    Samples,
    Series,
    containers,
    look,
    new_series,
    processes,
    rows_of,
    table,
)
from opd_async.bench.wire.pattern import VOCAB_SIZE, prompts
from opd_async.bench.wire.run import ROLES, Case, make_topology, with_null_roles
from opd_async.config.topology import ONE_TEACHER
from opd_async.data.completions import CompletionSet
from opd_async.data.prompt_table import ColumnWriter, PromptTable
from opd_async.data.prompts import PromptSet
from opd_async.files import write_atomically
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan
from opd_async.run.inputs import Inputs
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import prepare
from opd_async.signals import Signals

CASE = Case(chunk_tokens=16, event_tokens=16, http=False, response_tokens=48, slots=64, step_tokens=4096)


async def watch(plan: Plan, samples: int, every_s: float, until: float) -> Series:
    """Look at the roles until so many samples are trained, or `until`, on `time.monotonic`'s scale."""
    series = new_series()
    counter, me = Samples(plan.run_folder), psutil.Process()
    while counter.look() < samples and time.monotonic() < until:
        await asyncio.sleep(every_s)
        if counter.count == 0:
            continue
        for role, members in processes(plan, me).items():
            for figure, value in look(members).items():
                series[role, figure].extend((counter.count, value))
        series[LAUNCHER, "objects"].extend((counter.count, _objects()))
        for role, figure, value in await asyncio.to_thread(lambda: list(containers(plan.run_folder))):
            series[role, figure].extend((counter.count, value))
    return series


def _objects() -> int:
    """How many containers this process, which is the launcher, holds, by what Python's collector knows of them."""
    gc.collect()
    return len(gc.get_objects())


def _prompts() -> PromptTable:
    """Each is made when it is asked for: an array that stays grows by 80 bytes when numpy first lends its memory."""
    writer = ColumnWriter(None)
    for prompt in prompts(VOCAB_SIZE):
        writer.add(prompt.token_ids.tolist(), prompt.label, prompt.metadata, 0)
    return PromptTable(writer.finish(), (ONE_TEACHER,), VOCAB_SIZE)


async def conduct(plan: Plan, samples: int, every_s: float, until: float) -> Series:
    """Run until watched. Raises what ends the run early."""
    signals = Signals()
    inputs = Inputs(PromptSet(_prompts(), 0), {}, cast(Any, None), CompletionSet())
    lifecycle = Lifecycle(plan, inputs, lambda line: None, signals)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(lifecycle.run())
        looking = group.create_task(watch(plan, samples, every_s, until))
        looking.add_done_callback(lambda _: signals.arrived())
        run.add_done_callback(lambda _: looking.cancel())
    return looking.result()


def soak(case: Case, samples: int, every_s: float, until: float = math.inf) -> tuple[list[Row], int]:
    """The rows of the real roles, and how many samples there were."""
    with tempfile.TemporaryDirectory(prefix="opd-soak-") as name:
        plan = with_null_roles(make_plan(make_topology(case, Path(name))), case.http)
        with prepare(plan), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            series = runner.run(conduct(plan, samples, every_s, until))
        count = int(Samples(plan.run_folder).look())
    return rows_of(series, ROLES), count


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the table; the exit code is 1 if anything grows."""
    parser = argparse.ArgumentParser(description="Does anything grow in the data plane?")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=CASE.response_tokens, help="of each response")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end then, with the samples so far")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    case = dataclasses.replace(CASE, response_tokens=arguments.tokens)
    rows, count = soak(case, arguments.samples, arguments.every, began + 60 * arguments.minutes)
    print(f"{table(rows)}\n{count:,} samples in {time.monotonic() - began:.0f} s")
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 1 if any(row.grows for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
