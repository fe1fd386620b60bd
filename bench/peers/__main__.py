"""Seconds and tokens to the same held-out pass@1: this project against TRL's on-policy distillation.

    python -m bench.peers [--topology examples/quickstart.yaml] [--python .venv-trl/bin/python]
                          [--own opd.loss=jsd_topk,opd.topk=8] [--trl beta=0.5,threads=1] [--seeds 0 1] [--steps 100]
                          [--json FILE] [--plot FILE]

    topology -> this project's launcher --+-> students after every few steps -> one evaluation for all -> table
             -> TRL's trainer ------------+

Both sides train in turns on the same cores, from the same folders, on the same prompts, with as many responses a step
and the same optimizer. The clock runs from the first step to the one whose student is evaluated. Loading is outside,
and so is evaluation, which happens when everything is trained. Writing students counts for this project, not for TRL.
`--own` and `--trl` may be given several times, each for a row, with a name for it in front: `--own "top-k: A.B=C"`.
`make peers` creates TRL's environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd_async.bench.peers import sides
from opd_async.bench.peers.curves import Curve, Point, summarize
from opd_async.bench.peers.output import draw, table
from opd_async.bench.peers.passes import Task, measure
from opd_async.config.evaluating import HELD_OUT
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.answers import AnswerChecker
from opd_async.data.prompts import load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.files import write_atomically

TARGETS = (0.8, 0.9, 0.95)
OWN, TRL = "opd_async", "TRL"


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """One system with one set of settings; `name` is what table and picture call them."""

    system: str
    name: str
    settings: str

    @classmethod
    def read(cls, system: str, text: str) -> Setup:
        """From `A.B=C,D=E` or `NAME: A.B=C,D=E`."""
        head, colon, rest = text.partition(":")
        if colon and "=" not in head:
            return cls(system, head.strip(), rest.strip())
        return cls(system, text, text)


def task_of(topology: Topology) -> Task:
    """The held-out prompts of `topology`, up to its number, and what it takes for an answer."""
    held_out = topology.evaluation_sets[HELD_OUT]
    tokenizer = Tokenizer(topology.models.student.path, topology.data.chat_template)
    prompts = load_prompts(held_out.data, tokenizer, held_out.max_prompt_tokens).prompts
    return Task(
        prompts[: held_out.prompts],
        tokenizer,
        AnswerChecker(held_out.answer_pattern),
        topology.rollout.sampling.max_response_tokens,
    )


def run(options: argparse.Namespace, folder: Path) -> list[Curve]:
    """Train every setup with every seed, one after the other, then evaluate all students."""
    setups = [*(Setup.read(OWN, one) for one in options.own), *(Setup.read(TRL, one) for one in options.trl)]
    outcomes = []
    for seed in options.seeds:
        for number, setup in enumerate(setups):
            say(f"seed {seed}: {setup.system} {setup.name}")
            outcomes.append((setup, seed, _train(setup, seed, folder / f"seed{seed}-{number}", options)))
    say("everything is trained; evaluating")
    topology = load_topology(options.topology, options.set)
    task = task_of(topology)
    before = measure(topology.models.student.path, task, options.samples)
    curves = []
    for setup, seed, outcome in outcomes:
        points = [Point(0, 0.0, 0.0, before.sampled, before.greedy)]
        for tick in outcome.ticks:
            if tick.step in outcome.students:
                passed = measure(outcome.students[tick.step], task, options.samples)
                points.append(Point(tick.step, tick.seconds, tick.tokens, passed.sampled, passed.greedy))
        curves.append(Curve(setup.system, setup.name, seed, tuple(points)))
        say(f"evaluated {setup.system} {setup.name}, seed {seed}: {points[-1].sampled:.1%}")
    return curves


def _train(setup: Setup, seed: int, folder: Path, options: argparse.Namespace) -> sides.Outcome:
    common = [f"seed={seed}", f"schedule.steps={options.steps}", *options.set]
    if setup.system == OWN:
        overrides = [*common, *(one for one in setup.settings.split(",") if one)]
        return sides.run_own(options.topology, overrides, folder, options.every_steps)
    topology = load_topology(options.topology, common)
    job = sides.trl_job(topology, folder, options.every_steps, sides.parse_settings(setup.settings))
    return sides.run_trl(options.python, job)


def say(line: str) -> None:
    """Progress, on stderr: stdout has the table."""
    print(line, file=sys.stderr, flush=True)


def report(options: argparse.Namespace, curves: Sequence[Curve]) -> dict[str, Any]:
    """What `--json` writes: options, every curve with all its points, and the summaries."""
    kept = ("steps", "every_steps", "samples", "seeds", "set", "own", "trl")
    return {
        "options": {name: getattr(options, name) for name in kept} | {"topology": str(options.topology)},
        "summaries": [dataclasses.asdict(one) for one in summarize(curves, TARGETS)],
        "curves": [dataclasses.asdict(one) for one in curves],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write figures and picture where the options say."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Against TRL's on-policy distillation.")
    parser.add_argument("--topology", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for both sides")
    parser.add_argument("--python", type=Path, default=Path(".venv-trl/bin/python"), help="of TRL's environment")
    parser.add_argument("--own", action="append", default=[], metavar="A.B=C,...", help="a row of this project")
    parser.add_argument("--trl", action="append", default=[], metavar="A=B,...", help="a row of TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every-steps", type=int, default=5, help="a student is evaluated every so many steps")
    parser.add_argument("--samples", type=int, default=4, help="sampled responses for each held-out prompt")
    parser.add_argument("--folder", type=Path, help="keep everything that was trained here")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw pass@1 over seconds and tokens into this file")
    options = parser.parse_args(arguments)
    if not options.own and not options.trl:
        options.own, options.trl = [""], [""]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        curves = run(options, (options.folder or Path(name)).absolute())
    print(table(summarize(curves, TARGETS), TARGETS))
    if options.json is not None:
        write_atomically(options.json, json.dumps(report(options, curves), indent=2).encode())
    if options.plot is not None:
        draw(options.plot, curves, TARGETS)


if __name__ == "__main__":
    main()
