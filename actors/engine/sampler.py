"""Next-token sampling and logprobs over full vocabularies, in float32.

Suffixes: S sampled rows, R scored rows, V vocabulary, k top-k width.
Logprobs of sampled tokens are log_softmax(logits / temperature) and are not renormalised by top-k, top-p or min-p,
as in SGLang's sampler; logprobs of given tokens are at temperature 1.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from opd_async.actors.engine.batch import SampleRows
from opd_async.actors.engine.request import FloatArray, Request, TopRows


def sample(
    logits_SV: torch.Tensor, rows: SampleRows, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token per row: token ids int64 [S], their logprobs float32 [S], and all logprobs float32 [S, V]."""
    device = logits_SV.device
    _add_bias(logits_SV, rows.requests)
    forbidding = _forbid_early_stop(logits_SV, rows.requests)
    # The usual temperature 1 skips a pass over [S, V].
    if (rows.temperature_S != 1.0).any():
        logits_SV = logits_SV / torch.from_numpy(rows.temperature_S).to(device)[:, None]
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    if forbidding:
        # SGLang reports the lowest float32 rather than -inf, which JSON cannot hold
        logprobs_SV.clamp_(min=torch.finfo(torch.float32).min)
    tokens_S = logprobs_SV.argmax(dim=-1) if rows.greedy_S.all() else _draw(logprobs_SV, rows, generator)
    return tokens_S, logprobs_SV.gather(1, tokens_S[:, None])[:, 0], logprobs_SV


def _draw(logprobs_SV: torch.Tensor, rows: SampleRows, generator: torch.Generator) -> torch.Tensor:
    probs_SV = logprobs_SV.exp()
    if rows.filtered:
        probs_SV = _filter(probs_SV, rows)
    # The first token whose sum of probabilities is above a random share of them all: one random number a row, where
    # torch.multinomial and the argmax of p / Exp(1) want one for each token of the vocabulary. In float64, or the sums
    # of many small probabilities would be off by more than these.
    sums_SV = probs_SV.cumsum(dim=-1, dtype=torch.float64)
    share_S1 = torch.rand((len(probs_SV), 1), generator=generator, dtype=torch.float64, device=probs_SV.device)
    tokens_S = torch.searchsorted(sums_SV, share_S1 * sums_SV[:, -1:], right=True)[:, 0].clamp_(max=len(sums_SV[0]) - 1)
    if rows.greedy_S.any():
        greedy_S = torch.from_numpy(rows.greedy_S).to(tokens_S.device)
        tokens_S = torch.where(greedy_S, logprobs_SV.argmax(dim=-1), tokens_S)
    return tokens_S


def _filter(probs_SV: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """Zero what top-k, then top-p, then min-p exclude; each row keeps at least its most likely token."""
    device = probs_SV.device
    sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True)
    rank_V = torch.arange(probs_SV.shape[1], device=device)
    top_k_S = torch.from_numpy(rows.top_k_S).to(device)[:, None]
    top_p_S = torch.from_numpy(rows.top_p_S).to(device)[:, None]
    min_p_S = torch.from_numpy(rows.min_p_S).to(device)[:, None]
    # The probability ranked before each token, itself excluded, so that the top one always stays.
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    # top_p = 1 keeps everything even when the cumulative sum rounds above 1
    dropped_SV = (
        (rank_V >= top_k_S) | ((before_SV > top_p_S) & (top_p_S < 1.0)) | (sorted_SV < sorted_SV[:, :1] * min_p_S)
    )
    return torch.zeros_like(probs_SV).scatter_(1, order_SV, sorted_SV.masked_fill(dropped_SV, 0.0))


def _add_bias(logits_SV: torch.Tensor, requests: list[Request]) -> None:
    """Add each request's `logit_bias` in place; the reported logprobs are those of the biased distribution."""
    rows_of: dict[tuple[tuple[int, float], ...], list[int]] = defaultdict(list)  # a run gives all requests one bias
    for row, request in enumerate(requests):
        if bias := request.params.logit_bias:
            rows_of[tuple(bias.items())].append(row)
    for pairs, rows in rows_of.items():
        ids, values = zip(*pairs, strict=True)
        at = (torch.tensor(rows, device=logits_SV.device)[:, None], torch.tensor(ids, device=logits_SV.device))
        logits_SV[at] += torch.tensor(values, dtype=logits_SV.dtype, device=logits_SV.device)


def _forbid_early_stop(logits_SV: torch.Tensor, requests: list[Request]) -> bool:
    """Mask the stop tokens of responses shorter than their min_new_tokens; True when any was masked."""
    forbidding = False
    for row, request in enumerate(requests):
        if request.params.min_new_tokens > len(request.output_ids) and request.stop_ids:
            logits_SV[row, sorted(request.stop_ids)] = float("-inf")
            forbidding = True
    return forbidding


def target_logprobs(logits_RV: torch.Tensor, target_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob of one given token per row, float32 [R], and the rows' log normaliser, float32 [R, 1]."""
    # logsumexp and gather instead of log_softmax: the full [R, V] result is not needed.
    norm_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    return (logits_RV.gather(1, target_R[:, None]) - norm_R1)[:, 0], norm_R1


def top_logprobs(scores_RV: torch.Tensor, norm_R1: torch.Tensor | None, k: int) -> TopRows:
    """The k largest per row with their ids, highest first; `norm_R1` is subtracted when scores are logits."""
    values_Rk, ids_Rk = scores_RV.topk(min(k, scores_RV.shape[1]), dim=-1)
    if norm_R1 is not None:
        values_Rk = values_Rk - norm_R1
    return values_Rk.cpu().numpy(), ids_Rk.cpu().numpy()


def id_logprobs(scores_V: torch.Tensor, norm: torch.Tensor | None, ids: tuple[int, ...]) -> FloatArray:
    """Logprobs of chosen ids in rows [..., V], float32 [..., len(ids)]."""
    values = scores_V[..., list(ids)]
    result: FloatArray = (values if norm is None else values - norm).cpu().numpy().astype(np.float32, copy=False)
    return result
