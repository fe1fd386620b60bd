"""What it costs to go back to a checkpoint, against the number of steps before it.

    python -m bench.resume [--steps 10,1000,100000] [--ranges 64] [--json FILE]

    a run's folder as so many steps leave it -> frontier, trained.jsonl, metrics.jsonl read and cut as a start does

The folder is made with the run's own writers: `--ranges` ranges a step, a row of metrics for each, and ten steps behind
the checkpoint, which are lost. Weights are left out: their time depends on the model alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_async.config.topology import Topology
from opd_async.files import write_atomically
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan
from opd_async.run import checkpoints
from opd_async.run.books import Books
from opd_async.run.ledger import Ledger
from opd_async.run.trained import FILE_NAME, Ranges, TrainedRecord
from opd_async.scheduling import frontier
from opd_async.transport.messages import Frontier, StepStarted

LOST = 10
"""Steps behind the checkpoint."""
RESPONSE = 700
"""Tokens of a range."""
STAGES = ("learner_gradient_norm", "learner_ratio_std", "learner_reverse_kl", "learner_seconds", "learner_idle_s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One folder: sizes in bytes for a step, seconds of each part of a start."""

    steps: int
    trained_bytes: float
    """Of trained.jsonl, for a step."""
    text_bytes: float
    """The same ranges as numbers in JSON, as the file had them before."""
    metrics_bytes: float
    frontier_s: float
    trained_s: float
    ledger_s: float
    total_s: float


def ranges_of(step: int, count: int) -> Ranges:
    """What a step trains here: `count` samples, an eighth of them cut in two by the bound."""
    samples = step * count + np.arange(count)
    start = np.where(np.arange(count) % 8 == 7, RESPONSE, 0)
    ends = start + RESPONSE + (samples * 37) % 512
    newest = np.full(count, step)
    return np.stack((samples, start, ends, np.maximum(newest - samples % 2, 0), newest), axis=1).astype(np.int64)


def make_run(plan: Plan, steps: int, count: int) -> Path:
    """Write the folder of a run that has a checkpoint at `steps` and was killed some steps later; the checkpoint."""
    root = plan.run_folder / "checkpoints"
    checkpoint = checkpoints.step_folder(root, steps)
    checkpoint.mkdir(parents=True)
    trained, ledger = TrainedRecord(plan.run_folder, print, 0, None), Ledger(plan=plan, complain=print)
    ledger.rewind(0)
    for step in range(steps + LOST):
        if step == steps:
            partial = np.arange(steps * count, steps * count + count)
            state = Frontier(
                steps,
                np.array([[0, steps * count]], np.int64),
                partial.astype(np.int64),
                np.full(count, RESPONSE, np.int32),
                np.zeros(count * RESPONSE, np.int32),
            )
            frontier.save(state, checkpoint)
            trained.save(checkpoint)
            ledger.save(checkpoint)
            checkpoints.seal(checkpoint, steps)
        trained.write(step, ranges_of(step, count))
        ledger.step(_started(step, count), dict.fromkeys(STAGES, step / 7.0), 0.1, 0.2)
    trained.close()
    ledger.close()
    return checkpoint


def _started(step: int, count: int) -> StepStarted:
    nothing, none = np.zeros(0, np.int64), np.zeros(0, np.int32)
    columns = ("tokens", "completed", "cuts", "forwarded_tokens", "recomputed_tokens", "prompts", "micro_batches")
    return StepStarted(
        version=step,
        waited_s=0.0,
        stats=dict.fromkeys(columns, float(count)),
        staleness_counts=np.array([count, count]),
        taken_ids=nothing,
        taken_ends=none,
        taken_complete=none,
    )


def go_back(plan: Plan) -> tuple[dict[str, float], Books]:
    """Do what intake and launcher do at a start; seconds of each part, and the books that the run goes on with."""
    began = time.perf_counter()
    found = checkpoints.newest(plan.run_folder / "checkpoints")
    assert found.folder is not None
    state = frontier.load(found.folder)
    frontier.restore(state)
    restored = time.perf_counter()
    TrainedRecord(plan.run_folder, print, state.version, found.folder).close()
    cut = time.perf_counter()
    ledger = Ledger(plan=plan, complain=print)
    ledger.rewind(found.step, found.folder)
    done = time.perf_counter()
    ledger.close()
    seconds = {"frontier_s": restored - began, "trained_s": cut - restored, "ledger_s": done - cut}
    return seconds | {"total_s": done - began}, ledger.books


def _model(folder: Path) -> Path:
    """A model folder of which only the shape is asked."""
    (folder / "model").mkdir(exist_ok=True)
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    config = {"model_type": "qwen3", "vocab_size": 256, "max_position_embeddings": 4096, **dict.fromkeys(names, 8)}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder / "model"


def measure(folder: Path, steps: int, count: int) -> Row:
    """Make a run of so many steps in `folder`, and go back to its checkpoint once."""
    topology = Topology.model_validate(
        {
            "name": f"steps-{steps}",
            "run_dir": str(folder),
            "models": {side: {"path": str(_model(folder))} for side in ("student", "teacher")},
            "data": {"train": {"path": str(folder / "none.jsonl")}},
            "schedule": {"steps": steps + LOST},
        }
    )
    plan = make_plan(topology)
    make_run(plan, steps, count)
    text = sum(
        len(json.dumps({"version": step, "ranges": ranges_of(step, count).tolist()})) + 1
        for step in (0, steps // 2, steps + LOST - 1)
    )
    sizes = {name: (plan.run_folder / name).stat().st_size / (steps + LOST) for name in (FILE_NAME, "metrics.jsonl")}
    seconds, books = go_back(plan)
    if books.whole.steps != steps:
        raise RuntimeError(f"the books have {books.whole.steps} steps, not {steps}")
    return Row(
        steps=steps,
        trained_bytes=sizes[FILE_NAME],
        text_bytes=text / 3,
        metrics_bytes=sizes["metrics.jsonl"],
        **seconds,
    )


def table(rows: Sequence[Row]) -> str:
    """A line for each number of steps."""
    head = f"{'steps':>8}  {'trained.jsonl':>13}  {'as text':>8}  {'metrics.jsonl':>13}  "
    lines = [head + f"{'frontier':>9}  {'trained':>8}  {'ledger':>8}  {'together':>9}"]
    for row in rows:
        times = "  ".join(
            f"{1000 * seconds:>{width}.1f}"
            for seconds, width in ((row.frontier_s, 9), (row.trained_s, 8), (row.ledger_s, 8), (row.total_s, 9))
        )
        sizes = f"{row.trained_bytes:>13.0f}  {row.text_bytes:>8.0f}  {row.metrics_bytes:>13.0f}"
        lines.append(f"{row.steps:>8}  {sizes}  {times}")
    return "\n".join([*lines, "bytes for a step; milliseconds"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON where asked for."""
    parser = argparse.ArgumentParser(description="What it costs to go back to a checkpoint.")
    parser.add_argument("--steps", default="10,1000,100000", help="numbers of steps, with commas between them")
    parser.add_argument("--ranges", type=int, default=64, help="ranges that a step trains")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), int(steps), arguments.ranges) for steps in arguments.steps.split(",")]
    print(table(rows))
    if arguments.json is not None:
        values: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
        write_atomically(arguments.json, json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
