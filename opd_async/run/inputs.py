"""Hold the data that the launcher reads before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.data.completions import CompletionSet
from opd_async.data.prompts import PromptSet
from opd_async.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Inputs:
    """Prompts, held-out prompts (None without an evaluation), the student's tokenizer, and given responses."""

    prompts: PromptSet
    held_out: PromptSet | None
    tokenizer: Tokenizer
    completions: CompletionSet
