"""A real pair here and in TRL: the distance to the teacher over tokens and processor seconds, and memory.

    python -m bench.real [--topology examples/smollm2/smollm2.yaml] [--python .venv-trl/bin/python]
                         [--own opd.loss=sampled_reverse_kl] [--trl beta=0.5] [--seeds 0] [--steps 16] [--every-steps 8]
                         [--prompts 96] [--measured-tokens 64] [--set rollout.sampling.max_response_tokens=512]
                         [--json FILE]

    topology -> this project's launcher --+-> students after every few steps -> exact KL to the teacher -> table
             -> TRL's trainer ------------+-> processor seconds and memory of all processes

Both sides train in turns on the same cores, from the same folders, on the same prompts, with the same optimizer. A step
of TRL has as many responses as fill `tokens_per_step` at the limit of their length (`--trl batch=N`: another number).
Seconds run from the first step to the one whose student is measured; loading and measuring are outside. Processor time
has the writing of students in it, on both sides. `make smollm2` makes the pair, `make peers` TRL's environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd_async.bench.peers import sides
from opd_async.bench.peers.__main__ import OWN, TRL, Setup, say
from opd_async.bench.peers.curves import Tick
from opd_async.bench.peers.usage import cpu_between, peak_memory
from opd_async.bench.real import distance
from opd_async.bench.real.curves import Curve, Point, means, read_curve, table
from opd_async.bench.real.distance import Distance
from opd_async.config.evaluating import HELD_OUT
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.end_tokens import end_ids
from opd_async.data.prompts import load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.files import checksum, write_atomically


class Judge:
    """The held-out prompts of a topology and its teacher."""

    def __init__(self, topology: Topology, prompts: int, most_tokens: int | None) -> None:
        assert topology.models.teacher is not None
        held_out = topology.evaluation_sets[HELD_OUT]
        tokenizer = Tokenizer(topology.models.student.path, topology.data.chat_template)
        rows = load_prompts(held_out.data, tokenizer, held_out.max_prompt_tokens).prompts
        self._prompts = [row.token_ids for row in rows[:prompts]]
        self._ends = end_ids(topology.models.student.path)
        self._teacher = distance.load(topology.models.teacher.path)
        self._most = most_tokens or topology.rollout.sampling.max_response_tokens

    def __call__(self, folder: Path) -> Distance:
        """Measure the student in `folder`."""
        return distance.measure(distance.load(folder), self._teacher, self._prompts, self._ends, self._most)


def run(options: argparse.Namespace, folder: Path) -> list[Curve]:
    """Train every setup with every seed, one after the other; the students of each are measured before the next."""
    setups = [*(Setup.read(OWN, one) for one in options.own), *(Setup.read(TRL, one) for one in options.trl)]
    topology = load_topology(options.topology, options.set)
    judge = Judge(topology, options.prompts, options.measured_tokens)
    before = Point(step=0, tokens=0.0, seconds=0.0, cpu_s=0.0, found=judge(topology.models.student.path))
    say(f"measured the student as it is given: {before.found.reverse_kl:.4f}")
    curves: list[Curve] = []
    folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for setup in setups:
            run_folder = folder / f"seed{seed}-{key(setup, seed, options)}"
            file = run_folder.with_suffix(".json")
            if not file.exists():
                say(f"seed {seed}: {setup.system} {setup.name}")
                shutil.rmtree(run_folder, ignore_errors=True)  # what an interrupted run has left
                found = _measured(setup, seed, train(setup, seed, run_folder, options), before, judge)
                write_atomically(file, json.dumps(dataclasses.asdict(found)).encode())
                # nobody goes on from it, and those of all cells fill a disk: 16 bytes a weight each
                shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
                say(table([found]).splitlines()[-1])
            curves.append(read_curve(file))
    return curves


def key(setup: Setup, seed: int, options: argparse.Namespace) -> str:
    """What a run's files are called: alike for everything that it depends on."""
    given = [setup.system, setup.settings, seed, options.topology, options.set, options.steps, options.every_steps]
    return checksum(json.dumps([*given, options.prompts, options.measured_tokens], default=str).encode()).hex()[:8]


def _measured(setup: Setup, seed: int, outcome: sides.Outcome, before: Point, judge: Judge) -> Curve:
    points = [_point(outcome, tick, judge) for tick in outcome.ticks if tick.step in outcome.students]
    return Curve(
        system=setup.system,
        settings=setup.name,
        seed=seed,
        memory=peak_memory(outcome.usage),
        age=outcome.age,
        points=(before, *points),
    )


def _point(outcome: sides.Outcome, tick: Tick, judge: Judge) -> Point:
    began = outcome.ticks[0].time - outcome.ticks[0].seconds
    cpu_s = cpu_between(outcome.usage, began, tick.time)
    found = judge(outcome.students[tick.step])
    return Point(step=tick.step, tokens=tick.tokens, seconds=tick.seconds, cpu_s=cpu_s, found=found)


def train(setup: Setup, seed: int, folder: Path, options: argparse.Namespace) -> sides.Outcome:
    """Train one setup with one seed in `folder`."""
    common = [f"seed={seed}", f"schedule.steps={options.steps}", *options.set]
    if setup.system == OWN:
        overrides = [*common, *(one for one in setup.settings.split(",") if one)]
        return sides.run_own(options.topology, overrides, folder, options.every_steps)
    topology = load_topology(options.topology, common)
    whole = {"batch": batch_of(topology), "limit_s": sides.DEADLINE_S}
    job = sides.trl_job(topology, folder, options.every_steps, whole | sides.parse_settings(setup.settings))
    return sides.run_trl(options.python, job)


def batch_of(topology: Topology) -> int:
    """Responses that fill a step's budget at the limit of their length."""
    return max(topology.schedule.tokens_per_step // topology.rollout.sampling.max_response_tokens, 1)


def report(options: argparse.Namespace, curves: Sequence[Curve]) -> dict[str, Any]:
    """What `--json` writes: the options and every point."""
    kept = ("steps", "every_steps", "prompts", "measured_tokens", "seeds", "set", "own", "trl")
    said = {name: getattr(options, name) for name in kept} | {"topology": str(options.topology)}
    return {"options": said, "curves": [dataclasses.asdict(one) for one in curves]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures where the options say."""
    parser = argparse.ArgumentParser(prog="python -m bench.real", description="A real pair, here and in TRL.")
    parser.add_argument("--topology", type=Path, default=Path("examples/smollm2/smollm2.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for both sides")
    parser.add_argument("--python", type=Path, default=Path(".venv-trl/bin/python"), help="of TRL's environment")
    parser.add_argument("--own", action="append", default=[], metavar="A.B=C,...", help="a row of this project")
    parser.add_argument("--trl", action="append", default=[], metavar="A=B,...", help="a row of TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--every-steps", type=int, default=8, help="a student is measured every so many steps")
    parser.add_argument("--prompts", type=int, default=96, help="held-out prompts to measure on")
    parser.add_argument("--measured-tokens", type=int, help="of a response that is measured (the run's limit)")
    parser.add_argument("--folder", type=Path, help="keep here what was trained and measured")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    if not options.own and not options.trl:
        options.own, options.trl = [""], [""]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        curves = run(options, (options.folder or Path(name)).absolute())
    print(table(curves))
    if len(options.seeds) > 1:
        print(f"\n{means(curves)}")
    if options.json is not None:
        write_atomically(options.json, json.dumps(report(options, curves), indent=2).encode())


if __name__ == "__main__":
    main()
