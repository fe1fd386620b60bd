"""What is learnt at equal steps and prompts: SFT on teacher samples, GRPO, OPD; and which signal bears staleness.

    python -m bench.learning [--part rates|methods|regimes|staleness|rules|shown] [--seeds 3] [--lr 1e-3] [--only NAME]
                             [--json FILE] [--plot FILE]

    part -> cells -> a run of the launcher each -> its folder -> Outcome -> table, JSON, picture

A cell that has been run is read, not run again: a comparison that was interrupted goes on where it stopped, and
`--limit 0` only prints. The parts take from 20 minutes (rates) to 2 hours (staleness, three seeds) on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_async.bench.learning.cells import PARTS, REGIMES, Cell
from opd_async.bench.learning.inputs import make_inputs
from opd_async.bench.learning.plots import draw
from opd_async.bench.learning.runs import Outcome, outcome, run
from opd_async.bench.learning.tables import table
from opd_async.files import write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print and write everything; 1 if a run failed."""
    parser = argparse.ArgumentParser(description="What is learnt at equal optimizer steps and prompts.")
    parser.add_argument("--part", choices=sorted(PARTS), default="methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="run at most so many cells now")
    parser.add_argument("--only", default="", help="only cells with this in their names")
    parser.add_argument("--lr", type=float, help="this learning rate instead of each cell's own")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="folder of the runs and their inputs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) to this file")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    cells = at_rate(PARTS[options.part](options.seeds), options.lr)
    cells = [cell for cell in cells if options.only in cell.name]
    missing = [cell for cell in cells if outcome(cell, out) is None]
    failed = [cell for cell in missing[: options.limit] if not measure(cell, out)]
    found = [each for cell in cells if (each := outcome(cell, out)) is not None]
    print(table(options.part, found), flush=True)
    if len(found) < len(cells):
        print(f"{len(cells) - len(found)} of {len(cells)} runs are missing")
    if options.json is not None:
        write_atomically(options.json, as_json(options.part, found))
    if options.plot is not None and found:
        draw(options.plot, options.part, found)
    return 1 if failed else 0


def at_rate(cells: Sequence[Cell], lr: float | None) -> list[Cell]:
    """The cells with another learning rate, those that are the same then once; `None` changes nothing."""
    return list(cells) if lr is None else list(dict.fromkeys(dataclasses.replace(cell, lr=lr) for cell in cells))


def measure(cell: Cell, out: Path) -> bool:
    """Make a cell's inputs and run it; whether that went well. What went wrong is printed."""
    print(f"running {cell.name}", file=sys.stderr, flush=True)
    inputs = make_inputs(REGIMES[cell.regime], out / "inputs", given=cell.how.given, inside=cell.how.teacher_inside)
    try:
        run(cell, inputs, out)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return False
    return True


def as_json(part: str, found: Sequence[Outcome]) -> bytes:
    """The figures of every run."""
    return json.dumps({"part": part, "runs": [dataclasses.asdict(each) for each in found]}, indent=2).encode()


if __name__ == "__main__":
    sys.exit(main())
