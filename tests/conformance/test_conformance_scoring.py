"""A real server as the teacher: scores as transformers computes them, in one part or several, from the cache or not."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from server_under_test import CONTEXT, VOCAB, Server, prompt, reference_logprobs
from transformers import PreTrainedModel

from opd_async.actors.client.replies import Scores
from opd_async.actors.teacher.canary import Canary
from opd_async.errors import EngineError

EXACT = 1e-4


def score(server: Server, *batches: list[tuple[np.ndarray, int]], topk: int = 0) -> list[list[Scores]]:
    """Score batches one after the other."""

    async def run() -> list[list[Scores]]:
        async with server.client(topk) as client:
            return [await client.score(batch) for batch in batches]

    return asyncio.run(run())


def test_scores_are_the_models(server: Server, first: PreTrainedModel) -> None:
    requests = [(prompt(length, length), start) for length, start in ((2, 1), (40, 1), (200, 150), (CONTEXT, 1))]
    # the vocabulary's last id, which the server reports as 0
    requests.append((np.array([3, VOCAB - 1, 5, VOCAB - 1], np.int32), 1))
    for (ids, start), scores in zip(requests, score(server, requests)[0], strict=True):
        expected = reference_logprobs(first, ids, start)
        assert scores.logprobs.shape == expected.shape
        assert np.abs(scores.logprobs - expected).max() < EXACT


def test_parts_equal_the_whole_and_are_computed_once(server: Server) -> None:
    ids = prompt(300, 7)
    ends = [60, 61, 128, 250, 300]
    parts = score(server, *[[(ids[:end], start)] for start, end in zip([1, *ends], ends, strict=False)])
    whole = score(server, [(ids, 1)])[0][0]
    assert np.abs(np.concatenate([part[0].logprobs for part in parts]) - whole.logprobs).max() < EXACT
    assert [part[0].cached_tokens for part in parts[1:]] == [end - 1 for end in ends[:-1]]
    assert whole.cached_tokens == 0  # logprobs from the start: nothing may come from the cache


def test_the_top_k_is_the_models(server: Server, first: PreTrainedModel) -> None:
    ids, start, k = prompt(90, 11), 40, 8
    (scores,) = score(server, [(ids, start)], topk=k)[0]
    with torch.no_grad():
        logits_NV = first(torch.tensor(ids[None].astype(np.int64))).logits[0].float()
    expected = torch.log_softmax(logits_NV, dim=-1)[start - 1 : len(ids) - 1].topk(k)
    assert scores.topk is not None and scores.topk.logprobs.shape == (len(ids) - start, k)
    # the most likely first; ties within float32's precision may swap places
    assert np.abs(scores.topk.logprobs - expected.values.numpy()).max() < EXACT
    assert (scores.topk.ids == expected.indices.numpy()).mean() > 0.99


async def test_one_request_for_the_top_k_may_use_keys_of_its_salt_alone(server: Server, first: PreTrainedModel) -> None:
    ids, start, k = prompt(120, 13), 60, 8
    async with server.client() as client:
        found = [await client.top(ids, start, k, salt) for salt in ("7", "8", "8")]
        whole = await client.top(ids[:40], 39, 2 * VOCAB)
    with torch.no_grad():
        logits_NV = first(torch.tensor(ids[None].astype(np.int64))).logits[0].float()
    expected = torch.log_softmax(logits_NV, dim=-1)[start - 1 : len(ids) - 1].topk(k)
    for scores in found:
        assert scores.topk is not None and scores.topk.logprobs.shape == (len(ids) - start, k)
        assert np.abs(scores.topk.logprobs - expected.values.numpy()).max() < EXACT
    assert [scores.cached_tokens for scores in found][:2] == [0, 0] and found[2].cached_tokens > 0
    assert whole.topk is not None and whole.topk.ids.shape == (1, VOCAB), "all that there are"


def test_a_refused_request_is_an_error_with_the_reason(server: Server) -> None:
    with pytest.raises(EngineError, match=r"HTTP 400.*context"):
        score(server, [(prompt(CONTEXT + 20, 1), 1)])


async def test_the_canary_is_content(server: Server) -> None:
    async with server.client() as client:
        canary = Canary(client, VOCAB)
        await canary.check()
        await canary.check()
