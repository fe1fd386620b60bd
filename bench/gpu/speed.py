"""What the learner makes of a GPU: tokens a second, share of the matrix peak that was measured, memory, a profile.

    python -m bench.gpu.speed [--shape 0.6B] [--tokens 32768] [--recompute [selective]] [--kernels KERNELS] [--tiny]
        [--json FILE]

The peak is that of large products of matrices in the learner's dtype, on the same device and a moment before. A step's
useful work is counted from shapes, as `--plan` counts it: six operations for each weight of the body and token, six for
each weight of the head and trained row, attention between the positions that see each other; what is computed again is
not counted. Weights are random; sequences have a heavy tail.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from opd_async.bench.convert import make_model
from opd_async.bench.gpu.found import Findings, device, end, parse, parser, wait_for_device
from opd_async.bench.learner import peak_bytes, reset_peak, sequences
from opd_async.config.topology import LearnerSection
from opd_async.forecast.cost_model import Decoder, read_decoder
from opd_async.forecast.devices import H100
from opd_async.forecast.memory import learner_memory
from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch, StepBatch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "hidden": 128, "vocab": 64},
    "0.6B": {"layers": 28, "hidden": 1024, "vocab": 151_936, "intermediate_size": 3072},
    "1.7B": {"layers": 28, "hidden": 2048, "vocab": 151_936, "intermediate_size": 6144},
}
"""Qwen3's. Both larger ones have 16 heads and 8 key heads of 128 channels, and tied embeddings."""
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
TERA, GIB = 1e12, 1 << 30
TRIES = 5
TOP = 15
"""Operations of the profile that are shown."""


def matrix_flops(dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two square matrices, the best of a few tries."""
    left = torch.randn(size, size, device=device()).to(dtype)
    seconds = min(_seconds(lambda: left @ left) for _ in range(TRIES + 1))
    return float(2 * size**3 / seconds)


def _seconds(work: Callable[[], object]) -> float:
    wait_for_device()
    began = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - began


def useful_flops(model: Decoder, batch: MicroBatch) -> float:
    """Operations of forward and backward on a micro-batch, nothing computed twice."""
    pairs = sum(float(end - start) ** 2 / 2 for start, end in pairwise(batch.cu_seqlens.tolist()))
    return 6.0 * model.body * len(batch.token_ids) + 6.0 * model.head * len(batch.rows) + 3.0 * model.pair_flops * pairs


def top(step: Callable[[], object]) -> list[dict[str, Any]]:
    """The operations of a step that take longest by themselves: milliseconds and share, on the GPU if there is one."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as recorded:
        step()
        wait_for_device()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -float(getattr(row, key)))
    whole = sum(float(getattr(row, key)) for row in rows) or 1.0
    return [
        {"name": row.key[:80], "ms": float(getattr(row, key)) / 1e3, "share": float(getattr(row, key)) / whole}
        for row in rows[:TOP]
    ]


def measure(findings: Findings, folder: Path, options: argparse.Namespace) -> None:
    """One shape in this process."""
    shape = SHAPES["tiny" if options.tiny else options.shape]
    make_model(folder / "model", **shape, **({} if options.tiny else HEADS))
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if torch.cuda.is_available() else "float32"
    peak = matrix_flops(getattr(torch, dtype), 512 if options.tiny else 8192)
    findings.figure(f"matrix peak, {dtype}, TFLOP/s", peak / TERA)
    tokens = 256 if options.tiny else options.tokens
    batch = sequences(argparse.Namespace(tokens=tokens, longest=tokens // 2, vocab=shape["vocab"]))
    config = LearnerConfig(
        model_path=folder / "model",
        dtype=dtype,
        recompute=options.recompute,
        kernels=options.kernels,
        logprob_chunk_rows=options.chunk_rows,
    )
    parallel.start(ParallelConfig(), seed=0)
    trainer = Trainer(config)
    findings.figure("kernels", trainer.model.config.kernels.said)

    def step() -> None:
        trainer.step(StepBatch(trainer.version, len(batch.rows), (batch,)))

    step()  # optimizer states are made, libraries loaded
    gc.collect()
    standing = reset_peak()
    seconds = statistics.median(_seconds(step) for _ in range(2 if options.tiny else TRIES))
    work = useful_flops(read_decoder(folder / "model"), batch)
    findings.figure("tokens in a step", len(batch.token_ids))
    findings.figure("seconds of a step", seconds)
    findings.figure("tokens/s", len(batch.token_ids) / seconds)
    findings.figure("useful TFLOP/s", work / seconds / TERA)
    findings.figure("share of the peak", work / seconds / peak)
    findings.figure("GiB between steps", standing / GIB)
    findings.figure("GiB at the highest", peak_bytes() / GIB)
    section = LearnerSection(
        micro_batch_tokens=len(batch.token_ids),
        recompute=options.recompute,
        dtype=dtype,
        logprob_chunk_rows=options.chunk_rows,
    )
    planned = learner_memory(read_decoder(folder / "model"), H100, section, tokens // 2)
    findings.figure("GiB that --plan counts", (planned.weights + planned.optimizer + planned.activations) / GIB)
    findings.figure("profile", top(step))
    parallel.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one shape."""
    made = parser("Tokens a second, share of the peak, memory, profile.")
    made.add_argument("--shape", choices=tuple(SHAPES), default="0.6B")
    made.add_argument("--tokens", type=int, default=32_768, help="of a step; the longest sequence has half of them")
    made.add_argument("--chunk-rows", type=int, default=4096, help="rows of the LM head at a time")
    again = "compute activations again in the backward pass; selective: those of norms and gates alone"
    made.add_argument("--recompute", nargs="?", const=True, default=False, choices=("selective",), help=again)
    made.add_argument("--kernels", choices=("auto", "torch", "te", "liger"), default="auto", help="learner.kernels")
    options = parse(made, arguments)
    findings = Findings(options.json)
    with tempfile.TemporaryDirectory() as folder:
        measure(findings, Path(folder), options)
    end(findings)


if __name__ == "__main__":
    main()
