"""Tiny models and batches for the learner's tests; also imported by the multi-rank worker script."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_async.estimators.topk import TopK
from opd_async.learner.config import LearnerConfig, OptimConfig
from opd_async.learner.hf.mapping import slots
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch, StepBatch, TeacherPrompts

VOCAB = 33
EMPTY = MicroBatch(
    token_ids=np.zeros(0, np.int32),
    cu_seqlens=np.zeros(1, np.int32),
    rows=np.zeros(0, np.int32),
    behaviour_logprobs=np.zeros(0, np.float32),
    teacher_logprobs=np.zeros(0, np.float32),
    advantages=np.zeros(0, np.float32),
    staleness=np.zeros(0, np.int32),
)


def write_model(folder: Path, kind: str, rows: int = VOCAB) -> Path:
    """A random Hugging Face model of `rows` ids, with norms and biases away from their initial values."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "original_max_position_embeddings": 16,
    }
    gemma_ropes = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    gemma = {"num_hidden_layers": 4, "sliding_window_pattern": 2, "sliding_window": 8, "query_pre_attn_scalar": 20}
    gemma |= {"pad_token_id": None}  # else transformers holds its row at zero
    wider = {"hidden_size": 48, "num_hidden_layers": 4, "initializer_range": 0.2}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = {
        "qwen3-tied": lambda: transformers.Qwen3Config(**options, head_dim=16, tie_word_embeddings=True),
        "qwen3-untied": lambda: transformers.Qwen3Config(**options, head_dim=16, tie_word_embeddings=False),
        "teacher": lambda: transformers.Qwen3Config(**options | wider, head_dim=16, tie_word_embeddings=False),
        "qwen2": lambda: transformers.Qwen2Config(**options, tie_word_embeddings=False),
        "llama": lambda: transformers.LlamaConfig(**options, rope_parameters=llama3, tie_word_embeddings=False),
        "qwen3-yarn": lambda: transformers.Qwen3Config(
            **options, head_dim=16, rope_parameters=yarn, tie_word_embeddings=True
        ),
        "qwen2-windows": lambda: transformers.Qwen2Config(**options, **windows, tie_word_embeddings=False),
        "mistral": lambda: transformers.MistralConfig(**options, sliding_window=8, rope_parameters=yarn),
        "gemma3": lambda: transformers.Gemma3TextConfig(**options | gemma, head_dim=16, rope_parameters=gemma_ropes),
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**options, head_dim=16, **experts, norm_topk_prob=True),
        "qwen3-moe-raw": lambda: transformers.Qwen3MoeConfig(**options, head_dim=16, **experts, norm_topk_prob=False),
    }[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def per_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as they are stored: transformers holds a layer's experts in two tensors, and writes three per expert."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition("experts.")
        if last == "gate_up_proj":
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                result |= {
                    f"{prefix}experts.{expert}.{half}_proj.weight": t for half, t in (("gate", gate), ("up", up))
                }
        elif last == "down_proj":
            result |= {f"{prefix}experts.{expert}.down_proj.weight": part for expert, part in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def micro_batch(lengths: list[int], *, seed: int = 0, prompt: int = 2, k: int = 0) -> MicroBatch:
    """Random sequences of `lengths` tokens, all but the first `prompt` of each trained, with the teacher's top `k`
    and a reward at the end of each."""
    generator = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    spans = [np.arange(a + prompt - 1, b - 1) for a, b in pairwise(bounds)]
    rows = np.concatenate(spans).astype(np.int32)

    def logprobs() -> np.ndarray[Any, np.dtype[np.float32]]:
        # about the model's own, so that no ratio is extreme and no step far
        return (-3.0 - generator.random(len(rows))).astype(np.float32)

    return MicroBatch(
        token_ids=generator.integers(0, VOCAB, int(bounds[-1])).astype(np.int32),
        cu_seqlens=bounds,
        rows=rows,
        behaviour_logprobs=logprobs(),
        teacher_logprobs=logprobs(),
        advantages=generator.normal(size=len(rows)).astype(np.float32),
        staleness=generator.integers(0, 3, len(rows)).astype(np.int32),
        topk=random_topk(len(rows), k, seed) if k else None,
        rewards=at_the_end(bounds, rows, generator.normal(size=len(lengths))),
    )


def at_the_end(cu_seqlens: Any, rows: Any, rewards: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32[R]: the reward of each sequence with its last row, NaN with all rows of one that has none."""
    sequence = np.searchsorted(cu_seqlens, rows, side="right") - 1
    is_last = np.append(np.diff(sequence) > 0, True)[: len(rows)]
    of_row = np.asarray(rewards)[sequence]
    return np.where(is_last | np.isnan(of_row), of_row, 0.0).astype(np.float32)


def random_topk(rows: int, k: int, seed: int) -> TopK:
    """The k most likely tokens of random distributions over the vocabulary."""
    logits = 2.0 * np.random.default_rng(seed).normal(size=(rows, VOCAB))
    ids = np.argsort(-logits, axis=1)[:, :k]
    logprobs = np.take_along_axis(logits, ids, 1) - np.log(np.exp(logits).sum(1, keepdims=True))
    return TopK(ids.astype(np.int32), logprobs.astype(np.float32))


def read_differently(batch: MicroBatch, prompt: int = 2, seed: int = 0) -> MicroBatch:
    """The same batch, of whose sequences the teacher reads random prompts of 1 to 12 tokens, but of every third."""
    generator, count = np.random.default_rng(seed), len(batch.cu_seqlens) - 1
    lengths = np.where(np.arange(count) % 3 == 2, 0, generator.integers(1, 13, count)).astype(np.int32)
    ids = generator.integers(0, VOCAB, int(lengths.sum())).astype(np.int32)
    return replace(batch, teacher_prompts=TeacherPrompts(np.full(count, prompt, np.int32), lengths, ids))


def sequences_of_teacher(batch: MicroBatch) -> list[tuple[list[int], int]]:
    """What the teacher reads of each sequence, and by how much its tokens stand further behind; one after another."""
    found, at, read = [], 0, batch.teacher_prompts
    for index, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        ids = batch.token_ids[start:end].tolist()
        length = 0 if read is None else int(read.lengths_N[index])
        if read is not None and length:
            own = int(read.prompt_lengths_N[index])
            found.append(([*read.token_ids[at : at + length].tolist(), *ids[own:]], length - own))
        else:
            found.append((ids, 0))
        at += length
    return found


def step_batch(version: int, micro_batches: list[MicroBatch], loss_tokens: int | None = None) -> StepBatch:
    """One data-parallel rank's batch; the only rank's unless `loss_tokens` says how many rows there are in all."""
    own = sum(len(batch.rows) for batch in micro_batches)
    return StepBatch(version, own if loss_tokens is None else loss_tokens, tuple(micro_batches))


def split(batch: MicroBatch) -> list[MicroBatch]:
    """One micro-batch per sequence."""
    parts = []
    for index, (start, end) in enumerate(pairwise(batch.cu_seqlens)):
        inside = (batch.rows >= start) & (batch.rows < end)
        part = take(replace(batch, rows=batch.rows - start), inside, int(start), int(end))
        part = replace(part, rewards=None if batch.rewards is None else batch.rewards[inside])
        if (read := batch.teacher_prompts) is not None:
            at, length = int(read.lengths_N[:index].sum()), int(read.lengths_N[index])
            one = TeacherPrompts(
                read.prompt_lengths_N[index : index + 1],
                read.lengths_N[index : index + 1],
                read.token_ids[at : at + length],
            )
            part = replace(part, teacher_prompts=one)
        parts.append(part)
    return parts


def take(batch: MicroBatch, rows: Any, start: int, end: int) -> MicroBatch:
    """Tokens [start, end) as one sequence, with the rows that the mask selects."""
    return MicroBatch(
        token_ids=batch.token_ids[start:end],
        cu_seqlens=np.array([0, end - start], np.int32),
        rows=batch.rows[rows],
        behaviour_logprobs=batch.behaviour_logprobs[rows],
        teacher_logprobs=batch.teacher_logprobs[rows],
        advantages=batch.advantages[rows],
        staleness=batch.staleness[rows],
        topk=TopK(batch.topk.ids[rows], batch.topk.logprobs[rows]) if batch.topk is not None else None,
        contrast_logprobs=None if batch.contrast_logprobs is None else batch.contrast_logprobs[rows],
    )


def learner_config(model_path: Path, **changes: Any) -> LearnerConfig:
    """Large steps, so that a wrong optimizer state shows within two of them."""
    optim = OptimConfig(lr=3e-3, weight_decay=0.01, warmup_steps=2, total_steps=10, decay="linear")
    return replace(LearnerConfig(model_path=model_path, optim=optim, logprob_chunk_rows=7), **changes)


def hf_gradients(trainer: Trainer, batch: StepBatch) -> dict[str, torch.Tensor]:
    """The gradient of one batch under Hugging Face names. One rank only."""
    trainer.gradients(batch)
    parameters = dict(trainer.model.named_parameters())
    result: dict[str, torch.Tensor] = {}
    for slot in slots(trainer.shape, 1):
        grad = parameters[slot.name].main_grad  # type: ignore[attr-defined]
        result |= {name: part.clone() for name, part in zip(slot.hf_names, slot.join([grad]), strict=True)}
    return result


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    """Same names, and no element further apart than `tolerance`."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0.0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
