"""pass@1 of a Hugging Face folder on held-out prompts: the same code for every side, outside everybody's clock.

    folder, held-out rows -> sampled responses at T = 1 and greedy ones -> share of right answers

Shapes: B prompts, P the longest prompt, R a response's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from opd_async.data.answers import AnswerChecker
from opd_async.data.prompts import Prompt
from opd_async.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Task:
    """Held-out prompts, what reads an answer, and the longest response in tokens."""

    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    checker: AnswerChecker
    max_response_tokens: int


@dataclass(frozen=True, slots=True)
class Passed:
    """Shares of right answers, in [0, 1]: of all sampled responses, and of the greedy ones."""

    sampled: float
    greedy: float


def measure(folder: Path, task: Task, samples: int) -> Passed:
    """`samples` sampled responses for each prompt and a greedy one, drawn alike for every folder."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    sampled = sum(_right(model, task, greedy=False) for _ in range(samples))
    count = len(task.prompts)
    return Passed(sampled / (samples * count), _right(model, task, greedy=True) / count)


@torch.no_grad()
def _right(model: Any, task: Task, greedy: bool) -> int:
    """Right answers, one response a prompt; a response that does not end by itself is wrong."""
    longest = max(len(prompt.token_ids) for prompt in task.prompts)
    prompts_BP = torch.zeros(len(task.prompts), longest, dtype=torch.long)
    mask_BP = torch.zeros_like(prompts_BP)
    for row, prompt in enumerate(task.prompts):  # padded on the left: responses begin in one column
        prompts_BP[row, longest - len(prompt.token_ids) :] = torch.from_numpy(prompt.token_ids)
        mask_BP[row, longest - len(prompt.token_ids) :] = 1
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    end = model.generation_config.eos_token_id
    full_BT = model.generate(
        prompts_BP, attention_mask=mask_BP, max_new_tokens=task.max_response_tokens, pad_token_id=0, **how
    )
    right = 0
    for prompt, ids_R in zip(task.prompts, full_BT[:, longest:].tolist(), strict=True):
        ended = end in ids_R
        text = task.tokenizer.decode(ids_R[: ids_R.index(end)] if ended else ids_R)
        right += task.checker.correct(text, prompt.label, ended)
    return right
