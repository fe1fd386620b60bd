"""Drawing tokens from whole vocabularies: each as often as its probability says, and none that has none."""

from __future__ import annotations

import numpy as np
import torch

from opd_async.actors.engine.batch import SampleRows
from opd_async.actors.engine.sampler import sample

VOCAB, ROWS = 50_000, 2048


def rows(count: int) -> SampleRows:
    """Plain sampling at temperature 1."""
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    return SampleRows(
        requests=[],
        index_S=np.arange(count),
        temperature_S=ones,
        greedy_S=np.zeros(count, bool),
        top_k_S=np.full(count, VOCAB),
        top_p_S=ones,
        min_p_S=zeros,
        filtered=False,
        top=0,
    )


def test_unlikely_tokens_at_the_end_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    """Half of all probability on one token in front, a hundredth on each of ten at the end, a tail between them."""
    probs_V = torch.full((VOCAB,), 0.4 / (VOCAB - 12))
    probs_V[0], probs_V[1], probs_V[-10:] = 0.5, 0.0, 0.01
    drawn = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        logits_SV = probs_V.log().expand(ROWS // 8, VOCAB).clone()
        tokens_S, logprobs_S, _ = sample(logits_SV, rows(ROWS // 8), generator)
        torch.testing.assert_close(logprobs_S, probs_V[tokens_S].log(), rtol=0.0, atol=1e-4)
        drawn.append(tokens_S)
    tokens = torch.cat(drawn)
    first, last = float((tokens == 0).float().mean()), float((tokens >= VOCAB - 10).float().mean())
    assert not bool((tokens == 1).any())
    # four standard deviations of a share of so many draws
    assert abs(first - 0.5) < 4 * (0.25 / ROWS) ** 0.5
    assert abs(last - 0.1) < 4 * (0.09 / ROWS) ** 0.5
    between = (tokens > 1) & (tokens < VOCAB - 10)
    assert abs(float(between.float().mean()) - 0.4) < 4 * (0.24 / ROWS) ** 0.5
    assert len(tokens[between].unique()) > 0.95 * int(between.sum())


def test_a_row_with_one_possible_token_draws_it() -> None:
    logits_SV = torch.full((64, VOCAB), -torch.inf)
    logits_SV[torch.arange(64), torch.arange(64) * 700] = 3.0
    tokens_S, _, _ = sample(logits_SV, rows(64), torch.Generator().manual_seed(1))
    assert tokens_S.tolist() == [700 * row for row in range(64)]
