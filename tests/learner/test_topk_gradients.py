"""Losses on the top-k through the whole learner against transformers and full logits: loss and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_learner import assert_close, hf_gradients, learner_config, micro_batch, step_batch, write_model
from transformers import AutoModelForCausalLM

from opd_async.config.losses import TOPK_LOSSES
from opd_async.learner.config import LossConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.losses.divergences import DIVERGENCES, Cells
from opd_async.learner.trainer import Trainer


@pytest.mark.parametrize("kind", ["qwen3-tied", "llama"])
@pytest.mark.parametrize("loss", sorted(TOPK_LOSSES))
def test_gradients_agree_with_full_logits(alone: Place, tmp_path: Path, kind: str, loss: str) -> None:
    path = write_model(tmp_path / kind, kind)
    batch = micro_batch([5, 23, 40], k=4)
    assert batch.topk is not None
    # without a signal on the sampled token, which other tests check: no returns, no advantages
    config = LossConfig(loss=loss, signal_clamp=1e-12)
    batch.advantages[:] = 0.0
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tables = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = torch.from_numpy(batch.token_ids[start:end].astype("int64"))
        rows = [row - start for row in batch.rows.tolist() if start <= row < end]
        tables.append(model(ids[None]).logits[0].log_softmax(-1)[rows])
    table = torch.cat(tables)
    ids = torch.from_numpy(batch.topk.ids.astype("int64"))
    tail = table.scatter(1, ids, -torch.inf).logsumexp(-1)
    cells = Cells(table.gather(1, ids), tail, torch.from_numpy(batch.topk.logprobs))
    expected = DIVERGENCES[loss](cells, config).mean()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    trainer = Trainer(learner_config(path, loss=config))
    step = step_batch(0, [batch])
    found = trainer.gradients(step).sums["loss"] / step.loss_tokens
    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_close(hf_gradients(trainer, step), gradients, 1e-5)
