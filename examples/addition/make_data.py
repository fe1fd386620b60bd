"""Write the addition data: `python examples/addition/make_data.py [--out DIR] [--train N] [--parquet]`.

    problems (task.py) -> DIR/train.jsonl, DIR/held_out.jsonl  [-> the same as .parquet]

No problem is in both files. The same arguments give the same bytes, and a file appears only when it is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from task import DIGITS, Problem, draw, held_out_problems


def write_jsonl(path: Path, problems: Sequence[Problem]) -> None:
    """Write one row a line, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(problem.row()) + "\n" for problem in problems)
    partial.replace(path)


def write_parquet(path: Path, problems: Sequence[Problem]) -> None:
    """Write columns prompt (string), label (string) and metadata (struct of two int64), atomically."""
    # pyarrow takes longer to import than the whole default run, which does not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist([problem.row() for problem in problems]), partial)
    partial.replace(path)


def write_data(out: Path, *, seed: int, train: int, held_out: int, parquet: bool, digits: int = DIGITS) -> list[Path]:
    """Write both splits under `out` and return the files; ValueError when a split is asked for too many problems."""
    splits = {
        "train": draw(train, seed=seed, held_out=False, digits=digits),
        "held_out": held_out_problems(held_out, digits),
    }
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, problems in splits.items():
        written.append(out / f"{name}.jsonl")
        write_jsonl(written[-1], problems)
        if parquet:
            written.append(out / f"{name}.parquet")
            write_parquet(written[-1], problems)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, write the files, print their names; 2 when the arguments cannot be met."""
    parser = argparse.ArgumentParser(description="Write the addition task's prompts.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="directory to write to")
    parser.add_argument("--seed", type=int, default=0, help="draws the training prompts; the held-out ones are fixed")
    parser.add_argument("--train", type=int, default=60_000, help="training prompts, all different")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out prompts, all different")
    parser.add_argument("--digits", type=int, default=DIGITS, help="digits of each number")
    parser.add_argument("--parquet", action="store_true", help="write .parquet files too")
    args = parser.parse_args(argv)
    sizes = {"train": args.train, "held_out": args.held_out, "digits": args.digits}
    try:
        files = write_data(args.out, seed=args.seed, parquet=args.parquet, **sizes)
    except ValueError as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
