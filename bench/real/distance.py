"""How near a student is to its teacher on held-out prompts: the same code for every side, outside everybody's clock.

    folder, prompts -> sampled responses at T = 1 -> both models' logits -> exact reverse KL over the vocabulary

    KL(p || q) = sum_v p_v (log p_v - log q_v) at each position of the student's own responses, p student, q teacher

Shapes: B prompts, P the longest prompt, R a response's tokens, V the vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

TOGETHER = 32
"""Prompts that are answered in one batch."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one student. KL in nats a token."""

    reverse_kl: float
    """Over all tokens of all responses."""
    error: float
    """Its standard error, from the spread over responses."""
    length: float
    """Mean tokens of a response."""
    ended: float
    """Share of responses that ended by themselves."""


def load(folder: Path) -> Any:
    """The model of a Hugging Face folder, in float32."""
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(
    student: Any, teacher: Any, prompts: Sequence[NDArray[np.int32]], ends: Sequence[int], most_tokens: int
) -> Distance:
    """The distance on one response to each prompt (int32[n] token ids), drawn alike for every student.

    `ends` are the token ids that end a response, which count as its last token; at `most_tokens` it is cut.
    """
    sums, lengths, ended = [], [], 0
    for first in range(0, len(prompts), TOGETHER):
        torch.manual_seed(first)
        part = prompts[first : first + TOGETHER]
        for prompt, response in zip(part, _sampled(student, part, ends, most_tokens), strict=True):
            sums.append(_divergence(student, teacher, prompt, response))
            lengths.append(len(response))
            ended += response[-1] in ends
    kl = sum(sums) / sum(lengths)
    # of a ratio of means: the spread of what each response adds beyond its share
    spread = statistics.stdev(one - kl * length for one, length in zip(sums, lengths, strict=True))
    error = spread * math.sqrt(len(sums)) / sum(lengths)
    return Distance(kl, error, statistics.fmean(lengths), ended / len(lengths))


@torch.no_grad()
def _sampled(model: Any, prompts: Sequence[NDArray[np.int32]], ends: Sequence[int], most: int) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    ids_BP = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):  # padded on the left: responses begin in one column
        ids_BP[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BP[row, longest - len(prompt) :] = 1
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": ends[0]}
    full = model.generate(ids_BP, attention_mask=mask_BP, max_new_tokens=most, eos_token_id=list(ends), **how)
    return [_to_its_end(row, ends) for row in full[:, longest:].tolist()]


def _to_its_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    last = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


@torch.no_grad()
def _divergence(student: Any, teacher: Any, prompt: NDArray[np.int32], response: list[int]) -> float:
    """The sum of KL(student || teacher) over the positions of a response."""
    ids_1T = torch.tensor([[*prompt.tolist(), *response]])
    p_RV, q_RV = (_log_probs(model, ids_1T, len(response)) for model in (student, teacher))
    return float((p_RV.exp() * (p_RV - q_RV)).sum())


def _log_probs(model: Any, ids_1T: Tensor, rows: int) -> Tensor:
    """float32[R, V] at the positions that predict the last `rows` tokens."""
    logits_RV: Tensor = model(ids_1T).logits[0, -rows - 1 : -1]
    return logits_RV.float().log_softmax(-1)
