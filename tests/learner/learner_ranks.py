"""Two learner ranks that put all models through all layouts; started by torchrun from test_ranks.

    torchrun --nproc-per-node 2 learner_ranks.py <folder of models> <folder for results>

`<results>/teacher` is a Hugging Face folder, `<results>/teacher-megatron` its checkpoint; each layout leaves its own
checkpoints there for the next one. Rank 0 writes `<layout>.json`: for each model what the steps reported, and whether
exports were exact.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deadlines import patience
from full_fixtures import furthest
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from span_parity import gradients
from tiny_learner import EMPTY, VOCAB, learner_config, micro_batch, read_differently, split, step_batch

from opd_async import LossOutput, LossRows
from opd_async.config.losses import FULL_LOSSES, TOPK_LOSSES
from opd_async.learner import resume
from opd_async.learner.config import CriticConfig, LearnerConfig, LossConfig, ParallelConfig, TeacherConfig
from opd_async.learner.convert import hf_to_megatron, megatron_to_hf
from opd_async.learner.distributed import parallel
from opd_async.learner.hf.io import hf_weights, save_hf
from opd_async.learner.opinion import opinion
from opd_async.learner.trainer import Trainer
from opd_async.run.checkpoints import Shards
from opd_async.transport.messages import AskTeacher
from opd_async.transport.step_batch import MicroBatch, TeacherPrompts

LAYOUTS = {
    "tensor": ParallelConfig(tensor=2, timeout_s=patience(60)),
    "pipeline": ParallelConfig(pipeline=2, timeout_s=patience(60)),
    "data": ParallelConfig(timeout_s=patience(60)),
    "context": ParallelConfig(context=2, timeout_s=patience(60)),
    "expert": ParallelConfig(expert=2, timeout_s=patience(60)),
}
BRIEF = ("qwen2", "gemma3")
"""Models of which only steps and exports are looked at: what sets them apart is their weights."""
WITH_LOSSES = "qwen3-tied"
"""The one model on which all losses are tried: they see hidden states and a head."""
SAVED_AT = 2
STEPS = 5


def layouts(kind: str) -> list[str]:
    """The layouts that a model is tried in: experts are shared out where there are some."""
    return [name for name in LAYOUTS if name != "expert" or "moe" in kind]


def critics(kind: str) -> list[str]:
    """The layouts that a critic of this model's shape is tried in: experts where they are shared out."""
    return layouts(kind) if kind == WITH_LOSSES else [name for name in layouts(kind) if name == "expert"]


def read_by(kind: str, layout: str) -> list[str]:
    """Whose checkpoints a layout reads: its own, and those of the one before it. One rank alone reads all of them."""
    names = layouts(kind)
    return names[max(0, names.index(layout) - 1) : names.index(layout) + 1]


def data(version: int) -> list[MicroBatch]:
    """Three micro-batches: two data-parallel ranks have one too few, which an empty one makes up for."""
    return [micro_batch([9, 13, 21, 13], seed=10 * version + index, k=4) for index in range(3)]


def contrast(rows: LossRows) -> LossOutput:
    """A loss on the difference of the teacher's scores behind two prompts."""
    assert rows.teacher_R is not None and rows.contrast_R is not None
    signal_R = rows.teacher_R - rows.contrast_R
    return LossOutput(-((rows.logprobs_R - rows.behaviour_R).exp() * signal_R).sum())


def contrasted(batch: MicroBatch) -> MicroBatch:
    """The same with a wrong prompt of three tokens for each sequence."""
    count = len(batch.cu_seqlens) - 1
    ids = np.random.default_rng(len(batch.rows)).integers(0, VOCAB, 3 * count).astype(np.int32)
    assert batch.teacher_prompts is not None
    wrong = TeacherPrompts(batch.teacher_prompts.prompt_lengths_N, np.full(count, 3, np.int32), ids)
    return replace(batch, contrast_prompts=wrong)


def steps(
    trainer: Trainer, place: parallel.Place, until: int, *, other_prompts: bool = False
) -> list[tuple[float, ...]]:
    """Loss and gradient norm of every step up to version `until`, and what the critic says where there is one.

    NaN stands for what a step does not compute. With `other_prompts` the teacher reads other prompts than the student,
    and wrong ones too where there is a contrast.
    """
    result: list[tuple[float, ...]] = []
    while trainer.version < until:
        batches = data(trainer.version)
        if other_prompts:
            batches = [read_differently(batch, seed=index) for index, batch in enumerate(batches)]
        if trainer.config.contrast:
            batches = [contrasted(batch) for batch in batches]
        own = batches[place.data_rank :: place.data_size]
        own += [EMPTY] * (-(-len(batches) // place.data_size) - len(own))
        rows = sum(len(batch.rows) for batch in batches)
        metrics = trainer.step(step_batch(trainer.version, own, rows))
        assert metrics.tokens == rows
        critic = (metrics.value_loss, metrics.value_mean, metrics.explained_variance, metrics.critic_grad_norm)
        row = (metrics.loss, metrics.grad_norm, *(critic if trainer.critic is not None else ()))
        result.append(tuple(math.nan if value is None else value for value in row))
    return result


def micro_batching(trainer: Trainer, place: parallel.Place) -> float:
    """The largest difference in the gradient between eight sequences in one micro-batch and in eight."""
    packed = micro_batch([9, 31, 14, 30, 22, 5, 13, 40], seed=place.data_rank)
    rows = len(packed.rows) * place.data_size
    found = []
    for parts in ([packed], split(packed)):
        trainer.gradients(step_batch(trainer.version, parts, rows))
        buffers = [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
        found.append(torch.cat([buffer.grad_data for buffer in buffers]))
    worst = torch.stack([(found[0] - found[1]).abs().max(), -found[0].abs().max()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    assert worst[1] < 0.0
    return float(worst[0])


def in_parts(trainer: Trainer, place: parallel.Place) -> float:
    """The largest difference in the gradient between a step that comes at once and one in four parts, one of which
    has no token."""
    whole = split(micro_batch([9, 31, 14, 30, 22, 5], seed=place.data_rank))
    rows = sum(len(one.rows) for one in whole)
    trainer.gradients(step_batch(trainer.version, whole, rows * place.data_size))
    buffers = [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
    expected = torch.cat([buffer.grad_data for buffer in buffers])
    ends = [len(micro_batch([9, 31], seed=0).rows), len(micro_batch([14, 30, 22], seed=0).rows)]
    mine = (whole[:2], whole[2:5], [EMPTY], whole[5:])
    counts = [*ends, 0, rows - sum(ends)]
    for index, (part, count) in enumerate(zip(mine, counts, strict=True)):
        batch = step_batch(trainer.version, part, count * place.data_size)
        batch = replace(batch, part=index, last=index == len(mine) - 1)
        trainer.gradients(batch) if batch.last else trainer.accumulate(batch)
    worst = torch.stack([(torch.cat([b.grad_data for b in buffers]) - expected).abs().max(), -expected.abs().max()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    assert worst[1] < 0.0
    return float(worst[0])


def losses(config: LearnerConfig, place: parallel.Place, results: Path) -> dict[str, list[tuple[float, ...]]]:
    """Two steps of each loss, with a teacher inside or without: the second starts from the gradient of the first."""
    teacher = TeacherConfig(model_path=results / "teacher", load=results / "teacher-megatron")
    topk = {name: replace(config, loss=LossConfig(loss=name)) for name in TOPK_LOSSES}
    inside = {
        f"{name} of a teacher inside": replace(config, loss=LossConfig(loss=name), teacher=teacher)
        for name in (*FULL_LOSSES, "reverse_kl")
    }
    forms = {
        "gspo": LossConfig(ratio="sequence", clip_ratio=0.05, clip_high=0.1),
        "cispo with entropy": LossConfig(ratio="truncated", clip_ratio=1.0, clip_high=0.3, entropy_coef=0.1),
        "dual clip": LossConfig(dual_clip=1.5, clip_high=0.3),
    }
    reference = LossConfig(reference_kl_coef=0.5)
    inside["a reference"] = replace(config, loss=reference, reference=teacher)
    ratios = {name: replace(config, loss=loss) for name, loss in forms.items()}
    found = {name: steps(Trainer(changed), place, 2) for name, changed in sorted((topk | inside | ratios).items())}
    for loss in ("jsd_full", "reverse_kl"):
        informed = Trainer(replace(config, loss=LossConfig(loss=loss), teacher=teacher))
        found[f"{loss} of a teacher that reads other prompts"] = steps(informed, place, 2, other_prompts=True)
    live = TeacherConfig(model_path=config.model_path, load=None, weights="live")
    clipped = LossConfig(loss="jsd_full", divergence_clip=0.05)
    itself = Trainer(replace(config, loss=clipped, teacher=live, frequent_tokens=3))
    found["the student as its own teacher"] = steps(itself, place, 2, other_prompts=True)
    two_prompts = LossConfig(loss="reverse_kl", function="learner_ranks:contrast", clip_ratio=None)
    told_apart = Trainer(replace(config, loss=two_prompts, teacher=teacher, contrast=True))
    found["a contrast of two prompts"] = steps(told_apart, place, 2, other_prompts=True)
    found["what a teacher says of texts"] = said_of_texts(Trainer(replace(config, teacher=teacher)))
    return found


def said_of_texts(trainer: Trainer) -> list[tuple[float, ...]]:
    """The logprob of each response token of five texts, its likeliest tokens, and theirs."""
    texts = micro_batch([9, 31, 14, 30, 22], seed=3)
    asked = AskTeacher(texts.token_ids, np.diff(texts.cu_seqlens), np.array([2, 9, 5, 29, 1], np.int32), topk=6)
    said = opinion(trainer, asked, 40)
    assert said.topk is not None
    columns = np.concatenate([said.logprobs[:, None], said.topk.ids, said.topk.logprobs], 1)
    return [tuple(row) for row in columns.tolist()]


def with_average(config: LearnerConfig) -> Trainer:
    """A trainer whose student is taught by an average of itself that moves fast."""
    average = TeacherConfig(model_path=config.model_path, load=None, weights="ema", decay=0.5)
    return Trainer(replace(config, loss=LossConfig(loss="jsd_full"), teacher=average))


def with_experts(config: LearnerConfig, place: parallel.Place, results: Path) -> list[tuple[float, ...]]:
    """Two steps with a mixture of experts for a teacher: what the student began with."""
    converted = results / f"{config.model_path.name}-alone-converted"
    teacher = TeacherConfig(model_path=config.model_path, load=converted, offload=True)
    return steps(Trainer(replace(config, loss=LossConfig(loss="reverse_kl_full"), teacher=teacher)), place, 2)


def with_critic(config: LearnerConfig) -> Trainer:
    """A trainer whose critic is of the student's shape, and takes two updates in each step."""
    critic = CriticConfig(
        model_path=config.model_path, optim=config.optim, value_clip=0.05, updates=2, only_steps=1, lam=0.9
    )
    return Trainer(replace(config, critic=critic))


def exports(trainer: Trainer, stored: dict[str, torch.Tensor]) -> bool:
    """Does an export give these tensors, bit for bit? Ranks other than 0 are given nothing and say yes."""
    found = dict(hf_weights(trainer.model))
    return dist.get_rank() != 0 or (
        found.keys() == stored.keys() and all(torch.equal(found[key], stored[key]) for key in stored)
    )


def conversions(trainer: Trainer, model: Path, results: Path, name: str) -> bool:
    """Convert both ways in this layout; is what one rank, this layout and the one before have converted exact?"""
    hf_to_megatron(model, results / f"{model.name}-{name}-converted", LAYOUTS[name])
    megatron_to_hf(results / f"{model.name}-{name}", model, results / f"{model.name}-{name}-back", LAYOUTS[name])
    exact = True
    for other in ("alone", *read_by(model.name, name)):
        resume.load_weights(trainer, results / f"{model.name}-{other}-converted")
        exact &= exports(trainer, load_file(model / "model.safetensors"))
    return exact


def run_layout(name: str, model: Path, results: Path) -> dict[str, Any]:
    """Train, save at SAVED_AT, go on; then resume what another layout has saved."""
    place = parallel.start(LAYOUTS[name], seed=0)
    trainer = Trainer(replace(learner_config(model), parallel=LAYOUTS[name]))
    stored = load_file(model / "model.safetensors")
    exact = exports(trainer, stored)
    logprobs = [tensor.tolist() for tensor in trainer.logprobs([data(0)[0]])]
    report: dict[str, Any] = {"exact": exact, "logprobs": logprobs, "micro_batching": micro_batching(trainer, place)}
    report["in_parts"] = in_parts(trainer, place)
    report["steps"] = steps(trainer, place, SAVED_AT)
    if model.name not in BRIEF:
        save(trainer, results / f"{model.name}-{name}")
    report["steps"] += steps(trainer, place, STEPS)
    save_hf(trainer.model, results / f"{model.name}-{name}-hf", model)
    if model.name not in BRIEF:
        report |= resumptions(trainer, place, results, name)
        report["converted"] = conversions(trainer, model, results, name)
    if name in critics(model.name):
        critic = with_critic(trainer.config)
        report["critic"] = steps(critic, place, SAVED_AT)
        save(critic, results / f"{model.name}-{name}-critic")
        report["critic"] += steps(critic, place, STEPS)
    if "moe" in model.name:
        report["teacher with experts"] = with_experts(trainer.config, place, results)
    if model.name == WITH_LOSSES:
        averaged = with_average(trainer.config)
        report["average"] = steps(averaged, place, SAVED_AT, other_prompts=True)
        save(averaged, results / f"{model.name}-{name}-average")
        report["average"] += steps(averaged, place, STEPS, other_prompts=True)
        report["losses"] = losses(trainer.config, place, results)
        spans = gradients(trainer.config, results / "teacher", place)
        if dist.get_rank() == 0:
            named = {f"{form}/{key}": tensor for form, found in spans.items() for key, tensor in found.items()}
            save_file(named, results / f"{name}-spans.safetensors")
        report["furthest"] = furthest(parallel_state.get_tensor_model_parallel_group())
    parallel_state.destroy_model_parallel()
    return report


def save(trainer: Trainer, folder: Path) -> None:
    """Keep a trainer; all ranks hear of the files of all."""
    written = resume.save(trainer, folder)
    sizes = [path.stat().st_size for path in folder.glob("*.distcp")]
    assert written == Shards(len(sizes), sum(sizes)) and sizes


def resumptions(
    trainer: Trainer, place: parallel.Place, results: Path, name: str
) -> dict[str, list[tuple[float, ...]]]:
    """The steps after what this layout and the one before it have saved."""
    resumed, report, kind = Trainer(trainer.config), {}, trainer.config.model_path.name
    for other in read_by(kind, name):
        resume.load(resumed, results / f"{kind}-{other}")
        report[f"from {other}"] = steps(resumed, place, STEPS)
    return report


def report(name: str, models: Path, results: Path) -> None:
    """All models through one layout."""
    tried = [model for model in sorted(models.iterdir()) if name in layouts(model.name)]
    reports = {model.name: run_layout(name, model, results) for model in tried}
    # the last stage of a pipeline is not rank 0, and only that stage knows the log-probabilities
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, {kind: found["logprobs"] for kind, found in reports.items()})
    if dist.get_rank() == 0:
        for kind, found in reports.items():
            found["logprobs"] = everyone[0][kind] or everyone[1][kind]
        (results / f"{name}.json").write_text(json.dumps(reports), encoding="utf-8")
    dist.barrier()


def main() -> None:
    """All models through all layouts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in LAYOUTS:
        report(name, Path(sys.argv[1]), Path(sys.argv[2]))
    parallel.stop()


if __name__ == "__main__":
    main()
