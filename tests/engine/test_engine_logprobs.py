"""Numbers over HTTP: prompt, output and top-k logprobs against transformers, chunked scoring, prefix cache."""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import Server, reference_logprobs
from transformers import PreTrainedModel

VOCAB = 96


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def score(server: Server, ids: list[int], start: int, **more: Any) -> dict[str, Any]:
    params = {"max_new_tokens": 0}
    answer = server.generate(
        input_ids=ids, sampling_params=params, return_logprob=True, logprob_start_len=start, **more
    )
    return answer["meta_info"]


def expected(reference: PreTrainedModel, ids: list[int], start: int) -> list[float]:
    logprobs = reference_logprobs(reference, ids)
    return [float(logprobs[i - 1, ids[i]]) for i in range(start + 1, len(ids))]


@pytest.mark.parametrize(("length", "start"), [(2, 0), (40, 0), (40, 17), (200, 3), (300, 299)])
def test_prompt_logprobs(server: Server, reference: PreTrainedModel, length: int, start: int) -> None:
    ids = tokens(length, length)
    meta = score(server, ids, start)
    entries = meta["input_token_logprobs"]
    assert entries[0] == [None, ids[start], None]
    assert [entry[1] for entry in entries] == ids[start:]
    np.testing.assert_allclose([entry[0] for entry in entries[1:]], expected(reference, ids, start), atol=1e-4)
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (length, 0)
    assert meta["output_token_logprobs"] == []


def test_start_at_the_end_and_no_start(server: Server) -> None:
    ids = tokens(1, 10)
    assert score(server, ids, 10)["input_token_logprobs"] == []
    assert score(server, ids, 9)["input_token_logprobs"] == [[None, ids[9], None]]
    assert score(server, ids, -1)["input_token_logprobs"] == []
    assert (
        "input_token_logprobs" not in server.generate(input_ids=ids, sampling_params={"max_new_tokens": 1})["meta_info"]
    )


def test_a_batch_scores_many_lengths_at_once(server: Server, reference: PreTrainedModel) -> None:
    prompts = [tokens(100 + i, 2 + (i * 7) % 45) for i in range(40)]
    starts = [i % len(prompt) for i, prompt in enumerate(prompts)]
    answers = server.generate(
        input_ids=prompts, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=starts
    )
    for prompt, start, answer in zip(prompts, starts, answers, strict=True):
        found = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        np.testing.assert_allclose(found, expected(reference, prompt, start), atol=1e-4)


def test_chunked_scoring_equals_whole_scoring(server: Server) -> None:
    rng = np.random.default_rng(5)
    for case in range(6):
        prompt, response = tokens(200 + case, 12), tokens(300 + case, [0, 1, 5, 30, 60, 90][case])
        ids, first = prompt + response, len(prompt)
        salt = {"cache_salt": f"whole{case}"}
        whole = [entry[0] for entry in score(server, ids, first - 1, **salt)["input_token_logprobs"][1:]]
        cuts = sorted({first, *rng.integers(first, len(ids) + 1, 4).tolist(), len(ids)})
        parts: list[float] = []
        for low, high in pairwise(cuts):
            meta = score(server, ids[:high], low - 1, cache_salt=f"parts{case}")
            assert meta["cached_tokens"] == (low - 1 if parts else 0)
            parts += [entry[0] for entry in meta["input_token_logprobs"][1:]]
        np.testing.assert_allclose(parts, whole, atol=1e-5)
        assert len(whole) == len(response)


def test_cached_tokens_are_exact(server: Server) -> None:
    ids = tokens(7, 100)
    server.generate(input_ids=ids, sampling_params={"max_new_tokens": 0}, cache_salt="exact")
    for start, cached in ((0, 0), (50, 50), (99, 99), (100, 99), (-1, 99)):
        assert score(server, ids, start, cache_salt="exact")["cached_tokens"] == cached
    assert score(server, ids, -1, cache_salt="another")["cached_tokens"] == 0
    longer = server.generate(input_ids=[*ids, 3], sampling_params={"max_new_tokens": 5}, cache_salt="exact")
    assert longer["meta_info"]["cached_tokens"] == 100
    # the last sampled token was never fed to the model, so its KV does not exist
    follow = [*ids, 3, *longer["output_ids"], 4]
    assert score(server, follow, -1, cache_salt="exact")["cached_tokens"] == 105


def test_top_and_chosen_ids(server: Server, reference: PreTrainedModel) -> None:
    ids, chosen = tokens(8, 90), [5, 0, 95]
    meta = score(server, ids, 60, top_logprobs_num=4, token_ids_logprob=chosen)
    logprobs = reference_logprobs(reference, ids)
    values, indices = logprobs.topk(4)
    assert meta["input_top_logprobs"][0] is None
    assert meta["input_token_ids_logprobs"][0] is None
    for row, position in enumerate(range(61, 90), start=1):
        top = meta["input_top_logprobs"][row]
        assert [entry[1] for entry in top] == indices[position - 1].tolist()
        np.testing.assert_allclose([entry[0] for entry in top], values[position - 1], atol=1e-4)
        picked = meta["input_token_ids_logprobs"][row]
        assert [entry[1] for entry in picked] == chosen
        np.testing.assert_allclose([entry[0] for entry in picked], logprobs[position - 1, chosen], atol=1e-4)
    # a scoring request reports the distribution after its last token
    assert [entry[1] for entry in meta["output_top_logprobs"][0]] == indices[-1].tolist()
    np.testing.assert_allclose([e[0] for e in meta["output_token_ids_logprobs"][0]], logprobs[-1, chosen], atol=1e-4)


def test_flat_top_logprobs(server: Server) -> None:
    ids = tokens(9, 30)
    nested = score(server, ids, 4, top_logprobs_num=3)["input_top_logprobs"]
    want_values = np.array([[entry[0] for entry in row] for row in nested[1:]], np.float32)
    want_ids = np.array([[entry[1] for entry in row] for row in nested[1:]], np.int32)
    flat = score(server, ids, 4, top_logprobs_num=3, return_flat_raw_top_logprobs=True)
    assert "input_top_logprobs" not in flat
    assert (flat["input_top_logprobs_shape"], flat["input_top_logprobs_null_prefix"]) == ([25, 3], 1)
    np.testing.assert_allclose(np.float32(flat["input_top_logprobs_val_flat"]).reshape(25, 3), want_values, atol=1e-5)
    assert flat["input_top_logprobs_idx_flat"] == want_ids.ravel().tolist()
    packed = score(
        server, ids, 4, top_logprobs_num=3, return_flat_raw_top_logprobs=True, return_flat_raw_top_logprobs_b64=True
    )
    assert packed["input_top_logprobs_val_flat_b64_dtype"] == "float32"
    assert packed["input_top_logprobs_idx_flat_b64_dtype"] == "int32"
    values = np.frombuffer(base64.b64decode(packed["input_top_logprobs_val_flat_b64"]), "<f4").reshape(25, 3)
    indices = np.frombuffer(base64.b64decode(packed["input_top_logprobs_idx_flat_b64"]), "<i4").reshape(25, 3)
    np.testing.assert_allclose(values, want_values, atol=1e-5)
    np.testing.assert_array_equal(indices, want_ids)


def test_output_logprobs_are_at_the_sampling_temperature(server: Server, reference: PreTrainedModel) -> None:
    prompt = tokens(10, 20)
    params = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    answer = server.generate(input_ids=prompt, sampling_params=params, return_logprob=True, top_logprobs_num=2)
    out, meta = answer["output_ids"], answer["meta_info"]
    logprobs = reference_logprobs(reference, prompt + out, temperature=0.7)[len(prompt) - 1 : -1]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == out
    found = [entry[0] for entry in meta["output_token_logprobs"]]
    np.testing.assert_allclose(found, logprobs.gather(1, torch.tensor(out)[:, None])[:, 0], atol=1e-4)
    np.testing.assert_allclose([row[0][0] for row in meta["output_top_logprobs"]], logprobs.max(dim=1)[0], atol=1e-4)
    assert meta["output_token_logprobs_length"] == 12
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 12}]
    assert meta["e2e_latency"] > 0


def test_greedy_follows_the_argmax(server: Server, reference: PreTrainedModel) -> None:
    prompt = tokens(11, 15)
    params = {"max_new_tokens": 20, "temperature": 0.0}
    answer = server.generate(input_ids=prompt, sampling_params=params, return_logprob=True)
    logprobs = reference_logprobs(reference, prompt + answer["output_ids"])[len(prompt) - 1 : -1]
    assert answer["output_ids"] == logprobs.argmax(dim=1).tolist()
    found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    np.testing.assert_allclose(found, logprobs.max(dim=1)[0], atol=1e-4)


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {"top_k": 5, "top_p": 0.5}])
def test_filters_keep_only_what_they_should(
    server: Server, reference: PreTrainedModel, params: dict[str, float]
) -> None:
    prompt = tokens(12, 10)
    probs = reference_logprobs(reference, prompt)[-1].exp()
    order = probs.argsort(descending=True)
    ranked = probs[order]
    keep = torch.ones(VOCAB, dtype=torch.bool)
    keep &= torch.arange(VOCAB) < params.get("top_k", VOCAB)
    keep &= (ranked.cumsum(0) - ranked) <= params.get("top_p", 1.0)
    keep &= ranked >= ranked[0] * params.get("min_p", 0.0)
    allowed = set(order[keep].tolist())
    answers = server.generate(input_ids=[prompt] * 150, sampling_params={"max_new_tokens": 1, **params})
    drawn = {answer["output_ids"][0] for answer in answers}
    assert drawn <= allowed
    assert len(drawn) >= min(2, len(allowed))


def test_samples_follow_the_distribution(server: Server, reference: PreTrainedModel) -> None:
    prompt = tokens(13, 10)
    probs = reference_logprobs(reference, prompt)[-1].exp().numpy()
    answers = server.generate(input_ids=[prompt] * 2000, sampling_params={"max_new_tokens": 1})
    counts = np.bincount([answer["output_ids"][0] for answer in answers], minlength=VOCAB)
    # total variation distance of 2000 draws over 96 ids stays well below this for the right distribution
    assert np.abs(counts / 2000 - probs).sum() / 2 < 0.12


def test_stop_tokens_and_minimum_length(server: Server, reference: PreTrainedModel) -> None:
    prompt = tokens(14, 10)
    greedy = {"temperature": 0.0, "max_new_tokens": 10}
    free = server.generate(input_ids=prompt, sampling_params=greedy)["output_ids"]
    stop = free[3]
    first = free.index(stop)
    stopped = server.generate(input_ids=prompt, sampling_params=greedy | {"stop_token_ids": [stop]})
    assert stopped["output_ids"] == free[: first + 1]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    ignored = server.generate(input_ids=prompt, sampling_params=greedy | {"stop_token_ids": [stop], "ignore_eos": True})
    assert ignored["output_ids"] == free
    assert ignored["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    longer = server.generate(
        input_ids=prompt, sampling_params=greedy | {"stop_token_ids": [stop], "min_new_tokens": first + 3}
    )
    assert stop not in longer["output_ids"][: first + 3]
    logprobs = reference_logprobs(reference, [*prompt, *free[:first]])[-1]
    assert longer["output_ids"][first] == int(logprobs.index_fill(0, torch.tensor([stop]), -1e9).argmax())
