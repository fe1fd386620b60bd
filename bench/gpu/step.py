"""A step of the learner on this device against the same step on the CPU in float32, and a resumed run against itself.

    python -m bench.gpu.step [--tiny] [--json FILE]

    way        ranks   numbers    compared with
    cpu        1       float32    -: no GPU is visible to it
    float32    1       float32    cpu
    recompute  1       float32    cpu: activations are computed again
    selective  1       float32    cpu: those of norms and gates are
    bfloat16   1       bfloat16   cpu, with more room
    liger      1       float32    cpu: with a GPU, where Liger is installed
    te         1       bfloat16   cpu, with more room: with a GPU, where Transformer Engine is installed
    tensor     2       float32    cpu: with two GPUs or more, and on the CPU
    data       2       float32    cpu: the same

Every way is a process of its own (two where it has two ranks). It takes two steps with each loss on the same batches
and writes logprobs, reports and weights. `moved apart` is the distance between two results of the same steps, over how
far the steps went: ||a - b|| / ||b - start||.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_async.bench.convert import make_model
from opd_async.bench.gpu.found import Findings, end, parse, parser
from opd_async.bench.learner import sequences
from opd_async.data.kernel_limits import PARTS
from opd_async.estimators.topk import TopK
from opd_async.learner import resume
from opd_async.learner.config import LearnerConfig, LossConfig, OptimConfig, ParallelConfig, Recompute, TeacherConfig
from opd_async.learner.distributed import parallel
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch, StepBatch

DEADLINE_S = 240.0
LOSSES = ("reverse_kl", "jsd_topk", "reverse_kl_full")
TOPK = 8
STEPS = 2
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
"""Of the tiny model: two ranks can share them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How the steps are taken, and how far the result may be from the CPU's: nats, shares of norm and of movement."""

    dtype: str = "float32"
    tensor: int = 1
    data: int = 1
    recompute: Recompute = False
    kernels: Literal["auto", "te", "liger"] = "auto"
    on_cpu: bool = False
    logprob: float = 2e-3
    norm: float = 0.01
    apart: float = 0.1

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.data

    def fits(self, devices: int) -> bool:
        """Whether this machine has the ranks' devices, and the packages of the kernels; `devices` is 0 without a GPU,
        where two ranks share the CPU."""
        if self.kernels == "auto":
            return self.ranks <= (devices or 2)
        return self.ranks <= devices and all(find_spec(module.partition(".")[0]) for module in PARTS[self.kernels])


WAYS = {
    "cpu": Way(on_cpu=True),
    "float32": Way(),
    "recompute": Way(recompute=True),
    "selective": Way(recompute="selective"),
    "bfloat16": Way(dtype="bfloat16", logprob=0.2, norm=0.1, apart=1.0),
    "liger": Way(kernels="liger"),
    "te": Way(kernels="te", dtype="bfloat16", logprob=0.2, norm=0.1, apart=1.0),
    "tensor": Way(tensor=2),
    "data": Way(data=2),
}


def sizes(tiny: bool) -> tuple[int, int, int, int]:
    """Layers, channels and vocabulary of the model, tokens of a micro-batch."""
    return (2, 128, 64, 64) if tiny else (4, 512, 8192, 4096)


def batches(tiny: bool) -> list[MicroBatch]:
    """Two micro-batches with a top-k, whose logprobs are about those of a model with random weights."""
    _, _, vocab, tokens = sizes(tiny)
    whole = sequences(argparse.Namespace(tokens=tokens, longest=max(16, tokens // 4), vocab=vocab))
    found = []
    for seed in range(2):
        random = np.random.default_rng(seed)
        rows = len(whole.rows)
        logprobs = (-np.log(vocab) + 0.3 * random.normal(size=(2, rows))).astype(np.float32)
        ids = np.stack([random.permutation(vocab)[:TOPK] for _ in range(rows)]).astype(np.int32)
        topk = TopK(ids, np.full(ids.shape, np.log(0.9 / TOPK), np.float32))
        tokens_T = random.integers(0, vocab, len(whole.token_ids)).astype(np.int32)
        one = replace(whole, token_ids=tokens_T, behaviour_logprobs=logprobs[0], teacher_logprobs=logprobs[1])
        found.append(replace(one, topk=topk))
    return found


def take(name: str, folder: Path, tiny: bool, deadline_s: float = DEADLINE_S) -> None:
    """Take the steps of one way on this rank; rank 0 writes `<name>-<loss>.safetensors` and `<name>.json`."""
    way = WAYS[name]
    axes = ParallelConfig(tensor=way.tensor, timeout_s=deadline_s)
    place = parallel.start(axes, seed=0)
    config = LearnerConfig(
        model_path=folder / "model",
        dtype="bfloat16" if way.dtype == "bfloat16" else "float32",
        parallel=axes,
        optim=OptimConfig(lr=1e-3),
        logprob_chunk_rows=16 if tiny else 1024,
        recompute=way.recompute,
        kernels=way.kernels,
    )
    mine = batches(tiny)[place.data_rank :: place.data_size]
    tokens = sum(len(one.rows) for one in batches(tiny))
    said: dict[str, object] = {}
    for loss in LOSSES:
        teacher = TeacherConfig(model_path=folder / "teacher", load=None) if loss.endswith("_full") else None
        trainer = Trainer(replace(config, loss=LossConfig(loss=loss), teacher=teacher))
        logprobs = torch.cat(trainer.logprobs(mine))
        reports = []
        for version in range(STEPS):
            if version == STEPS - 1 and loss == LOSSES[0] and way.ranks == 1:
                resume.save(trainer, folder / f"{name}-checkpoint")
            reports.append(trainer.step(StepBatch(version, tokens, tuple(mine))).known())
        weights = dict(hf_weights(trainer.model, torch.float32))
        if loss == LOSSES[0] and way.ranks == 1:
            said["resumed"] = resumed(trainer.config, folder, name, StepBatch(STEPS - 1, tokens, tuple(mine)), weights)
        if place.rank == 0:
            kept = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
            save_file(kept | {"logprobs": logprobs.cpu()}, folder / f"{name}-{loss}.safetensors")
            said[loss] = [{key: report[key] for key in ("loss", "grad_norm")} for report in reports]
    if place.rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(said), encoding="utf-8")
    dist.barrier()
    parallel.stop()


def resumed(config: LearnerConfig, folder: Path, name: str, last: StepBatch, expected: dict[str, Tensor]) -> float:
    """How far apart the last step ends when it follows a checkpoint: over the distance from the model's weights."""
    again = Trainer(config)
    start = {key: value.clone() for key, value in hf_weights(again.model, torch.float32)}
    resume.load(again, folder / f"{name}-checkpoint")
    again.step(last)
    return apart(dict(hf_weights(again.model, torch.float32)), expected, start)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """||found - expected|| / ||expected - start|| over all weights."""
    pairs = [(found[key], expected[key], start[key]) for key in start]
    between = sum(float((one - other).square().sum()) for one, other, _ in pairs)
    moved = sum(float((other - begun).square().sum()) for _, other, begun in pairs)
    return float((between / moved) ** 0.5)


def run(name: str, folder: Path, tiny: bool, deadline_s: float = DEADLINE_S) -> None:
    """Take one way in processes of its own. Raises `CalledProcessError` or `TimeoutExpired`."""
    way = WAYS[name]
    words = ["opd_async.bench.gpu.step", "--way", name, "--folder", str(folder), "--deadline-s", str(deadline_s)]
    words += ["--tiny"] if tiny else []
    launch = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node", str(way.ranks), "-m"] if way.ranks > 1 else []
    )
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if way.on_cpu else {}
    command = [sys.executable, "-m", *launch, *words]
    subprocess.run(command, env=os.environ | hidden, timeout=deadline_s, check=True)


def compare(findings: Findings, name: str, folder: Path) -> None:
    """Compare what a way has written with the CPU's."""
    way = WAYS[name]
    said, theirs = (json.loads((folder / f"{which}.json").read_text()) for which in (name, "cpu"))
    start = load_file(folder / "cpu-start.safetensors")
    for loss in LOSSES:
        ours, expected = (load_file(folder / f"{which}-{loss}.safetensors") for which in (name, "cpu"))
        if way.data == 1:  # a data-parallel rank has its own rows only
            difference = (ours["logprobs"] - expected["logprobs"]).abs()
            findings.check(f"{name}, {loss}: largest difference of a logprob", float(difference.max()), way.logprob)
        for step, (one, other) in enumerate(zip(said[loss], theirs[loss], strict=True)):
            off = abs(one["grad_norm"] / other["grad_norm"] - 1)
            findings.check(f"{name}, {loss}, step {step}: gradient norm", off, way.norm)
            findings.check(f"{name}, {loss}, step {step}: loss", abs(one["loss"] - other["loss"]), way.logprob)
        findings.check(f"{name}, {loss}: moved apart", apart(ours, expected, start), way.apart)
    if "resumed" in said:
        findings.check(f"{name}: a resumed step, moved apart", said["resumed"], 1e-3)


def prepare(folder: Path, tiny: bool) -> None:
    """Make the student and the teacher, and what the student begins with."""
    layers, hidden, vocab, _ = sizes(tiny)
    for seed, model in enumerate(("model", "teacher")):
        make_model(folder / model, layers, hidden, vocab, seed=seed, std=0.05, **(HEADS if tiny else {}))
    start = load_file(folder / "model" / "model.safetensors")
    save_file({key: value.float() for key, value in start.items()}, folder / "cpu-start.safetensors")


def try_all(findings: Findings, names: Sequence[str], folder: Path, options: argparse.Namespace) -> None:
    """Take and compare every way; one that fails leaves the others their turn."""
    prepare(folder, options.tiny)
    for name in ("cpu", *names):
        try:
            run(name, folder, options.tiny, options.deadline_s)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            findings.figure(f"{name} failed", str(error))
            findings.check(f"{name}: ways that failed", 1, 0)
            continue
        if name != "cpu":
            compare(findings, name, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try every way that this machine has room for, or `--ways`."""
    made = parser("A step against the same step on the CPU.")
    made.add_argument("--ways", default="", help="commas between them; all that the devices allow if left out")
    made.add_argument("--way", choices=tuple(WAYS), help="take one way in this process")
    made.add_argument("--folder", type=Path, help="where models are, and results go")
    made.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="of each way")
    given = made.parse_args(arguments)
    if given.way is not None:
        take(given.way, given.folder, given.tiny, given.deadline_s)
        return
    options = parse(made, arguments)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = options.ways.split(",") if options.ways else [name for name, way in WAYS.items() if way.fits(devices)]
    findings = Findings(options.json)
    with tempfile.TemporaryDirectory() as folder:
        try_all(findings, [name for name in names if name != "cpu"], Path(folder), options)
    end(findings)


if __name__ == "__main__":
    main()
