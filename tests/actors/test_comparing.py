"""What a response of an evaluation is compared with: the student's distribution as it was sampled from."""

from __future__ import annotations

import numpy as np

from opd_async.actors.client.replies import Scores
from opd_async.actors.rollout.comparing import given_sampled_ids
from opd_async.estimators.topk import NO_LOGPROB, NO_TOKEN, TopK


def test_lists_of_a_prefill_become_those_of_the_ids_that_are_sampled() -> None:
    """Of five ids the last two are never sampled: in one place they have half of what the whole table has."""
    whole = np.log(np.array([[0.2, 0.2, 0.1, 0.4, 0.1], [0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    sampled = whole[:, :3] - np.log(np.exp(whole[:, :3]).sum(1, keepdims=True))
    tokens = np.array([1, 0])
    ids = np.array([[NO_TOKEN, 0, 1, NO_TOKEN, 2], [0, 1, 2, NO_TOKEN, NO_TOKEN]], np.int32)
    logprobs = np.where(ids == NO_TOKEN, NO_LOGPROB, np.take_along_axis(whole, np.maximum(ids, 0), 1))
    rows = np.arange(2)
    scores = Scores(whole[rows, tokens].astype(np.float32), 7, 3, TopK(ids, logprobs.astype(np.float32)))

    found = given_sampled_ids(scores, sampled[rows, tokens].astype(np.float32))
    assert found.topk is not None and found.topk.problem() is None
    expected = np.where(ids == NO_TOKEN, NO_LOGPROB, np.take_along_axis(sampled, np.maximum(ids, 0), 1))
    np.testing.assert_allclose(found.topk.logprobs, expected, atol=1e-6)
    np.testing.assert_allclose(found.logprobs, sampled[rows, tokens], atol=1e-6)
    assert (found.topk.ids == ids).all() and (found.prompt_tokens, found.cached_tokens) == (7, 3)
