"""Where the learner's memory goes, on a model of the user's own: phase by phase, against what `--plan` counts.

    python -m bench.memory MODEL [--tokens 512] [--steps 3] [--json FILE]
    torchrun --nproc-per-node 2 -m bench.memory MODEL       a data-parallel rank of several: the first one's figures

    phase         what it adds
    libraries     Python, torch, Megatron-core
    model         weights, and a gradient for each
    first step    AdamW's two moments, and activations for a while
    step          activations for a while
    checkpoint    nothing that stays

MODEL is a Hugging Face folder; random tokens stand for prompts and responses. Figures are resident memory of this one
process (`VmHWM`, reset before each phase), on the CPU in float32. Where memory stays resident between phases although
no tensor holds it, the C library has kept it for its next allocations; `held by tensors` counts without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from opd_async.bench.learner import status_bytes
from opd_async.config.topology import LearnerSection
from opd_async.files import write_atomically
from opd_async.forecast.cost_model import read_decoder
from opd_async.forecast.devices import H100
from opd_async.forecast.memory import learner_memory
from opd_async.learner import resume
from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.trainer import Trainer
from opd_async.plan.free_ports import free_ports
from opd_async.transport.step_batch import MicroBatch, StepBatch

MIB = 1 << 20
LENGTH, PROMPT = 128, 16
"""Tokens of every sequence, and how many of them are prompt."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Resident MiB before it, at its highest and afterwards, and MiB of all tensors afterwards."""

    name: str
    before: float
    peak: float
    after: float
    tensors: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured, and what `--plan` counts for the same model and micro-batch; MiB but for `weights`."""

    weights: int
    checkpoint_mib: float
    planned_states_mib: float
    """Weights, gradients and optimizer."""
    planned_activations_mib: float
    phases: tuple[Phase, ...]


def tensor_bytes() -> int:
    """Bytes of all tensors that live, each storage counted once."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


def batch_of(tokens: int, vocab: int) -> MicroBatch:
    """About `tokens` random tokens in sequences of `LENGTH`."""
    count, generator = max(1, tokens // LENGTH), np.random.default_rng(0)
    rows = np.concatenate([np.arange(LENGTH * n + PROMPT - 1, LENGTH * (n + 1) - 1) for n in range(count)])
    logprobs = -3.0 - generator.random(len(rows)).astype(np.float32)
    return MicroBatch(
        token_ids=generator.integers(0, vocab, count * LENGTH).astype(np.int32),
        cu_seqlens=(LENGTH * np.arange(count + 1)).astype(np.int32),
        rows=rows.astype(np.int32),
        behaviour_logprobs=logprobs,
        teacher_logprobs=logprobs - 0.1,
        advantages=np.zeros(len(rows), np.float32),
        staleness=np.zeros(len(rows), np.int32),
    )


@contextmanager
def _ranks() -> Iterator[Path]:
    """One rank, in this process, or this one of torchrun's; yields a folder that all of them have."""
    if "RANK" not in os.environ:
        [port] = free_ports("127.0.0.1", 1)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel.start(ParallelConfig(), seed=0)
    try:
        with tempfile.TemporaryDirectory() as name:
            shared = [name]
            dist.broadcast_object_list(shared, device=torch.device("cpu"))
            yield Path(shared[0])
            dist.barrier()
    finally:
        parallel.stop()


def measure(folder: Path, tokens: int, steps: int) -> Report:
    """Load, step and save; every phase once, and `step` for the last of `steps`."""
    began = status_bytes("VmRSS") / MIB
    phases = [Phase("libraries", 0.0, began, began, 0.0)]

    def phase(name: str, work: Callable[[], object]) -> None:
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's name for: reset VmHWM
        work()
        peak, after = status_bytes("VmHWM"), status_bytes("VmRSS")
        phases.append(Phase(name, before / MIB, peak / MIB, after / MIB, tensor_bytes() / MIB))

    made: list[Trainer] = []
    with _ranks() as place:
        phase("model", lambda: made.append(Trainer(LearnerConfig(model_path=folder))))
        (trainer,) = made
        batch = batch_of(tokens, trainer.shape.vocab)

        ranks = dist.get_world_size()

        def step() -> object:
            return trainer.step(StepBatch(trainer.version, ranks * len(batch.rows), (batch,)))

        phase("first step", step)
        for _ in range(steps - 2):
            step()
        phase("step", step)
        out = place / "checkpoint"
        phase("checkpoint", lambda: resume.save(trainer, out))
        written = sum(file.stat().st_size for file in out.iterdir())
    section = LearnerSection(micro_batch_tokens=len(batch.token_ids), bucket_mib=16, data_parallel=ranks)
    plan = learner_memory(read_decoder(folder), H100, section, LENGTH)
    return Report(
        weights=sum(parameter.numel() for parameter in trainer.model.parameters()),
        checkpoint_mib=written / MIB,
        planned_states_mib=(plan.weights + plan.optimizer) / MIB,
        planned_activations_mib=plan.activations / MIB,
        phases=tuple(phases),
    )


def table(report: Report) -> str:
    """The figures as text."""
    lines = [f"{'MiB':<12} {'before':>8} {'peak':>8} {'after':>8} {'held by tensors':>16}"]
    for one in report.phases:
        lines.append(f"{one.name:<12} {one.before:>8,.0f} {one.peak:>8,.0f} {one.after:>8,.0f} {one.tensors:>16,.0f}")
    by_name = {one.name: one for one in report.phases}
    grown = by_name["step"].peak - by_name["libraries"].after
    saving = by_name["checkpoint"].peak - by_name["checkpoint"].before
    return "\n".join(
        [
            *lines,
            "",
            f"{report.weights:,} weights; --plan: {report.planned_states_mib:,.0f} MiB of weights, gradients and "
            f"optimizer, {report.planned_activations_mib:,.0f} of activations",
            f"a step at its highest: {(grown - report.planned_activations_mib) * MIB / report.weights:.1f} bytes a "
            "weight beside those activations and the libraries",
            f"a checkpoint of {report.checkpoint_mib:,.0f} MiB adds {saving:,.0f} MiB while it is written: "
            f"{saving / report.checkpoint_mib:.1%}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures where `--json` says."""
    parser = argparse.ArgumentParser(description="Where the learner's memory goes.")
    parser.add_argument("model", type=Path, help="Hugging Face folder of a student")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a micro-batch, which is the whole step")
    parser.add_argument("--steps", type=int, default=3, help="steps before the checkpoint, at least 2")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    report = measure(options.model, options.tokens, max(2, options.steps))
    if os.environ["RANK"] != "0":
        return
    print(table(report))
    if options.json is not None:
        write_atomically(options.json, json.dumps(dataclasses.asdict(report), indent=2).encode())


if __name__ == "__main__":
    main()
