"""The model on its device: loading, and one forward step over a packed batch.

    Batch (numpy) -> transformers decoder over PagedCache -> LM head on the wanted rows only -> StepResult (numpy)

The model and its code are transformers'; any causal LM whose attention goes through AttentionInterface works
(Qwen3, Qwen2, Llama, Mistral, Gemma 3). Runs on the engine's single model thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from opd_async.actors.engine import sampler
from opd_async.actors.engine.batch import Batch, SampleRows, ScoreRows
from opd_async.actors.engine.kv import ATTENTION_NAME, PagedCache, place_groups
from opd_async.actors.engine.loading import loading
from opd_async.actors.engine.request import FloatArray, TopRows
from opd_async.data.end_tokens import end_ids
from opd_async.data.model_folder import try_config
from opd_async.data.rope import rope_problem
from opd_async.data.weight_files import plain_problems
from opd_async.errors import InputError

# LM head rows x vocabulary held at once, in float32 elements: 256 MiB on an accelerator. A CPU is as fast with 32 MiB,
# and its memory is the host's.
LOGITS_ELEMENTS, LOGITS_ELEMENTS_CPU = 1 << 26, 1 << 23

# Size of the KV pool when none is asked for: whichever of the two is smaller.
DEFAULT_POOL_TOKENS = 1 << 18
DEFAULT_POOL_BYTES = 1 << 29


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What a step found, on the host, in the row order of Batch.sample and Batch.score."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: TopRows | None = None
    ids_logprobs: dict[int, FloatArray] = field(default_factory=dict)
    score: list[FloatArray] = field(default_factory=list)
    score_top: list[TopRows] = field(default_factory=list)
    score_ids: list[FloatArray] = field(default_factory=list)


class Runner(Protocol):
    """What the engine's loop needs of a model."""

    def step(self, batch: Batch) -> StepResult:
        """Run one forward on the model thread."""
        ...


class ModelRunner:
    """A causal LM with its KV pool."""

    def __init__(self, path: Path, *, dtype: str, device: str, pool_tokens: int | None, seed: int) -> None:
        """Load the model from a Hugging Face folder; `pool_tokens` None takes a default.

        Raises `InputError` for a model whose rotary angles depend on the length of a call, for quantised weights, for
        a folder that transformers cannot load, and where its tensors are not those of the model.
        """
        transformers_logging.disable_progress_bar()
        if problem := rope_problem(try_config(path)):
            raise InputError(f"{path}: {problem}")
        if problems := plain_problems(path):
            raise InputError("; ".join(problems))
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        with loading(path, "model"):
            self.config = AutoConfig.from_pretrained(path)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=self.dtype,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        _refuse_other_tensors(path, loaded)
        self.model: torch.nn.Module = model.to(self.device).eval().requires_grad_(False)
        self.head: torch.nn.Module = model.get_output_embeddings()
        # Decoder and head are called apart, so that the head runs on the wanted rows only.
        self.decoder: torch.nn.Module = model.get_decoder()
        self.vocab_size = int(self.head.weight.shape[0])
        self.pool_tokens = pool_tokens or self._default_pool()
        self.cache = self._make_cache()
        self.eos_ids = frozenset(end_ids(path))
        self._generator = torch.Generator(device=self.device).manual_seed(seed)

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """Run one forward; writes the KV of every packed token and returns the sampled and scored rows."""
        device = self.device
        self.cache.begin(torch.from_numpy(batch.slots_T).to(device), place_groups(batch, device))
        hidden_TH = self.decoder(
            input_ids=torch.from_numpy(batch.input_ids_T).to(device)[None],
            position_ids=torch.from_numpy(batch.positions_T).to(device)[None],
            past_key_values=self.cache,
            use_cache=True,
            pages=self.cache,
        ).last_hidden_state[0]
        result = StepResult()
        if batch.sample is not None:
            self._sample(hidden_TH, batch.sample, result)
        if batch.score is not None:
            self._score(hidden_TH, batch.score, result)
        return result

    def _logits(self, hidden_TH: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        rows = hidden_TH if len(index) == len(hidden_TH) else hidden_TH.index_select(0, index)
        logits: torch.Tensor = self.head(rows)
        return logits.float()

    def _sample(self, hidden_TH: torch.Tensor, rows: SampleRows, result: StepResult) -> None:
        logits_SV = self._logits(hidden_TH, torch.from_numpy(rows.index_S).to(self.device))
        tokens_S, chosen_S, logprobs_SV = sampler.sample(logits_SV, rows, self._generator)
        result.tokens = tokens_S.tolist()
        # tolist waits for the device once; per-token .item() would do so for each.
        result.logprobs = chosen_S.tolist()
        if rows.top:
            result.top = sampler.top_logprobs(logprobs_SV, None, rows.top)
        for row, request in enumerate(rows.requests):
            if request.logprob.ids:
                result.ids_logprobs[row] = sampler.id_logprobs(logprobs_SV[row], None, request.logprob.ids)

    def _score(self, hidden_TH: torch.Tensor, rows: ScoreRows, result: StepResult) -> None:
        index_R = torch.from_numpy(rows.index_R).to(self.device)
        target_R = torch.from_numpy(rows.target_R).to(self.device)
        # A long prompt's logits would not fit in memory at once.
        elements = LOGITS_ELEMENTS_CPU if self.device.type == "cpu" else LOGITS_ELEMENTS
        chunk = max(1, elements // self.vocab_size)
        found: list[FloatArray] = []
        tops: list[TopRows] = []
        chosen_ids: list[list[FloatArray]] = [[] for _ in rows.spans]
        for at in range(0, len(index_R), chunk):
            logits_RV = self._logits(hidden_TH, index_R[at : at + chunk])
            logprobs_R, norm_R1 = sampler.target_logprobs(logits_RV, target_R[at : at + chunk])
            found.append(logprobs_R.cpu().numpy())
            if rows.top:
                tops.append(sampler.top_logprobs(logits_RV, norm_R1, rows.top))
            _collect_ids(rows, at, logits_RV, norm_R1, chosen_ids)
        self._split_score(rows, found, tops, chosen_ids, result)

    @staticmethod
    def _split_score(
        rows: ScoreRows,
        found: list[FloatArray],
        tops: list[TopRows],
        chosen_ids: list[list[FloatArray]],
        result: StepResult,
    ) -> None:
        cuts = np.cumsum([count for _, count in rows.spans])[:-1].tolist()
        result.score = np.split(np.concatenate(found), cuts)
        if tops:
            values = np.split(np.concatenate([top[0] for top in tops]), cuts)
            ids = np.split(np.concatenate([top[1] for top in tops]), cuts)
            result.score_top = list(zip(values, ids, strict=True))
        empty = np.empty((0, 0), dtype=np.float32)
        result.score_ids = [np.concatenate(parts) if parts else empty for parts in chosen_ids]

    def _default_pool(self) -> int:
        per_token = self._layers() * 2 * self._kv_heads() * self._head_dim() * self.dtype.itemsize
        return max(1024, min(DEFAULT_POOL_TOKENS, DEFAULT_POOL_BYTES // per_token))

    def _make_cache(self) -> PagedCache:
        slots = self.pool_tokens + 1
        return PagedCache(
            layers=self._layers(),
            slots=slots,
            kv_heads=self._kv_heads(),
            head_dim=self._head_dim(),
            dtype=self.dtype,
            device=str(self.device),
        )

    def _layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def _kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    def _head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)


_ODD_TENSORS = {
    "unexpected_keys": "have no place in the model",
    "missing_keys": "are missing",
    "mismatched_keys": "have another shape than config.json asks for",
}


def _refuse_other_tensors(path: Path, loaded: Mapping[str, Collection[object]]) -> None:
    """Raise `InputError` if transformers left tensors of the folder aside, or made some up in their place."""
    for key, what in _ODD_TENSORS.items():
        if names := sorted(str(name[0] if isinstance(name, tuple) else name) for name in loaded[key]):
            shown = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            raise InputError(f"{path}: {shown} {what}; give the folder of a model that is what its config.json says")


def _collect_ids(
    rows: ScoreRows, at: int, logits_RV: torch.Tensor, norm_R1: torch.Tensor, out: list[list[FloatArray]]
) -> None:
    """Add each span's chosen-id logprobs from the logits chunk that begins at scored row `at`."""
    first, end = 0, at + len(logits_RV)
    for span, (request, count) in enumerate(rows.spans):
        low, high = max(first, at), min(first + count, end)
        if request.logprob.ids and high > low:
            part = slice(low - at, high - at)
            out[span].append(sampler.id_logprobs(logits_RV[part], norm_R1[part], request.logprob.ids))
        first += count
