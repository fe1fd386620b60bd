"""Whole runs on hosts of a lab, with a clock beside them: how soon they begin, and how soon they are back.

    python tests/cluster [--hosts 1 2 4] [--losses 3] [--json FILE]

    launch    from `python -m opd_async.launch` on the first of N hosts, an agent on each other, to the first step
    loss      of the student engine's host, for `--losses` times: cut off for good, given up, back a second later; until
              ten seconds begin that are as fast as 90 % of those before (the run waits: no other host has an engine)

Needs root (`lab.py`). All hosts share this machine's processors: with many of them that is what is measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent), str(HERE.parents[1])]

from cluster_run import FENCE_S, LOST_S, ClusterRun, settings  # noqa: E402
from harness import make_inputs, steps  # noqa: E402
from lab import Lab, until  # noqa: E402

FULL, WINDOW_S = 0.9, 10.0
STUDENT = "h1"


def trained(at: Path, since: float, until_s: float) -> float:
    """Tokens a second between two times of day; a step's tokens count when it is done."""
    return sum(row["tokens"] for row in steps(at) if since < row["time"] <= until_s) / (until_s - since)


def launch(inputs: Path, folder: Path, count: int) -> float:
    """Seconds to the first step on `count` hosts, each with a student engine but the learner's and the teacher's."""
    values = settings(inputs, folder, count, schedule__steps=2)
    engines = max(1, count - 2)
    values["engines"]["student"]["replicas"] = engines
    values["rollout"]["replicas"] = engines
    if count < 3:
        values["cluster"]["slots_per_node"] = 4
    if count == 1:
        del values["cluster"]
    with Lab([f"h{number}" for number in range(count)]) as lab:
        began = time.time()
        run = ClusterRun(lab, folder, values)
        run.wait_for_steps(folder / "run", 1)
        found = float(steps(folder / "run")[0]["time"]) - began
        assert run.end() == 0, run.said()
    return found


def losses(inputs: Path, folder: Path, count: int) -> list[tuple[float, float]]:
    """(until the host was given up, until the run was as fast as before) in seconds from each loss."""
    values, found = settings(inputs, folder, 3, schedule__steps=100_000), []
    with Lab(("h0", "h1", "h2")) as lab:
        run, at = ClusterRun(lab, folder, values), folder / "run"
        for number in range(count):
            run.wait_for_steps(at, len(steps(at)) + 1)
            time.sleep(3 * WINDOW_S)
            lost = time.time()
            before = trained(at, lost - 2 * WINDOW_S, lost)
            lab[STUDENT].cut()
            until(lambda n=number: run.said().count(f"{STUDENT} is lost") > n, run.said, LOST_S + 30)
            given_up = time.time() - lost
            time.sleep(1.0)
            lab[STUDENT].heal()
            found.append((given_up, back(run, at, lost + given_up, before) - lost))
        lab["h0"].signal("opd_async.launch", signal.SIGINT)
        run.end()
    return found


def back(run: ClusterRun, at: Path, since: float, before: float) -> float:
    """When the first window begins, behind `since`, in which the run is as fast as it was."""
    while True:
        done = [row["time"] for row in steps(at)]
        for began in (time_ for time_ in done if since < time_ <= done[-1] - WINDOW_S):
            if trained(at, began, began + WINDOW_S) >= FULL * before:
                return float(began)
        run.wait_for_steps(at, len(done) + 1)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python tests/cluster", description="Runs on several hosts, timed.")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--losses", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        inputs = make_inputs(root / "inputs")
        starts: dict[int, float] = {}
        print("| hosts | launch to first step, s |\n|---:|---:|")
        for count in options.hosts:
            (folder := root / f"launch-{count}").mkdir()
            starts[count] = launch(inputs, folder, count)
            print(f"| {count} | {starts[count]:.1f} |", flush=True)
        (folder := root / "losses").mkdir()
        found = losses(inputs, folder, options.losses) if options.losses else []
    print(f"\nfence_s {FENCE_S:g}, lost_s {LOST_S:g}\n")
    print("| loss | given up after, s | as fast as before, s |\n|---:|---:|---:|")
    for number, (given_up, full) in enumerate(found, 1):
        print(f"| {number} | {given_up:.1f} | {full:.1f} |")
    if options.json is not None:
        options.json.write_text(json.dumps({"launch_s": starts, "losses_s": found}, indent=2))


if __name__ == "__main__":
    main()
