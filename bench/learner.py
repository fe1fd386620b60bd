"""What a learner step costs: tokens per second, peak memory, and how often each token is forwarded, counted by hooks.

    python -m bench.learner [--layers 4] [--hidden 256] [--vocab 16384] [--tokens 2048] [--json FILE]

    form            trains on         layout                   LM head
    rows            reverse_kl        packed                   trained rows, --chunk-rows at a time (as the learner)
    full logits     reverse_kl        packed                   every token at once, log-softmax in float32
    padded          reverse_kl        padded to the longest    as `rows`
    teacher, rows   reverse_kl        packed, teacher inside   as `rows`, of both models
    teacher, exact  forward_kl_full   packed, teacher inside   as `rows`, both models' full distributions

Every form is a process of its own and takes the same steps on the same random sequences, whose lengths have a heavy
tail. Tokens per second are those of the sequences, padding not counted. Memory is what a step adds at its highest to
weights, gradients and optimizer: resident memory on the CPU, allocated memory on a GPU.

Forward-equivalents count one for a token's way forward through a model's layers and two for its way back, which is two
products of matrices where forward is one. With a teacher of the student's size, four are needed for each token: one for
the teacher, one forward and two backward for the student. A pipeline that keeps scoring and training apart pays six, as
slime's with a teacher in Megatron does when its script also names a reference model: one more for the reference
policy's log-probabilities, which a KL coefficient of zero does not switch off, and one for the student's own before the
step, which an importance ratio to the engine's log-probabilities does without. Recomputing activations adds one to
either. Here hooks on every layer count tokens as they pass, padding included, during one more step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_async.bench.convert import make_model
from opd_async.files import write_atomically
from opd_async.learner.config import LearnerConfig, LossConfig, ParallelConfig, TeacherConfig
from opd_async.learner.convert import hf_to_megatron
from opd_async.learner.distributed import parallel
from opd_async.learner.losses.logprobs import RowLogprobs
from opd_async.learner.model.layout import PackedBatch
from opd_async.learner.teacher import Teacher
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch, StepBatch

MIB = 1 << 20
DEADLINE_S = 900
PROMPT_SHARE = 8
"""One token in so many of a sequence is prompt."""


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One way to take a step."""

    loss: str = "reverse_kl"
    full_logits: bool = False
    padded: bool = False
    teacher: bool = False


FORMS = {
    "rows": Form(),
    "full logits": Form(full_logits=True),
    "padded": Form(padded=True),
    "teacher, rows": Form(teacher=True),
    "teacher, exact": Form("forward_kl_full", teacher=True),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One form: tokens per second, milliseconds and added MiB of a step, and forward-equivalents for each token."""

    form: str
    tokens_per_s: float
    step_ms: float
    peak_mib: float
    student_forward: float
    student_backward: float
    teacher_forward: float
    equivalents: float


class FullLogits(Trainer):
    """The usual form: logits of every token, in float32, and their log-softmax, of which a few numbers are picked."""

    def _logprobs(self, packed: PackedBatch, hidden: Tensor, *, train: bool) -> RowLogprobs:
        logits_PV = (hidden[:, 0] @ self.model.head_weight().T).float()
        table_PV = logits_PV[:, : self.shape.vocab].log_softmax(-1)
        return RowLogprobs(table_PV[packed.rows_O, packed.targets_R])


def sequences(options: argparse.Namespace) -> MicroBatch:
    """About `--tokens` tokens in sequences of log-normal lengths, at most `--longest` each; one eighth is prompt."""
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < options.tokens:
        drawn = int(generator.lognormal(np.log(options.longest / 8), 0.9))
        lengths.append(min(max(drawn, PROMPT_SHARE), options.longest))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    spans = [np.arange(a + max(1, (b - a) // PROMPT_SHARE) - 1, b - 1) for a, b in pairwise(bounds)]
    rows = np.concatenate(spans).astype(np.int32)
    logprobs = -3.0 - generator.random(len(rows)).astype(np.float32)
    zeros = np.zeros(len(rows), np.float32)
    tokens = generator.integers(0, options.vocab, int(bounds[-1])).astype(np.int32)
    return MicroBatch(
        token_ids=tokens,
        cu_seqlens=bounds,
        rows=rows,
        behaviour_logprobs=logprobs,
        teacher_logprobs=logprobs,
        advantages=zeros,
        staleness=zeros.astype(np.int32),
    )


def passes(trainer: Trainer, batch: StepBatch) -> dict[str, float]:
    """How often a token passed a layer in one step, by model and direction: the mean over layers.

    Padding is counted as it passes, but not among the tokens that the count is divided by.
    """
    models = {"student": trainer.model}
    if isinstance(trainer.teacher, Teacher):
        models["teacher"] = trainer.teacher.model
    passed = {f"{who} {way}": 0 for who in ("student", "teacher") for way in ("forward", "backward")}

    def count_back(grad: Tensor, who: str) -> None:
        passed[f"{who} backward"] += len(grad)

    handles = []
    for who, model in models.items():

        def count(_module: Any, _given: Any, output: Any, who: str = who) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            passed[f"{who} forward"] += len(hidden)
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: count_back(grad, who))

        handles += [layer.register_forward_hook(count) for layer in model.decoder.layers]
    trainer.step(batch)
    for handle in handles:
        handle.remove()
    tokens = sum(len(micro_batch.token_ids) for micro_batch in batch.micro_batches)
    layers = {who: len(model.decoder.layers) for who, model in models.items()}
    return {key: value / tokens / layers.get(key.split()[0], 1) for key, value in passed.items()}


def measure(name: str, folder: Path, options: argparse.Namespace) -> Row:
    """Take the steps of one form in this process."""
    form = FORMS[name]
    parallel.start(ParallelConfig(), seed=0)
    teacher = None
    if form.teacher:
        hf_to_megatron(folder / "teacher", folder / "megatron", ParallelConfig())
        teacher = TeacherConfig(model_path=folder / "teacher", load=folder / "megatron")
    config = LearnerConfig(
        model_path=folder / "student",
        dtype=options.dtype,
        loss=LossConfig(loss=form.loss),
        logprob_chunk_rows=options.chunk_rows,
        teacher=teacher,
    )
    trainer = (FullLogits if form.full_logits else Trainer)(config)
    if form.padded:
        trainer.padding_slack = 1.0
    whole = sequences(options)
    trainer.step(StepBatch(0, *_one(_first(whole))))
    base = reset_peak()
    seconds = []
    for version in range(1, options.steps + 1):
        began = time.perf_counter()
        trainer.step(StepBatch(version, *_one(whole)))
        seconds.append(time.perf_counter() - began)
    peak = peak_bytes()
    counts = passes(trainer, StepBatch(options.steps + 1, *_one(whole)))
    parallel.stop()
    once, back, taught = (counts[key] for key in ("student forward", "student backward", "teacher forward"))
    step_s, added = statistics.median(seconds), (peak - base) / MIB
    speed = len(whole.token_ids) / step_s
    return Row(
        form=name,
        tokens_per_s=speed,
        step_ms=1000 * step_s,
        peak_mib=added,
        student_forward=once,
        student_backward=back,
        teacher_forward=taught,
        equivalents=once + 2.0 * back + taught,
    )


def _one(batch: MicroBatch) -> tuple[int, tuple[MicroBatch]]:
    return len(batch.rows), (batch,)


def _first(batch: MicroBatch) -> MicroBatch:
    """The first sequence, to warm up on: optimizer states are made, and libraries loaded."""
    end, rows = int(batch.cu_seqlens[1]), int(np.searchsorted(batch.rows, batch.cu_seqlens[1]))
    return MicroBatch(
        token_ids=batch.token_ids[:end],
        cu_seqlens=batch.cu_seqlens[:2],
        rows=batch.rows[:rows],
        behaviour_logprobs=batch.behaviour_logprobs[:rows],
        teacher_logprobs=batch.teacher_logprobs[:rows],
        advantages=batch.advantages[:rows],
        staleness=batch.staleness[:rows],
    )


def reset_peak() -> int:
    """Forget the highest memory so far; the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's name for: reset VmHWM
    return status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """Bytes under a key of this process's status, such as `VmRSS`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def run(options: argparse.Namespace, arguments: Sequence[str]) -> list[Row]:
    """Every form in a process of its own. Raises `CalledProcessError` if one fails."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for side in ("student", "teacher"):
            make_model(Path(name) / side, options.layers, options.hidden, options.vocab)
        for form in FORMS:
            command = [sys.executable, "-m", "opd_async.bench.learner", *arguments, "--form", form, "--folder", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=True)
            rows.append(row_of(done.stdout))
    return rows


def row_of(output: str) -> Row:
    """What a form's process printed last."""
    return Row(**json.loads(output.splitlines()[-1]))


def table(rows: Sequence[Row]) -> str:
    """The figures as text."""
    head = f"{'form':<15} {'tokens/s':>9} {'step ms':>8} {'peak MiB':>9}"
    lines = [f"{head} {'forward':>8} {'back':>6} {'teacher':>8} {'sum':>6}"]
    for row in rows:
        figures = f"{row.tokens_per_s:>9.0f} {row.step_ms:>8.0f} {row.peak_mib:>9.0f} {row.student_forward:>8.2f}"
        more = f"{row.student_backward:>6.2f} {row.teacher_forward:>8.2f} {row.equivalents:>6.2f}"
        lines.append(f"{row.form:<15} {figures} {more}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Speed, memory and forward passes of a learner step.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="channels; a multiple of 128")
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--longest", type=int, default=512, help="tokens in the longest sequence")
    parser.add_argument("--chunk-rows", type=int, default=256, help="rows of the LM head at a time")
    parser.add_argument("--steps", type=int, default=2, help="steps that are timed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--form", choices=tuple(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the figures where `--json` says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.form is not None:
        print(json.dumps(dataclasses.asdict(measure(options.form, options.folder, options))))
        return
    rows = run(options, given)
    print(table(rows))
    if options.json is not None:
        names = ("layers", "hidden", "vocab", "tokens", "longest", "chunk_rows", "steps", "dtype")
        report = {name: getattr(options, name) for name in names} | {"rows": [dataclasses.asdict(row) for row in rows]}
        write_atomically(options.json, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
