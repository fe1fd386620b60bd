"""Hold the data that the launcher reads before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opd_async.data.completions import CompletionSet
from opd_async.data.prompts import PromptSet
from opd_async.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Inputs:
    """Prompts, those of each evaluation set by name, the student's tokenizer, and given responses."""

    prompts: PromptSet
    held_out: Mapping[str, PromptSet]
    tokenizer: Tokenizer
    completions: CompletionSet
