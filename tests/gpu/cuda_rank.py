"""One learner rank on a GPU that is not there: `python cuda_rank.py CASES.json OUT.json`, `cuda_guard.so` preloaded.

Cases of one process share the world and this rank's place in it; each builds a trainer and takes two steps.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pretend_cuda


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a rank is told."""

    name: str
    model: str
    """A folder with a `config.json`; no weights are read."""
    rank: int = 0
    world: int = 1
    parallel: dict[str, int] = field(default_factory=dict)
    """Fields of `ParallelConfig`."""
    dtype: str = "bfloat16"
    loss: dict[str, Any] = field(default_factory=dict)
    """Fields of `LossConfig`."""
    topk: int = 0
    recompute: bool | str = False
    teacher: str | None = None
    offload: bool = False
    reference: str | None = None
    critic: str | None = None
    micro_batches: int = 2
    sequences: int = 3
    length: int = 64
    chunk_rows: int = 1024
    kernels: str = "auto"
    packages: tuple[str, ...] = ()
    """Of `stand_in_kernels.PACKAGES`, what is installed."""
    like: str = ""
    """The case whose accepted costs this one has; "": it has its own."""
    old_varlen: bool = False
    """Whether `varlen_attn` has the parameters of torch 2.11, which knows no `enable_gqa`."""
    weights: bool = False
    """Whether the weights are gathered and bucketed after the steps."""
    state: bool = False
    """Whether a checkpoint's state is made after the steps."""


@dataclass(slots=True, kw_only=True)
class Found:
    """What was seen of a case; bytes and counts are those of its second step."""

    name: str
    error: str = ""
    kernels: str = ""
    """Whose they are, as the log has it."""
    built_bytes: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0
    peak_at: str = ""
    operations: int = 0
    operation_bytes: int = 0
    bytes_by: dict[str, int] = field(default_factory=dict)
    """By operation."""
    flops: int = 0
    attention_flops: int = 0
    """Those of `flops` that are attention's, counted as if every token saw its whole sequence."""
    syncs: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    """Of what was asked: "what device dtype", each once."""
    tensors: int = 0
    """How many Hugging Face tensors the weights were."""
    state: int = 0
    """How many sharded tensors a checkpoint would have."""


def main() -> None:
    """Run the cases of a file, each in what is left of the ones before it; write what was found."""
    cases = [Case(**case) for case in json.loads(Path(sys.argv[1]).read_text())]
    first = cases[0]
    assert all((case.rank, case.world) == (first.rank, first.world) for case in cases)
    os.environ.update(RANK=str(first.rank), WORLD_SIZE=str(first.world), LOCAL_RANK="0")
    pretend_cuda.install(first.rank, first.world)
    from fake_steps import run_case

    found = []
    for case in cases:
        try:
            found.append(run_case(case))
        except Exception:  # the report says where; the other cases still run
            found.append(Found(name=case.name, error=traceback.format_exc()))
    Path(sys.argv[2]).write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
