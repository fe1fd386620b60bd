"""Given tokens in the learner: context with an exact gradient through it, and no label of anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_learner import VOCAB, assert_close, hf_gradients, learner_config, step_batch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_async.learner.config import LossConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.trainer import Trainer
from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.packing import micro_batch
from opd_async.scheduling.segments import Segment
from opd_async.transport.messages import ScoredChunk

PROMPT = 4
NOTHING = np.zeros(0, np.float32)
EPISODES = {3: [(5, True), (7, False), (6, True), (2, False)], 4: [(3, False), (9, True)], 5: [(11, True)]}
"""By sample, its spans: (tokens, sampled)."""


def scores(model: torch.nn.Module, ids: NDArray[np.int32]) -> Tensor:
    """float32[n - 1]: log p of each token but the first."""
    sequence = torch.from_numpy(ids.astype(np.int64))
    table = model(sequence[None]).logits[0].log_softmax(-1)
    return table[:-1].gather(1, sequence[1:, None])[:, 0]


def segments(model: torch.nn.Module, given_ids: int) -> list[Segment]:
    """The episodes as the intake takes them, the first one cut within its spans; `given_ids` draws what was given."""
    found: list[Segment] = []
    for sample_id, spans in EPISODES.items():
        draw, drawn = np.random.default_rng(sample_id), np.random.default_rng(given_ids)
        ids, assembler = draw.integers(0, VOCAB, PROMPT).astype(np.int32), Assembler()
        for index, (count, sampled) in enumerate(spans):
            start, source = len(ids) - PROMPT, draw if sampled else drawn
            context = ids if start == 0 else None
            ids = np.concatenate([ids, source.integers(0, VOCAB, count).astype(np.int32)])
            with torch.no_grad():
                behaviour = scores(model, ids)[-count:].numpy() if sampled else NOTHING
            teacher = draw.uniform(-4, -1, count).astype(np.float32) if sampled else NOTHING
            finish = "stop" if sampled and index == len(spans) - 1 else None
            assembler.add(
                ScoredChunk(
                    sample_id=sample_id,
                    attempt=0,
                    actor=0,
                    prompt_id=0,
                    prompt_tokens=PROMPT,
                    start=start,
                    weight_version=0,
                    finish=finish,
                    label="",
                    teacher_id="",
                    latency_s=0.0,
                    token_ids=ids[len(ids) - count :],
                    behaviour_logprobs=behaviour,
                    teacher_logprobs=teacher,
                    context=context,
                    sampled=sampled,
                )
            )
            if sample_id == 3 and index in (0, 3):  # a cut behind the first span, and one behind all
                segment = assembler.take(assembler.samples[sample_id])
                assert segment is not None
                found.append(segment)
        if sample_id != 3:
            whole = assembler.take(assembler.samples[sample_id])
            assert whole is not None
            found.append(whole)
    return found


def expected(path: Path, taken: list[Segment]) -> dict[str, Tensor]:
    """By transformers, one sequence at a time: the sum over sampled positions of -(log q - log p) d log p, their mean.

    Behaviour logprobs are the model's own, so every ratio is 1.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    losses = []
    for segment in taken:
        chosen = np.arange(segment.start, segment.end) if segment.positions is None else segment.positions
        own = scores(model, segment.token_ids)[segment.prompt_tokens + chosen - 1]
        losses.append(-((torch.from_numpy(segment.teacher_logprobs) - own.detach()) * own).sum())
    (torch.stack(losses).sum() / sum(segment.tokens for segment in taken)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("given_ids", [1, 2])
def test_gradients_are_those_of_plain_autograd_over_sampled_positions(
    alone: Place, model_path: Path, given_ids: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    taken = segments(model, given_ids)
    assert [segment.tokens for segment in taken] == [5, 6, 9, 11]
    trainer = Trainer(learner_config(model_path, loss=LossConfig(loss="reverse_kl")))
    wanted = expected(model_path, taken)
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-2
    assert_close(hf_gradients(trainer, step_batch(0, [micro_batch(taken, 0)])), wanted, 1e-5)
    one_by_one = step_batch(0, [micro_batch([segment], 0) for segment in taken])
    assert_close(hf_gradients(trainer, one_by_one), wanted, 1e-5)


def test_what_was_given_is_nobodys_label(alone: Place, model_path: Path) -> None:
    """Behind the last sampled token a given one is a label and nothing else: whatever it is, no gradient changes by a
    bit. In front of one it is context, and changes them."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    trainer = Trainer(learner_config(model_path, loss=LossConfig(loss="reverse_kl")))

    def gradient(change: slice) -> dict[str, Tensor]:
        second = segments(model, 1)[1]
        second.token_ids[change] = (second.token_ids[change] + 1) % VOCAB
        return hf_gradients(trainer, step_batch(0, [micro_batch([second], 0)]))

    plain, label, context = gradient(slice(0, 0)), gradient(slice(-2, None)), gradient(slice(PROMPT + 5, PROMPT + 12))
    assert all(torch.equal(plain[name], label[name]) for name in plain)
    assert max(float((plain[name] - context[name]).abs().max()) for name in plain) > 1e-3
